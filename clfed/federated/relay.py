"""From a message's own process to the node's long-lived one, which has everything loaded.

The long-lived process listens on a port of this machine alone and writes port and a random token
into ``agent.json`` in the node's state directory, which only its owner can read. A request is the
token, the action and the records of the message; the reply is records, or the error that the
handler raised.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from flwr.app import RecordDict

from clfed.errors import ClfedError, FederationError
from clfed.federated.frames import pack_records, unpack_records
from clfed.files import write_file

logger = logging.getLogger(__name__)
AGENT = "agent.json"
PATIENCE = 600.0  # seconds that one answer may take, such as the embedding of many new pictures
_HEAD = struct.Struct(">32s16sQ")  # token, action, bytes that follow
_REPLY = struct.Struct(">BQ")  # whether it is an error, bytes that follow
Handler = Callable[[str, RecordDict], RecordDict]


def ask(action: str, content: RecordDict, node_config: Mapping[str, object]) -> RecordDict | None:
    """Let the node's long-lived process answer, ``None`` where there is none.

    Raises:
        FederationError: It answered with an error, or not within ten minutes.
    """
    directory = node_config.get("state-dir")
    if directory is None:
        return None
    try:
        agent = json.loads((Path(str(directory)) / AGENT).read_text())
        # A process that was killed leaves its file behind, but nobody listens any more.
        connection = socket.create_connection(("127.0.0.1", agent["port"]), timeout=5)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    with connection:
        connection.settimeout(PATIENCE)
        try:
            body = pack_records(content)
            head = _HEAD.pack(bytes.fromhex(agent["token"]), action.encode(), len(body))
            connection.sendall(head + body)
            failed, length = _REPLY.unpack(_read(connection, _REPLY.size))
            reply = _read(connection, length)
        except (OSError, EOFError) as error:
            raise FederationError(
                f"The node's own process did not answer: {error or type(error).__name__}."
            ) from error
    if failed:
        raise FederationError(reply.decode())
    return unpack_records(reply)


class Agent:
    """The long-lived side: answers one request after the other.

    Args:
        directory: The node's state directory.
        handle: From action and records to the records of the reply.

    Attributes:
        failure: The last error that a request ended with; None after one that went well.
    """

    def __init__(self, directory: Path, handle: Handler) -> None:
        self._handle = handle
        self._token = secrets.token_bytes(32)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.failure: ClfedError | None = None
        port = self._server.getsockname()[1]
        record = json.dumps({"port": port, "token": self._token.hex()}).encode()
        self._path = directory / AGENT
        write_file(self._path, record, mode=0o600)
        self._thread = threading.Thread(target=self._serve, name="clfed-agent", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._path.unlink(missing_ok=True)
        # Closing alone would not wake a thread that waits for a connection.
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(PATIENCE)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            with connection:
                connection.settimeout(PATIENCE)
                try:
                    self._answer(connection)
                except (OSError, EOFError):  # the process at the other end was killed
                    continue

    def _answer(self, connection: socket.socket) -> None:
        token, action, length = _HEAD.unpack(_read(connection, _HEAD.size))
        if not hmac.compare_digest(token, self._token):
            return
        content = unpack_records(_read(connection, length))
        try:
            reply, failed = pack_records(self._handle(action.rstrip(b"\0").decode(), content)), 0
            self.failure = None
        except ClfedError as error:
            reply, failed = str(error).encode(), 1
            self.failure = error
        except Exception as error:  # a mistake of ours must not end the thread that answers
            logger.exception("The request %s failed.", action)
            reply, failed = f"{type(error).__name__}: {error}".encode(), 1
        connection.sendall(_REPLY.pack(failed, len(reply)) + reply)


def _read(connection: socket.socket, length: int) -> bytes:
    buffer = bytearray()
    while len(buffer) < length:
        part = connection.recv(min(length - len(buffer), 1 << 20))
        if not part:
            raise EOFError("the connection was closed")
        buffer += part
    return bytes(buffer)
