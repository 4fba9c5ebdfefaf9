"""The gate lets invited nodes in, to what nodes need, and nobody else."""

import asyncio
import http.server
import json
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from base64 import b64encode
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import httpx
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.error import FlowerError
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.retry.http_retry import _RETRYABLE_STATUS_CODES
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from hypothesis import given, settings
from hypothesis import strategies as st

from clfed import __version__
from clfed.deploy import proxy, signing
from clfed.deploy.gate import SparingFilter, keep, listen, tls_server
from clfed.deploy.keys import issue_server_certificate, make_authority, node_key
from clfed.deploy.layout import SETTINGS_SCHEMA
from clfed.deploy.processes import Child, call, environment, free_port, program
from clfed.errors import ConfigError, FederationError, InvalidMessage, MissingData

PULL, ACTIVATE, DEACTIVATE = (
    f"/v1/fleet/{name}" for name in ["pull-messages", "activate-node", "deactivate-node"]
)


def private(pem):
    return serialization.load_ssh_private_key(pem, None)


def make_federation(folder, names):
    """A federation folder as far as the gate needs it; returns the private key of each node."""
    (folder / "nodes").mkdir(parents=True)
    make_authority(folder, name="herd")
    issue_server_certificate(folder, [])
    content = {"id": "ab" * 16, "embedding": "e" * 64, "name": "birds", "clfed": __version__}
    content |= {"address": "localhost:8000", "schema": SETTINGS_SCHEMA}
    (folder / "federation.json").write_text(json.dumps(content))
    keys = {name: node_key() for name in names}
    for name, (_, public) in keys.items():
        (folder / "nodes" / f"{name}.pub").write_bytes(public)
    return {name: private(pem) for name, (pem, _) in keys.items()}


class Answers(http.server.BaseHTTPRequestHandler):
    """Stands for the SuperLink: notes what comes, and answers with it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (OSError, ValueError):  # the gate went away
            self.close_connection = True

    def chunks(self):
        if "content-length" in self.headers:
            left = int(self.headers["content-length"])
            while left:
                data = self.rfile.read1(min(left, 2**16))
                if not data:
                    raise ValueError("cut")
                left -= len(data)
                yield data
        elif self.headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size + 2)[:-2]
            self.rfile.readline()

    def do_POST(self):
        heard = SimpleNamespace(path=self.path, headers=self.headers, body=bytearray(), whole=False)
        self.server.heard.append(heard)
        for data in self.chunks():
            heard.body += data
        heard.whole = True
        self.server.answer(self, heard)

    def log_message(self, *_):
        pass


def echo(handler, heard):
    handler.send_response(200)
    handler.send_header("content-type", "application/protobuf")
    handler.send_header("content-length", str(len(heard.body)))
    handler.send_header("x-answer", "yes")
    handler.send_header("keep-alive", "timeout=5")
    handler.end_headers()
    handler.wfile.write(heard.body)


class Superlink(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def process_request(self, request, client_address):
        self.open.append(request)
        super().process_request(request, client_address)

    def server_close(self):
        super().server_close()
        for connection in self.open:
            with suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        pass  # a handshake that was broken off


@contextmanager
def superlink(folder, answer=echo, port=0):
    server = Superlink(("127.0.0.1", port), Answers, bind_and_activate=False)
    server.allow_reuse_address = True
    server.server_bind()
    server.server_activate()
    server.heard, server.open, server.answer = [], [], answer
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    server.address = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def gate(folder, upstream, *, limit=proxy.LIMIT, silence=20):
    """A gate in a thread; yields its ``host:port``."""
    app = proxy.FleetProxy(folder, upstream, limit=limit)
    server = tls_server(app, folder)
    server.config.timeout_keep_alive = silence
    listener = listen(f"127.0.0.1:{free_port()}")
    thread = threading.Thread(target=lambda: asyncio.run(keep(app, server, listener)))
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One federation, one SuperLink and one gate for all tests that leave them as they are."""
    folder = tmp_path_factory.mktemp("federation")
    keys = make_federation(folder, ["owl", "fox", "elk"])
    with superlink(folder) as upstream, gate(folder, upstream.address) as address:
        yield SimpleNamespace(folder=folder, keys=keys, upstream=upstream, address=address)


@pytest.fixture(autouse=True)
def nothing_heard(request):
    if "place" in request.fixturenames:
        request.getfixturevalue("place").upstream.heard.clear()


def trust(folder):
    return ssl.create_default_context(cafile=str(folder / "ca.pem"))


def signed(key):
    """The headers that Flower's own code adds to a SuperNode's request."""
    request = httpx.Request("POST", "https://x")
    interceptor = NodeAuthHttpInterceptor(key, key.public_key())
    interceptor.intercept(ProtobufRequestContext("", None, request), lambda context: None)
    return {name: value for name, value in request.headers.items() if name.startswith("flwr-")}


def signed_at(key, moment, signer=None):
    text = moment if isinstance(moment, str) else moment.isoformat()
    signature = (signer or key).sign(text.encode(), ec.ECDSA(hashes.SHA256()))
    return signed(key) | {
        "flwr-timestamp": text,
        "flwr-signature": b64encode(signature).decode(),
    }


def post(place, path, key=None, *, headers=None, address=None, **options):
    with httpx.Client(verify=trust(place.folder), trust_env=False, timeout=20) as client:
        url = f"https://{address or place.address}{path}"
        sent = signed(key or place.keys["owl"]) if headers is None else headers
        return client.post(url, headers=sent, **options)


@contextmanager
def connected(place, address=None):
    host, _, port = (address or place.address).rpartition(":")
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        trust(place.folder).wrap_socket(plain, server_hostname=host) as secured,
    ):
        yield secured


def raw(place, text, *, address=None, key=None):
    """Send a request as it stands, with the headers of a node; return the status."""
    head = "".join(f"{k}: {v}\r\n" for k, v in signed(key or place.keys["owl"]).items())
    with connected(place, address) as stream:
        stream.sendall(f"{text} HTTP/1.1\r\nhost: x\r\n{head}content-length: 0\r\n\r\n".encode())
        return int(stream.recv(4096).split()[1])


def hello(place, key, address=None):
    with httpx.Client(verify=trust(place.folder), trust_env=False) as client:
        answer = client.get(f"https://{address or place.address}/clfed/hello", headers=signed(key))
    return answer.status_code, answer.json()


def test_a_request_of_a_node_passes_and_its_answer_comes_back(place):
    extra = {"x-own": "1", "x-forwarded-for": "9.9.9.9", "forwarded": "for=9.9.9.9", "te": "gzip"}
    extra |= {
        "connection": "keep-alive, x-hop",
        "x-hop": "1",
        "content-type": "application/protobuf",
    }
    headers = signed(place.keys["owl"]) | extra
    answer = post(place, PULL, headers=headers, content=b"\x00\xff" * 9)
    assert answer.status_code == 200 and answer.content == b"\x00\xff" * 9
    assert answer.headers["x-answer"] == "yes"
    assert answer.headers["content-type"] == "application/protobuf"
    assert "keep-alive" not in answer.headers
    (heard,) = place.upstream.heard
    assert heard.path == PULL and heard.body == b"\x00\xff" * 9
    names = [name.lower() for name in heard.headers]
    assert names.count("content-length") == 1 and heard.headers["host"] == place.upstream.address
    for name, value in headers.items():
        kept = name.startswith(("flwr-", "x-own", "content-type"))
        assert (
            (heard.headers[name] == value) if kept else name in ("connection",) or name not in names
        )
    assert "x-hop" not in (heard.headers["connection"] or "")


def test_the_same_connections_serve_many_requests(place):
    with httpx.Client(verify=trust(place.folder), trust_env=False) as client:
        for number in range(20):
            body = b"%d" % number
            headers = signed(place.keys["owl"])
            assert (
                client.post(f"https://{place.address}{PULL}", headers=headers, content=body).content
                == body
            )
    assert len(place.upstream.heard) == 20


@pytest.mark.parametrize("path", [path for _, path in PROTOBUF_REQUEST_TYPES])
def test_of_all_routes_of_flower_those_of_nodes_pass(place, path):
    open_ = path.startswith("/v1/fleet/") and not path.endswith("register-node")
    assert raw(place, f"POST {path}") == (200 if open_ else 404)
    assert [heard.path for heard in place.upstream.heard] == [path] * open_


@pytest.mark.parametrize(
    "text",
    [
        *(f"{method} {PULL}" for method in ["GET", "PUT", "DELETE", "OPTIONS", "post"]),
        *(f"GET {path}" for path in ["/", "/health", "/docs", "/openapi.json"]),
        "OPTIONS *",
        "POST /clfed/hello",
        "GET /clfed/hello/",
        *(
            f"POST {path}"
            for path in [
                "/",
                "/v1/fleet",
                "/v1/fleet/",
                f"{PULL}/",
                f"/{PULL}",
                f"{PULL}?x=1",
                f"{PULL};x",
                f"{PULL}%00",
                f"{PULL}%2f..",
                "/v1/fleet/../control/start-run",
                "/v1/fleet/./pull-messages",
                "/v1/fleet//pull-messages",
                "/v1/fleet/%2e%2e/control/start-run",
                "/v1/fleet/..%2fcontrol%2fstart-run",
                "/v1/fleet/..\\control\\start-run",
                "/v1/fleet/pull-messages/../../control/start-run",
                "/v1/fleet/%70ull-messages",
                "/v1%2ffleet/pull-messages",
                "/V1/FLEET/pull-messages",
                "/v1/fleet/register-node",
                "/v1/fleet/%72egister-node",
                "/x/v1/fleet/pull-messages",
                f"https://127.0.0.1{PULL}",
                "https://127.0.0.1/v1/control/start-run",
            ]
        ),
    ],
)
def test_everything_else_stays_outside(place, text, caplog):
    assert raw(place, text) == 404
    assert place.upstream.heard == []
    (line,) = [
        record.getMessage() for record in caplog.records if record.levelno == logging.WARNING
    ]
    assert "of 127.0.0.1:" in line and "404" in line


pieces = st.sampled_from(
    [
        "/",
        "v1",
        "fleet",
        "control",
        "pull-messages",
        "register-node",
        ".",
        "..",
        "%2e",
        "%2F",
        "-",
        "a",
    ]
)


@given(st.lists(pieces, min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_whatever_passes_means_the_same_to_everybody(place, parts):
    place.upstream.heard.clear()
    path = "/v1/fleet/" + "".join(parts)
    status = raw(place, f"POST {path}")
    segments = unquote(path).split("/")[3:]
    plain = unquote(path) == path and not {"", ".", ".."} & {*segments} and len(segments) == 1
    assert status in (200, 404) and (status == 404 or plain)
    assert [heard.path for heard in place.upstream.heard] == [path] * (status == 200)


def test_a_key_that_is_not_invited_stays_outside_with_a_reason(place):
    stranger = private(node_key()[0])
    for path, status in [(ACTIVATE, 412), (PULL, 401), (DEACTIVATE, 401)]:
        answer = post(place, path, stranger)
        assert answer.status_code == status
        error = FlowerError.from_json(answer.text)
        assert "key of an invited node" in error.message
    assert hello(place, stranger)[0] == 403 and hello(place, stranger)[1]["known"] is False
    assert place.upstream.heard == []


def wrong_claims(key):
    time_now = datetime.now(UTC)
    good = signed(key)
    return {
        "old": signed_at(key, time_now - timedelta(seconds=310)),
        "early": signed_at(key, time_now + timedelta(seconds=30)),
        "no zone": signed_at(key, time_now.replace(tzinfo=None)),
        "first year": signed_at(key, "0001-01-01T00:00:00+14:00"),
        "no time": signed_at(key, "now"),
        "signed by another": signed_at(key, time_now, private(node_key()[0])),
        "of another time": good | {"flwr-timestamp": (time_now - timedelta(seconds=9)).isoformat()},
        "no signature": good | {"flwr-signature": ""},
        "no base64": good | {"flwr-signature": good["flwr-signature"] + "!"},
        "nothing": {},
        **{f"without {name}": {k: v for k, v in good.items() if k != name} for name in good},
    }


@pytest.mark.parametrize("case", wrong_claims(private(node_key()[0])))
def test_a_claim_that_is_not_signed_now_with_the_key_stays_outside(place, case):
    headers = wrong_claims(place.keys["owl"])[case]
    assert post(place, PULL, headers=headers).status_code == 401
    assert post(place, ACTIVATE, headers=headers).status_code == 412
    assert place.upstream.heard == []


def test_the_sentence_about_a_wrong_clock_speaks_of_the_clock(place):
    headers = wrong_claims(place.keys["owl"])["early"]
    detail = post(place, ACTIVATE, headers=headers).json()["detail"]
    assert "clock of 'owl'" in detail and headers["flwr-timestamp"] in detail


def test_a_claim_that_is_made_twice_stays_outside(place):
    """The SuperLink might believe the other one."""
    good, other = signed(place.keys["owl"]), signed(private(node_key()[0]))
    for name in good:
        for values in (other, good):
            before, after = (
                [(name, values[name]), *good.items()],
                [*good.items(), (name, values[name])],
            )
            for headers in (before, after):
                assert post(place, PULL, headers=headers).status_code == 401
    assert place.upstream.heard == []


@given(
    st.dictionaries(
        st.sampled_from(["public-key", "timestamp", "signature"]),
        st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=40),
    )
)
@settings(max_examples=60, deadline=None)
def test_no_claim_upsets_the_gate(place, values):
    headers = signed(place.keys["owl"]) | {
        f"flwr-{k}": v.encode("latin-1") for k, v in values.items()
    }
    assert post(place, PULL, headers=headers).status_code == (401 if values else 200)


def test_keys_come_and_go_while_the_gate_serves(place):
    """Thirty times at once: file systems note times in steps, and no change may be missed."""
    pem, public = node_key()
    path = place.folder / "nodes" / "guest.pub"
    with httpx.Client(verify=trust(place.folder), trust_env=False) as client:
        for _ in range(30):
            for status in (401, 200):
                headers = signed(private(pem))
                assert (
                    client.post(f"https://{place.address}{PULL}", headers=headers).status_code
                    == status
                )
                path.unlink() if status == 200 else path.write_bytes(public)


def test_a_change_in_the_same_step_of_the_clock_is_seen(tmp_path):
    """File systems note times in steps: two changes may leave a folder with the same time."""
    pem, public = node_key()
    keys, time_now = signing.Keys(tmp_path), time.time_ns()

    def asked():
        return keys.check(
            signing.claim([(k.encode(), v.encode()) for k, v in signed(private(pem)).items()])
        )

    os.utime(tmp_path, ns=(time_now, time_now))
    with pytest.raises(signing.Refused):
        asked()
    (tmp_path / "owl.pub").write_bytes(public)
    os.utime(tmp_path, ns=(time_now, time_now))
    assert asked() == "owl"


def test_a_damaged_key_locks_out_nobody_else(place, caplog):
    path = place.folder / "nodes" / "torn.pub"
    path.write_bytes(b"ecdsa-sha2-nistp384 AAAA")
    try:
        assert post(place, PULL).status_code == 200
    finally:
        path.unlink()
    assert any("torn.pub is no public key" in record.getMessage() for record in caplog.records)


def test_without_its_keys_the_gate_asks_to_try_again(tmp_path):
    keys = make_federation(tmp_path, ["owl"])
    place = SimpleNamespace(folder=tmp_path, keys=keys)
    with superlink(tmp_path) as upstream, gate(tmp_path, upstream.address) as address:
        (tmp_path / "nodes").rename(tmp_path / "moved")
        assert post(place, PULL, address=address).status_code == 503
        (tmp_path / "moved").rename(tmp_path / "nodes")
        assert post(place, PULL, address=address).status_code == 200


def test_while_the_superlink_is_down_nodes_are_told_to_try_again(place):
    port = free_port()
    with gate(place.folder, f"127.0.0.1:{port}") as address:
        assert post(place, PULL, address=address).status_code == 503
        for _ in range(2):  # up, down, and up again
            with superlink(place.folder, port=port):
                assert post(place, PULL, address=address).status_code == 200
            assert post(place, PULL, address=address).status_code == 503
    assert 503 in _RETRYABLE_STATUS_CODES


def test_nothing_is_passed_to_a_superlink_of_others(place, tmp_path):
    make_federation(tmp_path, [])
    with superlink(tmp_path) as other, gate(place.folder, other.address) as address:
        assert post(place, PULL, address=address).status_code == 503
        assert other.heard == []


def test_a_proxy_of_this_machine_has_no_part_in_it(place, monkeypatch):
    for name in ("HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with gate(place.folder, place.upstream.address) as address:
        assert post(place, PULL, address=address).status_code == 200


def test_of_two_lengths_the_one_that_counts_is_passed_on(place):
    """RFC 9112, 6.3: a request with both is how one is hidden inside another."""
    head = "".join(f"{k}: {v}\r\n" for k, v in signed(place.keys["owl"]).items())
    head += "content-length: 3\r\ntransfer-encoding: chunked\r\n"
    with connected(place) as stream:
        stream.sendall(f"POST {PULL} HTTP/1.1\r\nhost: x\r\n{head}\r\n".encode())
        stream.sendall(b"5\r\nwhole\r\n0\r\n\r\n")
        stream.recv(100)
    (heard,) = place.upstream.heard
    assert heard.body == b"whole" and "content-length" not in heard.headers


def test_bodies_flow_through_in_both_directions(place):
    """Either end sees the beginning before the other one has sent the end."""
    seen, go_on = threading.Event(), threading.Event()

    def slowly(handler, heard):
        handler.send_response(200)
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"5\r\nbegin\r\n")
        handler.wfile.flush()
        assert go_on.wait(10)
        handler.wfile.write(b"3\r\nend\r\n0\r\n\r\n")

    def body():
        yield b"a" * 100_000
        assert seen.wait(10)
        yield b"z"

    def watch(upstream):
        while not (upstream.heard and len(upstream.heard[0].body) >= 100_000):
            time.sleep(0.01)
        seen.set()

    with (
        superlink(place.folder, slowly) as upstream,
        gate(place.folder, upstream.address) as address,
    ):
        threading.Thread(target=watch, args=(upstream,), daemon=True).start()
        with (
            httpx.Client(verify=trust(place.folder), trust_env=False, timeout=20) as client,
            client.stream(
                "POST",
                f"https://{address}{PULL}",
                headers=signed(place.keys["owl"]),
                content=body(),
            ) as answer,
        ):
            parts = answer.iter_raw()
            assert next(parts) == b"begin"
            go_on.set()
            assert b"".join(parts) == b"end"
        (heard,) = upstream.heard
        assert heard.body == b"a" * 100_000 + b"z"


def test_a_large_body_arrives_as_it_was_sent(place):
    body = bytes(range(256)) * 40_000
    assert post(place, PULL, content=body).content == body


def test_a_part_of_an_answer_does_not_pass_for_the_whole(place):
    def broken(handler, heard):
        handler.send_response(200)
        handler.send_header("content-length", "1000")
        handler.end_headers()
        handler.wfile.write(b"part")
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)

    with (
        superlink(place.folder, broken) as upstream,
        gate(place.folder, upstream.address) as address,
        pytest.raises(httpx.TransportError),
    ):
        post(place, PULL, address=address)


def test_a_body_beyond_the_limit_is_refused(place):
    with gate(place.folder, place.upstream.address, limit=1000) as address:
        assert post(place, PULL, address=address, content=b"x" * 1000).status_code == 200
        for content in (b"x" * 1001, iter([b"x" * 600, b"x" * 600])):
            assert post(place, PULL, address=address, content=content).status_code == 413
    assert [heard.whole for heard in place.upstream.heard].count(True) == 1


def test_a_request_that_is_refused_is_not_read_to_its_end(place):
    with gate(place.folder, place.upstream.address, limit=1000) as address:
        for path, status in [(PULL, b"413"), ("/", b"404")]:
            with connected(place, address) as stream:
                stream.settimeout(3)
                head = "".join(f"{k}: {v}\r\n" for k, v in signed(place.keys["owl"]).items())
                text = f"POST {path} HTTP/1.1\r\nhost: x\r\n{head}content-length: 1001\r\n\r\n"
                stream.sendall(text.encode())
                answer = b"".join(iter(lambda: stream.recv(9999), b""))  # until it closes
                assert answer.split()[1] == status
    assert place.upstream.heard == []


@pytest.mark.parametrize("begin", [b"", b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\n"])
def test_a_head_that_does_not_end_is_not_waited_for(place, begin):
    """Silent from the start, or a few bytes at a time, which is how to hold many connections."""
    with (
        gate(place.folder, place.upstream.address, silence=0.5) as address,
        connected(place, address) as stream,
    ):
        stream.settimeout(0.05)
        stream.sendall(begin)
        start, closed = time.monotonic(), False
        while not closed and time.monotonic() < start + 5:
            try:
                if begin:
                    stream.sendall(b"x: y\r\n")
                closed = stream.recv(10) == b""
            except TimeoutError:
                continue
            except OSError:
                closed = True
        assert closed and 0.3 < time.monotonic() - start < 3


def test_a_head_without_bounds_is_refused(place):
    with connected(place) as stream:
        stream.sendall(b"GET / HTTP/1.1\r\nx: " + b"y" * 40_000)
        assert stream.recv(100).startswith(b"HTTP/1.1 400")


def test_a_body_that_stops_is_not_waited_for(place, monkeypatch):
    monkeypatch.setattr(proxy, "STALL", 0.4)
    head = "".join(f"{k}: {v}\r\n" for k, v in signed(place.keys["owl"]).items())
    with connected(place) as stream:
        stream.sendall(
            f"POST {PULL} HTTP/1.1\r\nhost: x\r\n{head}content-length: 9\r\n\r\nx".encode()
        )
        assert stream.recv(100).startswith(b"HTTP/1.1 408")
    assert not any(heard.whole for heard in place.upstream.heard)
    monkeypatch.undo()
    assert post(place, PULL).status_code == 200


def test_a_superlink_that_says_nothing_is_not_waited_for(place, monkeypatch):
    monkeypatch.setattr(proxy, "STALL", 0.4)
    over = threading.Event()
    with (
        superlink(place.folder, lambda *_: over.wait(10)) as upstream,
        gate(place.folder, upstream.address) as address,
    ):
        start = time.monotonic()
        assert post(place, PULL, address=address).status_code == 503
        assert time.monotonic() - start < 5
        over.set()


def test_a_request_has_an_end_however_steadily_it_comes(place, monkeypatch):
    monkeypatch.setattr(proxy, "LONGEST", 0.4)

    def steadily():
        while True:
            yield b"x"
            time.sleep(0.02)

    with suppress(httpx.WriteError, httpx.ReadError):  # cut off in the middle of its writing
        assert post(place, PULL, content=steadily()).status_code == 408
    assert place.upstream.heard and not any(heard.whole for heard in place.upstream.heard)


@pytest.mark.parametrize(
    "begin", ["content-length: 9\r\n\r\nx", "transfer-encoding: chunked\r\n\r\n1\r\nx\r\n"]
)
def test_a_client_that_leaves_takes_its_request_along(place, begin):
    """Its half is not passed on as the whole."""
    head = "".join(f"{k}: {v}\r\n" for k, v in signed(place.keys["elk"]).items())
    with connected(place) as stream:
        stream.sendall(f"POST {PULL} HTTP/1.1\r\nhost: x\r\n{head}{begin}".encode())
        until(lambda: [heard.body for heard in place.upstream.heard] == [b"x"])
        assert hello(place, place.keys["elk"])[1]["busy_seconds"] == 0
    until(lambda: hello(place, place.keys["elk"])[1]["busy_seconds"] > 0)
    assert not any(heard.whole for heard in place.upstream.heard)


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def test_hello_tells_who_is_there_and_since_when_the_key_is_silent(place):
    key = place.keys["fox"]
    post(place, DEACTIVATE, key)
    status, free = hello(place, key)
    assert status == 200 and free["known"] is True
    assert (free["federation"], free["embedding"]) == ("ab" * 16, "e" * 64)
    assert free["clfed"] == "0.1.0" and free["busy_seconds"] is None and free["peer"] is None
    post(place, PULL, key)
    first = hello(place, key)[1]
    time.sleep(0.1)
    second = hello(place, key)[1]
    assert 0 <= first["busy_seconds"] < second["busy_seconds"] - 0.09 < 5
    assert second["peer"].startswith("127.0.0.1:")
    assert hello(place, place.keys["elk"])[1]["peer"] != second["peer"]
    post(place, DEACTIVATE, key)
    assert hello(place, key)[1]["busy_seconds"] is None


def test_what_is_refused_does_not_make_a_key_busy(place):
    post(place, DEACTIVATE, place.keys["fox"])
    for case in wrong_claims(place.keys["fox"]).values():
        post(place, PULL, headers=case)
    assert hello(place, place.keys["fox"])[1]["busy_seconds"] is None


def test_a_deactivation_that_failed_leaves_the_key_busy(place):
    def refuse(handler, heard):
        handler.send_error(412)

    with (
        superlink(place.folder, refuse) as upstream,
        gate(place.folder, upstream.address) as address,
    ):
        assert post(place, DEACTIVATE, address=address).status_code == 412
        assert hello(place, place.keys["owl"], address)[1]["busy_seconds"] is not None


def test_strangers_cannot_fill_the_log(caplog):
    log = SparingFilter(3)
    seen = []
    for minute, lines in [(10, 5), (11, 1), (12, 4), (12, 1)]:
        for _ in range(lines):
            record = logging.LogRecord("x", 30, "", 1, "said %d", (7,), None)
            record.created = minute * 60.0
            if log.filter(record):
                seen.append((minute, record.getMessage()))
    assert seen == [
        *[(10, "said 7")] * 3,
        (11, "said 7 (2 lines were left out.)"),
        *[(12, "said 7")] * 3,
    ]


@pytest.mark.parametrize(
    "address", ["", "0.0.0.0", "0.0.0.0:0", ":::80", "1.2.3:80", "a b:80", "[::]"]
)
def test_nonsense_is_no_address_to_listen_at(address):
    with pytest.raises(ConfigError):
        listen(address)


def test_listening_everywhere_is_reached_from_here():
    port = free_port()
    with listen(f"0.0.0.0:{port}"), socket.create_connection(("127.0.0.1", port), 5):
        pass


def test_an_address_that_is_taken_or_of_others_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(FederationError, match="Address already in use"):
            listen(f"127.0.0.1:{taken.getsockname()[1]}")
    with pytest.raises(FederationError, match="Cannot assign"):
        listen("192.0.2.1:8000")


BROKEN = {
    "federation.json": [InvalidMessage, b"{", b"[]", b'{"id": "a"}', b"\xff"],
    "ca.pem": [InvalidMessage, b"", b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"],
    "server.pem": [InvalidMessage, b"", b"x"],
    "server.key": [InvalidMessage, b"", b"x"],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_federation_is_told_before_anything_listens(tmp_path, name):
    make_federation(tmp_path, [])
    whole = (tmp_path / name).read_bytes()
    error, *contents = BROKEN[name]

    def start():
        tls_server(proxy.FleetProxy(tmp_path, "127.0.0.1:9"), tmp_path)

    for content in contents:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(error):
            start()
    (tmp_path / name).unlink()
    absent = "a federation at" if name == "federation.json" else name
    with pytest.raises(MissingData, match=absent):
        start()
    (tmp_path / name).write_bytes(whole)
    start()


GATE = [sys.executable, "-m", "clfed.deploy.gate"]


@pytest.mark.parametrize(
    "arguments, code, sentence",
    [
        ([], 10, "Expected a federation at"),
        (["--limit", "0"], 2, "Expected a limit"),
        (["--superlink", "nowhere"], 2, "Expected an address"),
    ],
)
def test_the_program_ends_with_a_sentence_and_a_code(tmp_path, arguments, code, sentence):
    command = [
        *GATE,
        str(tmp_path),
        "--listen",
        "127.0.0.1:1",
        "--superlink",
        "127.0.0.1:2",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and done.stderr.startswith(f"clfed: {sentence}")
    assert "Traceback" not in done.stderr


def test_the_gate_does_without_torch():
    code = "import sys, clfed.deploy.gate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.slow
def test_a_real_supernode_enters_and_a_real_operator_does_not(tmp_path):
    """SuperLink, gate and SuperNodes as processes of their own."""
    fed = tmp_path / "federation"
    make_federation(fed, [])
    inner, outer = free_port(), free_port()
    home = tmp_path / "home"
    home.mkdir()
    root = f'root-certificates = "{fed}/ca.pem"\n'
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "inside"\n[superlink.inside]\naddress = "127.0.0.1:{inner}"\n{root}'
        f'[superlink.outside]\naddress = "127.0.0.1:{outer}"\n{root}'
    )
    env = environment(home)
    flwr = program("flwr")

    def start(name, *command):
        child = Child(command, env, log=tmp_path / f"{name}.log", note=tmp_path / f"{name}.note")
        return stack.enter_context(child)

    def supernode(name):
        return start(
            name,
            program("flower-supernode"),
            *("--superlink", f"127.0.0.1:{outer}", "--root-certificates", f"{fed}/ca.pem"),
            *("--auth-supernode-private-key", f"{tmp_path}/{name}"),
            *("--host", "127.0.0.1", "--port", str(free_port())),
        )

    def answers(port):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with ExitStack() as stack:
        start(
            "superlink",
            *(program("flower-superlink"), "--host", "127.0.0.1", "--port", str(inner)),
            *("--ssl-certfile", f"{fed}/server.pem", "--ssl-keyfile", f"{fed}/server.key"),
            *("--ssl-ca-certfile", f"{fed}/ca.pem", "--enable-supernode-auth"),
            *("--database", f"{tmp_path}/state.db"),
        )
        listen_at = ("--listen", f"127.0.0.1:{outer}", "--superlink", f"127.0.0.1:{inner}")
        start("gate", *GATE, str(fed), *listen_at)
        until(lambda: answers(inner) and answers(outer), 60)
        for name in ("owl", "stranger"):  # the SuperLink knows both, the gate the first alone
            pem, public = node_key()
            (tmp_path / name).write_bytes(pem)
            (tmp_path / f"{name}.pub").write_bytes(public)
            call([flwr, "supernode", "register", f"{tmp_path}/{name}.pub", "inside"], env)
        invited = fed / "nodes" / "owl.pub"
        invited.write_bytes((tmp_path / "owl.pub").read_bytes())

        for command in (["list", "outside"], ["supernode", "list", "outside"]):
            with pytest.raises(FederationError, match="a request that nodes make"):
                call([flwr, *command], env)
        owl, stranger = supernode("owl"), supernode("stranger")
        online = [flwr, "supernode", "list", "inside", "--format", "json"]
        until(lambda: call(online, env).count('"online"') == 1, 60)
        assert stranger.wait(60) not in (None, 0)
        assert "Expected the key of an invited node" in stranger.last_words(30)
        # It goes on asking: at three seconds each, the key is never silent for ten.
        place = SimpleNamespace(folder=fed)
        key = private((tmp_path / "owl").read_bytes())
        time.sleep(4)
        assert hello(place, key, f"127.0.0.1:{outer}")[1]["busy_seconds"] < 4
        invited.unlink()
        assert owl.wait(30) is not None
        log = (tmp_path / "gate.log").read_text()
        assert log.count("/v1/control/") == 2 and "Traceback" not in log


def test_all_of_it_is_in_the_folder(place):
    """Nothing is written but what was there: the gate reads."""
    names = {path.name for path in Path(place.folder).iterdir()}
    assert names == {"nodes", "federation.json", "ca.pem", "ca.key", "server.pem", "server.key"}
