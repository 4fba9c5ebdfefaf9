"""What of Flower's SuperLink nodes may reach: a reverse proxy for signed requests of its Fleet API.

It adds ``GET /clfed/hello``, see :mod:`clfed.deploy.hello`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from flwr.supercore.date import now
from flwr.supercore.error import ApiErrorCode

from clfed import __version__
from clfed.deploy.address import parse_address
from clfed.deploy.hello import HELLO
from clfed.deploy.keys import AUTHORITY
from clfed.deploy.layout import NODES, read_settings
from clfed.deploy.signing import Keys, Refused, claim
from clfed.errors import InvalidMessage, MissingData

logger = logging.getLogger(__name__)

LIMIT = 2**30  # bytes of one request
STALL = 60.0  # seconds without a byte, in either direction
LONGEST = 600.0  # seconds for one request, and again for its answer
POOL = 100  # connections to the SuperLink at a time
# The SuperLink closes connections that are unused for 5 s; none must be taken up just then.
_IDLE = 3.0
# What Flower's nodes ask for, but for signing themselves up and off, which is the operator's.
_ROUTE = re.compile(rb"/v1/fleet/(?!(?:un)?register)[a-z0-9]+(?:-[a-z0-9]+)*")
_ACTIVATE, _DEACTIVATE = b"/v1/fleet/activate-node", b"/v1/fleet/deactivate-node"
# Headers of one connection alone (RFC 9110, 7.6.1), and what only a trusted proxy may say.
_OWN = re.compile(
    rb"connection|keep-alive|proxy-.*|te|trailers?|transfer-encoding|upgrade|expect|host"
    rb"|forwarded|x-forwarded-.*|x-real-ip"
)

Event = Mapping[str, Any]
Headers = Sequence[tuple[bytes, bytes]]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]


class _GoneError(Exception):
    """The client closed the connection."""


@dataclass
class _Visit:
    """When and from where a key was last used, and how many requests with it are under way."""

    peer: str = ""
    last: float = 0.0
    requests: int = 0


class FleetProxy:
    """The reverse proxy as an ASGI application; ``async with`` it while it is in use.

    Args:
        folder: Of the federation.
        superlink: ``host:port`` of the SuperLink, which has the federation's certificate.
        limit: Bytes that one request may have.

    Raises:
        ConfigError: The address is none.
        MissingData: The folder is not that of a federation.
        InvalidMessage: Its settings or its authority are damaged.
    """

    def __init__(self, folder: Path, superlink: str, *, limit: int = LIMIT) -> None:
        parse_address(superlink)
        self._identity = _identity(folder)
        self._keys = Keys(folder / NODES)
        self._superlink, self._limit = f"https://{superlink}", limit
        self._visits: dict[str, _Visit] = {}
        self._client = httpx.AsyncClient(
            verify=_trusting(folder / AUTHORITY),
            timeout=httpx.Timeout(STALL, connect=5.0),
            limits=httpx.Limits(max_connections=POOL, keepalive_expiry=_IDLE),
            trust_env=False,  # proxies that this machine has for others have no part in this
        )

    async def __aenter__(self) -> FleetProxy:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI 3)."""
        peer = "{}:{}".format(*scope["client"] or ("unknown", 0))
        try:
            if (scope["method"], scope["raw_path"]) == ("GET", HELLO.encode()):
                await _reply(send, 200, self._hello(scope["headers"], peer))
            else:
                await self._pass_on(scope, peer, receive, send)
        except Refused as refusal:
            shown = scope["method"][:20], scope["raw_path"][:80], peer, refusal.status, refusal
            logger.warning("Refused %s %r of %s with status %d: %s", *shown)
            await _reply(send, refusal.status, _said(refusal))
        except _GoneError:
            logger.info("%s left in the middle of a request.", peer)

    def _hello(self, headers: Headers, peer: str) -> dict[str, Any]:
        node = self._keys.check(claim(headers))
        visit = self._visits.get(node)
        busy = None
        if visit is not None:
            busy = 0.0 if visit.requests else time.monotonic() - visit.last
        logger.info("%s says hello from %s.", node, peer)
        last = {"busy_seconds": busy, "peer": visit.peer if visit else None}
        return {"clfed": __version__, **self._identity, "known": True, **last}

    async def _pass_on(self, scope: Event, peer: str, receive: Receive, send: Send) -> None:
        path, headers = scope["raw_path"], scope["headers"]
        if scope["method"] != "POST" or scope["query_string"] or not _ROUTE.fullmatch(path):
            raise Refused(404, "Expected a request that nodes make, got another one.")
        try:
            node = self._keys.check(claim(headers))
        except Refused as refusal:
            if refusal.status == 503:
                raise
            # A SuperNode that cannot begin prints the reason; later on, 401 makes it end itself.
            status = 412 if path == _ACTIVATE else 401
            raise Refused(status, str(refusal), known=refusal.known) from refusal
        if int(dict(headers).get(b"content-length", b"0")) > self._limit:
            raise self._too_long()
        request = httpx.Request(
            "POST",
            f"{self._superlink}{path.decode('ascii')}",
            headers=_passed(headers),
            content=self._body(receive),
        )
        with self._visiting(node, peer):
            done = await self._exchange(request, send)
        if done and path == _DEACTIVATE:
            self._visits.pop(node, None)  # it left as it should: the key is free at once

    @contextmanager
    def _visiting(self, node: str, peer: str) -> Iterator[None]:
        visit = self._visits.setdefault(node, _Visit())
        visit.peer = peer
        visit.requests += 1
        try:
            yield
        finally:
            visit.last = time.monotonic()
            visit.requests -= 1

    async def _body(self, receive: Receive) -> AsyncIterator[bytes]:
        """Yield the body as it comes, so that it is nowhere as a whole."""
        total, more = 0, True
        while more:
            try:
                async with asyncio.timeout(STALL):
                    event = await receive()
            except TimeoutError:
                raise Refused(408, f"Expected more of the body within {STALL:g} s.") from None
            if event["type"] == "http.disconnect":
                raise _GoneError
            total += len(event["body"])
            if total > self._limit:
                raise self._too_long()
            more = event["more_body"]
            if event["body"]:
                yield event["body"]

    def _too_long(self) -> Refused:
        return Refused(413, f"Expected a body of at most {self._limit} bytes, got a longer one.")

    async def _exchange(self, request: httpx.Request, send: Send) -> bool:
        """Ask the SuperLink and pass its answer on; returns whether it did what was asked."""
        try:
            async with asyncio.timeout(LONGEST):
                response = await self._client.send(request, stream=True)
        except TimeoutError:
            raise Refused(408, f"Expected the whole body within {LONGEST:g} s.") from None
        except httpx.TransportError as error:
            # At 503 SuperNodes try again, for as long as the SuperLink needs to start again.
            raise Refused(503, f"The SuperLink does not answer: {_reason(error)}.") from error
        try:
            async with asyncio.timeout(LONGEST):
                await _start(send, response.status_code, _passed(response.headers.raw))
                async for chunk in response.aiter_raw():
                    await _send_body(send, chunk, more=True)
                await _send_body(send, b"", more=False)
        except (TimeoutError, httpx.TransportError) as error:
            # The connection is closed, so that the client does not take a part for the whole.
            logger.warning("An answer broke off: %s.", _reason(error))
            return False
        finally:
            await response.aclose()
        return response.is_success


def present(path: Path) -> Path:
    """Return the path of a file of the federation.

    Raises:
        MissingData: There is none.
    """
    if not path.is_file():
        raise MissingData(
            f"Expected a file at {path}, found none.",
            remedy="Give the folder of a federation, as clfed create makes it.",
        )
    return path


def _identity(folder: Path) -> dict[str, str]:
    settings = read_settings(folder)
    return {"federation": settings["id"], "embedding": settings["embedding"]}


def _trusting(authority: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=present(authority))
    except ssl.SSLError as error:
        raise InvalidMessage(
            f"Expected a certificate in {authority}, got something else: {error}.",
            remedy="Restore the file from a backup.",
        ) from error


def _passed(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Return the headers that concern both ends, not one connection."""
    lowered = [(name.lower(), value) for name, value in headers]
    own = {
        part.strip().lower()
        for name, value in lowered
        if name == b"connection"
        for part in value.split(b",")
    }
    if any(name == b"transfer-encoding" for name, _ in lowered):
        own.add(b"content-length")  # which then does not count (RFC 9112, 6.3)
    return [
        (name, value) for name, value in lowered if name not in own and not _OWN.fullmatch(name)
    ]


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _said(refusal: Refused) -> dict[str, Any]:
    # Flower reads code and detail, hello the rest.
    code = int(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED)
    clock = now().isoformat(timespec="seconds")
    return {"code": code, "detail": str(refusal), "known": refusal.known, "time": clock}


async def _reply(send: Send, status: int, content: Mapping[str, Any]) -> None:
    body = json.dumps(content).encode("ascii")
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status != 200:
        headers.append((b"connection", b"close"))  # whatever else comes is not waited for
    await _start(send, status, headers)
    await _send_body(send, body, more=False)


async def _start(send: Send, status: int, headers: Headers) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _send_body(send: Send, body: bytes, *, more: bool) -> None:
    async with asyncio.timeout(STALL):
        await send({"type": "http.response.body", "body": body, "more_body": more})
