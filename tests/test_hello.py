"""A node learns why its server will not take it in, in one sentence and within bounds."""

import json
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gate import DEACTIVATE, PULL, Answers, gate, make_federation, post, private, superlink

from clfed import __version__
from clfed.deploy import hello, signing
from clfed.deploy.hello import say_hello
from clfed.deploy.invitation import Invitation
from clfed.deploy.keys import node_key
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


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation")
    make_federation(folder, [])
    pem, public = node_key()
    (folder / "nodes" / "owl.pub").write_bytes(public)
    with superlink(folder) as upstream, gate(folder, upstream.address) as address:
        keys = {"owl": private(pem)}
        yield SimpleNamespace(folder=folder, keys=keys, pem=pem, upstream=upstream, address=address)


@pytest.fixture(autouse=True)
def free_key(place):
    post(place, DEACTIVATE)


def invitation(place, **changes):
    content = {
        "federation": "ab" * 16,
        "name": "owl",
        "address": place.address,
        "authority": (place.folder / "ca.pem").read_text(),
        "key": place.pem.decode(),
        "embedding": "e" * 64,
    }
    return Invitation(**(content | changes))


@pytest.fixture(scope="module")
def owl(place):
    return invitation(place)


GOOD = {
    "clfed": __version__,
    "federation": "ab" * 16,
    "embedding": "e" * 64,
    "known": True,
    "busy_seconds": None,
    "peer": None,
}


@contextmanager
def answering(place, *answers):
    """A server with the certificate of the federation that gives these answers, the last for ever.

    An answer is a status and a body; or a function of the connection.
    """
    left = list(answers)

    def get(handler):
        answer = left.pop(0) if len(left) > 1 else left[0]
        if callable(answer):
            answer(handler)
            return
        status, body = answer
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    with superlink(place.folder) as server:
        server.RequestHandlerClass = type("Hello", (Answers,), {"do_GET": get})
        yield server.address


def test_an_invited_node_is_welcome(place):
    say_hello(invitation(place), wait=10)
    assert place.upstream.heard[-1].path == DEACTIVATE  # hello itself goes no further than the gate


def test_a_proxy_of_this_machine_has_no_part_in_it(place, monkeypatch):
    for name in ("HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    say_hello(invitation(place), wait=5)


def test_a_node_that_left_as_it_should_may_come_back_at_once(place):
    post(place, PULL)
    post(place, DEACTIVATE)
    start = time.monotonic()
    say_hello(invitation(place), wait=10)
    assert time.monotonic() - start < 3


def test_an_unknown_key(place):
    other = invitation(place, key=node_key()[0].decode())
    with pytest.raises(UnknownNode, match=f"at {place.address} to know the key of 'owl'"):
        say_hello(other, wait=10)


def test_a_key_that_was_revoked(place):
    path = place.folder / "nodes" / "owl.pub"
    public = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(UnknownNode):
            say_hello(invitation(place), wait=10)
    finally:
        path.write_bytes(public)
    say_hello(invitation(place), wait=10)


def test_another_embedding(place):
    with pytest.raises(EmbeddingMismatch, match=r"'dddd.*got 'eeee"):
        say_hello(invitation(place, embedding="d" * 64), wait=10)


def test_another_federation_under_the_same_authority(place):
    with pytest.raises(UntrustedServer, match="Expected federation cdcdcdcd"):
        say_hello(invitation(place, federation="cd" * 16), wait=10)


def test_another_authority(place, tmp_path):
    make_federation(tmp_path / "other", [])
    other = invitation(place, authority=(tmp_path / "other" / "ca.pem").read_text())
    with pytest.raises(UntrustedServer, match="that 'herd' issued"):
        say_hello(other, wait=10)


def test_another_version_of_clfed(place, monkeypatch):
    monkeypatch.setattr(hello, "__version__", "9.9.9")
    with pytest.raises(VersionMismatch, match=f"clfed 9.9.9.*got clfed '{__version__}'"):
        say_hello(invitation(place), wait=10)


@pytest.mark.parametrize("seconds", [-400, 60])
def test_a_clock_that_is_wrong(place, monkeypatch, seconds):
    true = signing.signed

    def wrong(key):
        moment = datetime.now(UTC) + timedelta(seconds=seconds)
        monkeypatch.setattr(signing, "now", lambda: moment)
        try:
            return true(key)
        finally:
            monkeypatch.setattr(signing, "now", lambda: datetime.now(UTC))

    monkeypatch.setattr(signing, "signed", wrong)
    with pytest.raises(
        ExpiredCertificate, match="clock that agrees with that of the server"
    ) as told:
        say_hello(invitation(place), wait=10)
    assert f"says '{datetime.now(UTC):%Y-%m-%d}" in str(told.value)
    assert told.value.remedy.startswith("Set this machine's clock")


def test_somebody_else_is_connected_with_the_key(place):
    body = GOOD | {"busy_seconds": 1.2, "peer": "10.0.0.9:5"}
    with answering(place, (200, body)) as address:
        start = time.monotonic()
        with pytest.raises(KeyInUse, match=r"as 'owl', got a request from '10.0.0.9:5' 1 s ago"):
            say_hello(invitation(place, address=address), wait=5, patience=0.5)
        assert 0.4 < time.monotonic() - start < 4


def test_a_real_request_makes_the_key_busy(place):
    post(place, PULL)
    with pytest.raises(KeyInUse, match=r"from '127.0.0.1:\d+' 0 s ago"):
        say_hello(invitation(place), wait=5, patience=0.3)


def test_a_node_that_was_killed_falls_silent(place, monkeypatch):
    """It may come back when nobody has used the key for as long as no living node is silent."""
    monkeypatch.setattr(hello, "QUIET", 0.6)
    post(place, PULL)
    start = time.monotonic()
    say_hello(invitation(place), wait=5, patience=5)
    assert 0.4 < time.monotonic() - start < 3


def test_living_nodes_are_never_silent_for_so_long():
    """SuperNodes ask every three seconds; two requests may get lost."""
    assert hello.QUIET > 3 * 3


@pytest.mark.parametrize("busy", [-1, "1", True, float("nan"), [], {}])
def test_seconds_that_are_none(place, busy):
    with (
        answering(place, (200, GOOD | {"busy_seconds": busy})) as address,
        pytest.raises(InvalidMessage, match="Expected seconds"),
    ):
        say_hello(invitation(place, address=address), wait=5)


@pytest.mark.parametrize(
    "status, body",
    [
        (200, b""),
        (200, b"null"),
        (200, b"[" * 60_000),
        (200, b"\xff"),
        (200, b"x" * 200_000),
        (200, {"clfed": __version__}),
        (404, {"detail": "Not Found"}),  # a SuperLink without a gate
        (302, b""),
        (418, GOOD),
        (403, {"detail": "Forbidden"}),  # somebody's firewall
    ],
)
def test_something_else_answers(place, status, body):
    with (
        answering(place, (status, body)) as address,
        pytest.raises(InvalidMessage, match=rf"gate of clfed at {address}.*status {status}"),
    ):
        say_hello(invitation(place, address=address), wait=5)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


@given(
    st.dictionaries(st.sampled_from([*GOOD]), json_values, max_size=6),
    st.sampled_from([200, 401, 403]),
)
@settings(max_examples=300, deadline=None)
def test_no_answer_upsets_the_node(owl, changes, status):
    """Each is taken for what it is or refused with one of the documented errors."""
    body = json.dumps(GOOD | changes).encode()
    accepted = status == 200
    try:
        answer = hello._checked(owl, status, body)
        hello._seconds_since_use(owl, answer)
    except (InvalidMessage, VersionMismatch, UntrustedServer, EmbeddingMismatch):
        assert accepted
    except (UnknownNode, ExpiredCertificate):
        assert not accepted
    else:
        assert accepted and all(answer[k] == GOOD[k] for k in ["clfed", "federation", "embedding"])


def test_a_gate_that_is_still_starting_is_waited_for(place):
    answers = [(503, b""), (502, {}), (200, GOOD)]
    with answering(place, *answers) as address:
        say_hello(invitation(place, address=address), wait=10)


def silent(handler):
    time.sleep(3)


def closing(handler):
    handler.close_connection = True


def trickling(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for _ in range(60):
        handler.wfile.write(b"x: y\r\n")
        time.sleep(0.05)


def test_an_answer_without_end_is_not_read_to_its_end(place):
    def endless(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(1000):
            handler.wfile.write(b"1000\r\n" + b"x" * 4096 + b"\r\n")
            time.sleep(0.01)

    with answering(place, endless) as address, pytest.raises(InvalidMessage):
        say_hello(invitation(place, address=address), wait=3)


@pytest.mark.parametrize(
    "answer, reason",
    [
        ((503, b""), "status 503"),
        (silent, "did not answer"),
        (closing, "disconnected"),
        (trickling, "did not answer"),
    ],
)
def test_who_never_answers_is_waited_for_no_longer_than_said(place, answer, reason):
    with answering(place, answer) as address:
        start = time.monotonic()
        with pytest.raises(Unreachable, match=reason):
            say_hello(invitation(place, address=address), wait=1)
        assert time.monotonic() - start < 4
