"""The only open door of a federation: lets invited nodes in, to what nodes need, and nobody else.

Flower's SuperLink has one port for everything: for nodes, which it knows by their keys, and for
whoever starts programs on all of them, whom it does not check. So it listens on its own machine
alone, and the gate, a process of its own, listens where nodes can reach it::

    python -m clfed.deploy.gate FOLDER --listen 0.0.0.0:8000 --superlink 127.0.0.1:9092
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import ssl
import sys
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from clfed.deploy.address import parse_address
from clfed.deploy.keys import SERVER, SERVER_KEY
from clfed.deploy.proxy import LIMIT, FleetProxy, present
from clfed.errors import ClfedError, ConfigError, FederationError, InvalidMessage

logger = logging.getLogger(__name__)

_CONNECTIONS = 800  # at a time; with those to the SuperLink below 1,024, a usual limit of files
_HEAD = 16_384  # bytes of a request's head
_SILENCE = 20  # seconds for a head, and of a connection without a request
_LINES = 60  # log lines a minute


class HastyProtocol(H11Protocol):
    """HTTP/1.1 in which the head of a request has as long as a connection may be silent.

    uvicorn itself waits for ever for the first head, and starts the clock of a later one again at
    every byte.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def data_received(self, data: bytes) -> None:
        """Take in bytes; the clock stops when they complete a head."""
        self.conn.receive_data(data)
        self.handle_events()


class SparingFilter(logging.Filter):
    """Lets so many lines a minute through: strangers must not fill the disk.

    Args:
        lines: How many.
    """

    def __init__(self, lines: int = _LINES) -> None:
        super().__init__()
        self._lines, self._minute, self._count = lines, 0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Decide about one line; the first one of a minute says how many were left out."""
        minute = int(record.created // 60)
        if minute != self._minute:
            if self._count > self._lines:
                record.msg = f"{record.msg} ({self._count - self._lines} lines were left out.)"
            self._minute, self._count = minute, 0
        self._count += 1
        return self._count <= self._lines


def tls_server(proxy: FleetProxy, folder: Path) -> uvicorn.Server:
    """Return an HTTPS server with the certificate of the federation.

    Raises:
        MissingData: The folder has none.
        InvalidMessage: It is damaged, or does not belong to its key.
    """
    config = uvicorn.Config(
        proxy,
        http=HastyProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=_SILENCE,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=_HEAD,
        ssl_certfile=present(folder / SERVER),
        ssl_keyfile=present(folder / SERVER_KEY),
    )
    try:
        config.load()
    except ssl.SSLError as error:
        raise InvalidMessage(
            f"Expected {SERVER} and {SERVER_KEY} in {folder} to be a certificate and its key, got: "
            f"{error}.",
            remedy="Restore the federation folder from a backup.",
        ) from error
    return uvicorn.Server(config)


def listen(address: str) -> socket.socket:
    """Return a socket that listens at ``host:port``; ``0.0.0.0`` and ``[::]`` mean everywhere.

    Raises:
        ConfigError: The address is none.
        FederationError: Another program listens there, or this machine does not have the address.
    """
    host, _, port = address.rpartition(":")
    everywhere = host in ("0.0.0.0", "[::]")
    name, number = parse_address(f"localhost:{port}" if everywhere else address)
    host = host.strip("[]") if everywhere else name
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, number), family=family, dualstack_ipv6=host == "::")
    except OSError as error:
        raise FederationError(
            f"Expected to listen at {address}, got: {error.strerror}.",
            remedy="Choose another address, or end the program that listens there.",
        ) from error
    # Connections inherit it; without it every answer of two parts waits 40 ms for the other end.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def keep(proxy: FleetProxy, server: uvicorn.Server, listener: socket.socket) -> None:
    """Serve until the server is told to stop."""
    async with proxy:
        await server.serve(sockets=[listener])


def main() -> None:
    """Run the gate until it is ended; exits with the code of an error."""
    from clfed.cli import fail

    parser = argparse.ArgumentParser(prog="python -m clfed.deploy.gate")
    parser.add_argument("folder", type=Path, help="of the federation")
    parser.add_argument("--listen", required=True, metavar="HOST:PORT", help="where nodes connect")
    parser.add_argument("--superlink", required=True, metavar="HOST:PORT", help="on this machine")
    parser.add_argument("--limit", type=int, default=LIMIT, help="bytes of one request")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger().handlers[0].addFilter(SparingFilter())
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells every request
    try:
        if args.limit < 1:
            raise ConfigError(f"Expected a limit of at least 1 byte, got {args.limit}.")
        proxy = FleetProxy(args.folder, args.superlink, limit=args.limit)
        server = tls_server(proxy, args.folder)
        listener = listen(args.listen)
    except ClfedError as error:
        fail([error])
    logger.info("The gate of %s listens at %s.", args.folder, args.listen)
    try:
        asyncio.run(keep(proxy, server, listener))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
