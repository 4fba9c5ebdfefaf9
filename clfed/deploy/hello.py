"""What a node asks its server before it connects, so that a refusal has a reason.

The SuperLink answers a node that it does not want with one and the same error; see
:mod:`clfed.deploy.gate` for who answers here.
"""

from __future__ import annotations

import asyncio
import json
import math
import reprlib
import ssl
import time
from datetime import UTC, datetime
from typing import Any, cast

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clfed import __version__
from clfed.deploy.invitation import Invitation
from clfed.deploy.preflight import check_server
from clfed.errors import (
    EmbeddingMismatch,
    ExpiredCertificate,
    InvalidMessage,
    KeyInUse,
    UnknownNode,
    Unreachable,
    UntrustedServer,
    VersionMismatch,
)

HELLO = "/clfed/hello"
QUIET = 10.0  # seconds; a SuperNode that lives asks every three
_PAUSE = 0.5  # seconds between two attempts
_ATTEMPT = 10.0  # seconds for one of them
_LIMIT = 2**16  # bytes of an answer; a real one has some 300


def say_hello(invitation: Invitation, *, wait: float = 30.0, patience: float = 20.0) -> None:
    """Find out whether the server of an invitation will take this node in.

    Waits for a server that is still starting, and for a node with the same key to fall silent, as
    one does that was killed a moment ago.

    Args:
        invitation: Says whom to ask, and who asks.
        wait: Seconds in which the server has to answer, more than 0.
        patience: Seconds in which another user of the key has to fall silent.

    Raises:
        Unreachable: Nobody answers.
        UntrustedServer: Somebody else answers: another authority, or another federation.
        ExpiredCertificate: A certificate is not valid by this machine's clock, or that clock
            differs too much from the server's.
        UnknownNode: The key was revoked or never invited.
        VersionMismatch: The server has another version of clfed.
        EmbeddingMismatch: The federation has another embedding than the invitation says.
        KeyInUse: Somebody else is connected with this key.
        InvalidMessage: What answers is no gate of clfed.
    """
    check_server(invitation.address, invitation.authority.encode("ascii"), wait=wait)
    end = time.monotonic() + wait
    answer = _answer(invitation, end)
    silent_by = time.monotonic() + patience
    while (used := _seconds_since_use(invitation, answer)) < QUIET:
        left = silent_by - time.monotonic()
        if left <= 0:
            raise KeyInUse(
                f"Expected nobody else to be connected as {invitation.name!r}, got a request from "
                f"{_shown(answer.get('peer'))} {used:.0f} s ago."
            )
        time.sleep(min(QUIET - used, left) + 0.01)
        answer = _answer(invitation, max(end, silent_by))


def _answer(invitation: Invitation, end: float) -> dict[str, Any]:
    """Say hello until there is an answer; return it if it is that of this node's federation."""
    while True:
        status, body = asyncio.run(_request(invitation, min(_ATTEMPT, end - time.monotonic())))
        if status is not None and status < 500:
            return _checked(invitation, status, body)
        if time.monotonic() + _PAUSE >= end:
            reason = f"status {status}" if status else body.decode()
            raise Unreachable(
                f"Expected the server at {invitation.address} to answer, got: {reason}."
            )
        time.sleep(_PAUSE)


async def _request(invitation: Invitation, seconds: float) -> tuple[int | None, bytes]:
    """Say hello once; returns status and body, or None and the reason why there are none."""
    import httpx

    from clfed.deploy.signing import signed

    trust = ssl.create_default_context(cadata=invitation.authority)
    body = bytearray()
    try:
        async with (
            asyncio.timeout(max(seconds, 0.1)),
            httpx.AsyncClient(verify=trust, trust_env=False, timeout=None) as client,
            client.stream(
                "GET",
                f"https://{invitation.address}{HELLO}",
                headers=signed(_private_key(invitation)),
            ) as response,
        ):
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > _LIMIT:
                    break
            return response.status_code, bytes(body)
    except TimeoutError:
        return None, b"it accepted the connection and did not answer"
    except httpx.TransportError as error:
        return None, (str(error) or type(error).__name__).encode()


def _private_key(invitation: Invitation) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_ssh_private_key(invitation.key.encode("ascii"), password=None)
    return cast(ec.EllipticCurvePrivateKey, key)  # no invitation is made with another one


def _checked(invitation: Invitation, status: int, body: bytes) -> dict[str, Any]:
    address = invitation.address
    answer = _parsed(body)
    if status not in (200, 401, 403) or "known" not in answer:
        raise InvalidMessage(
            f"Expected the gate of clfed at {address}, got something else that answers with "
            f"status {status}.",
            remedy="Check the port; the server has to be started with clfed serve.",
        )
    if status == 401:
        clock = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        raise ExpiredCertificate(
            f"Expected a clock that agrees with that of the server at {address}, which says "
            f"{_shown(answer.get('time'))}, got {clock}.",
            remedy="Set this machine's clock; the server's has to be right, too.",
        )
    if status == 403:
        raise UnknownNode(
            f"Expected the server at {address} to know the key of {invitation.name!r}, got the "
            "answer that it does not."
        )
    if answer.get("clfed") != __version__:
        raise VersionMismatch(
            f"Expected clfed {__version__}, as on this machine, at {address}, got clfed "
            f"{_shown(answer.get('clfed'))}."
        )
    if answer.get("federation") != invitation.federation:
        raise UntrustedServer(
            f"Expected federation {invitation.federation[:8]} at {address}, got "
            f"{_shown(answer.get('federation'))}."
        )
    if answer.get("embedding") != invitation.embedding:
        raise EmbeddingMismatch(
            f"Expected the embedding {_shown(invitation.embedding)} of the invitation at "
            f"{address}, got {_shown(answer.get('embedding'))}.",
            remedy="Ask the operator for a new invitation: clfed invite DIR NAME.",
        )
    return answer


def _parsed(body: bytes) -> dict[str, Any]:
    """Return an object in JSON; an empty one where it is none."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _seconds_since_use(invitation: Invitation, answer: dict[str, Any]) -> float:
    """Seconds since somebody used the key; infinite where nobody has."""
    used = answer.get("busy_seconds")
    if used is None:
        return math.inf
    if type(used) not in (int, float) or not used >= 0:
        raise InvalidMessage(
            f"Expected seconds in the answer of {invitation.address}, got {_shown(used)}."
        )
    return float(used)


def _shown(value: object) -> str:
    return reprlib.repr(value)
