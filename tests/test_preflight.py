"""What a node is told about a server that it cannot reach or must not trust."""

import socket
import ssl
import threading
import time
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta

import pytest

from clfed.deploy.keys import issue_server_certificate, make_authority
from clfed.deploy.preflight import check_server
from clfed.errors import (
    ConfigError,
    ExpiredCertificate,
    InvalidMessage,
    Unreachable,
    UntrustedServer,
)

NOW = datetime.now(UTC)


def federation(folder, *, hosts=(), authority_days=3650, **period):
    folder.mkdir()
    issued = period.get("now", NOW)
    make_authority(folder, name=f"herd {folder.name}", days=authority_days, now=issued)
    issue_server_certificate(folder, hosts, **period)
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("federations")
    ago, ahead = NOW - timedelta(days=30), NOW + timedelta(days=30)
    good = federation(root / "good", hosts=["hub.local", "192.168.1.5"])
    federation(root / "other")
    federation(root / "expired", days=20, now=ago)
    federation(root / "early", now=ahead)
    federation(root / "outlived", authority_days=20, now=ago)
    issue_server_certificate(federation(root / "premature"), [], days=1, now=ahead, renew=True)
    # The same authority, and a server that it never named 127.0.0.1: an address that has moved.
    moved = root / "moved"
    moved.mkdir()
    for name in ["ca.pem", "server.key"]:
        (moved / name).write_bytes((good / name).read_bytes())
    (moved / "server.pem").write_bytes(without_local_addresses(good))
    return root


def without_local_addresses(folder):
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    from clfed.deploy.certificates import server_certificate

    authority, key, server = (
        (folder / name).read_bytes() for name in ["ca.pem", "ca.key", "server.pem"]
    )
    return server_certificate(
        x509.load_pem_x509_certificate(server).public_key(),
        ["hub.local", "192.168.1.5"],
        x509.load_pem_x509_certificate(authority),
        load_pem_private_key(key, None),
        NOW,
        NOW + timedelta(days=825),
    )


@contextmanager
def serving(answer, *, host="127.0.0.1", delay=0.0):
    """A server on loopback that hands every connection to ``answer``; yields its address.

    Until ``delay`` seconds have passed the port refuses connections.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    over = threading.Event()
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.settimeout(0.02)

        def loop():
            over.wait(delay)
            listener.listen()
            while not over.is_set():
                with suppress(OSError):
                    connection, _ = listener.accept()
                    with connection:
                        connection.settimeout(3)
                        answer(connection)

        thread = threading.Thread(target=loop)
        thread.start()
        port = listener.getsockname()[1]
        try:
            yield f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        finally:
            over.set()
            thread.join()


def tls(folder):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")

    def answer(connection):
        with context.wrap_socket(connection, server_side=True) as secured:
            secured.recv(1)  # until the client closes

    return answer


def plain_http(connection):
    connection.recv(4096)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def other_protocol(connection):
    connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
    connection.recv(4096)


def silent(connection):
    while connection.recv(4096):  # until the client gives up
        pass


def slow(connection):
    # A TLS record that announces 16 kB and comes byte by byte.
    for byte in b"\x16\x03\x03\x40\x00" + b"\x02\x00" * 20:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


def closing(connection):
    connection.recv(4096)


def authority(folder):
    return (folder / "ca.pem").read_bytes()


def minute(moment):
    return f"{moment:%Y-%m-%d %H:%M}"


def test_days_left_of_a_server_that_is_trusted(places):
    with serving(tls(places / "good")) as address:
        assert 824.9 < check_server(address, authority(places / "good"), wait=5) <= 825


def test_a_name_is_as_good_as_a_number(places):
    with serving(tls(places / "good")) as address:
        name = address.replace("127.0.0.1", "localhost")
        assert check_server(name, authority(places / "good"), wait=5) > 800


def test_ipv6(tmp_path):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    folder = federation(tmp_path / "six", hosts=["::1"])
    with serving(tls(folder), host="::1") as address:
        assert check_server(address, authority(folder), wait=5) > 800


def test_a_server_that_is_still_starting_is_waited_for(places):
    with serving(tls(places / "good"), delay=0.4) as address:
        start = time.monotonic()
        assert check_server(address, authority(places / "good"), wait=10) > 800
        assert 0.3 < time.monotonic() - start < 5


def test_a_connection_that_breaks_is_tried_again(places):
    first = [True]

    def answer(connection):
        if first.pop() if first else False:
            return closing(connection)
        return tls(places / "good")(connection)

    with serving(answer) as address:
        assert check_server(address, authority(places / "good"), wait=10) > 800
    assert not first


@pytest.mark.parametrize(
    "answer, reason",
    [
        (silent, "it accepted the connection and did not answer"),
        (slow, "it accepted the connection and did not answer"),
        (closing, "it closed the connection"),
    ],
)
def test_a_server_that_never_answers_is_waited_for_no_longer_than_said(places, answer, reason):
    with serving(answer) as address:
        start = time.monotonic()
        with pytest.raises(Unreachable) as caught:
            check_server(address, authority(places / "good"), wait=0.6)
        assert time.monotonic() - start < 3
    assert str(caught.value) == (
        f"Expected a clfed server at {address} within 0.6 s, got none: {reason}."
    )


def test_nobody_listens(places):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(Unreachable, match=f"{address} within 0.6 s.*Connection refused"):
            check_server(address, authority(places / "good"), wait=0.6)
        assert time.monotonic() - start < 3


def test_a_name_that_nobody_knows(places, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(Unreachable, match="Name or service not known"):
        check_server("hub.invalid:80", authority(places / "good"), wait=0.1)


def test_the_second_address_of_a_name_is_tried(places, monkeypatch):
    resolved = socket.getaddrinfo
    with socket.socket() as taken, serving(tls(places / "good")) as address:
        taken.bind(("127.0.0.1", 0))
        dead = taken.getsockname()[1]

        def two(host, port, **kind):
            return [*resolved("127.0.0.1", dead, **kind), *resolved("127.0.0.1", port, **kind)]

        monkeypatch.setattr(socket, "getaddrinfo", two)
        assert check_server(address, authority(places / "good"), wait=5) > 800


def test_a_server_of_another_authority(places):
    with serving(tls(places / "other")) as address, pytest.raises(UntrustedServer) as caught:
        check_server(address, authority(places / "good"), wait=5)
    assert f"at {address} a certificate that 'herd good' issued" in str(caught.value)
    assert "got one of 'herd other'" in str(caught.value)


def test_a_server_under_an_address_that_it_does_not_have(places):
    with serving(tls(places / "moved")) as address, pytest.raises(UntrustedServer) as caught:
        check_server(address, authority(places / "good"), wait=5)
    assert str(caught.value) == (
        f"Expected at {address} a certificate for 127.0.0.1, got one for hub.local, 192.168.1.5."
    )
    with (
        serving(tls(places / "moved")) as address,
        pytest.raises(UntrustedServer, match=r"for localhost, got one for hub\.local"),
    ):
        port = address.rpartition(":")[2]
        check_server(f"localhost:{port}", authority(places / "good"), wait=5)


# A certificate is good from the day before its issue.
@pytest.mark.parametrize("name, first, last", [("expired", -31, -10), ("premature", 29, 31)])
def test_a_certificate_outside_its_time(places, name, first, last):
    with serving(tls(places / name)) as address, pytest.raises(ExpiredCertificate) as caught:
        check_server(address, authority(places / name), wait=5)
    start, end = NOW + timedelta(days=first), NOW + timedelta(days=last)
    assert f"got one for {minute(start)} to {minute(end)} UTC." in str(caught.value)
    assert f"Expected the server at {address}" in str(caught.value)
    assert f"{datetime.now(UTC):%Y-%m-%d}" in str(caught.value)


@pytest.mark.parametrize("name, first, last", [("early", 29, 3680), ("outlived", -31, -10)])
def test_an_authority_outside_its_time(places, name, first, last):
    with serving(tls(places / name)) as address, pytest.raises(ExpiredCertificate) as caught:
        check_server(address, authority(places / name), wait=5)
    start, end = NOW + timedelta(days=first), NOW + timedelta(days=last)
    assert f"Expected the authority of the server at {address}" in str(caught.value)
    assert f"got one for {minute(start)} to {minute(end)} UTC." in str(caught.value)


@pytest.mark.parametrize(
    "answer, got",
    [(plain_http, r"got plain HTTP\."), (other_protocol, r"got something else \(\w+\)\.")],
)
def test_a_server_without_tls(places, answer, got):
    with (
        serving(answer) as address,
        pytest.raises(UntrustedServer, match=rf"a server at {address} that speaks TLS, {got}"),
    ):
        check_server(address, authority(places / "good"), wait=5)


def test_a_refusal_can_be_explained_without_a_second_look(places):
    """The server goes away after the first handshake: the sentence only says less."""
    calls = []

    def once(connection):
        calls.append(1)
        if len(calls) == 1:
            tls(places / "other")(connection)

    with (
        serving(once) as address,
        pytest.raises(UntrustedServer, match="got one of 'another authority'"),
    ):
        check_server(address, authority(places / "good"), wait=5)


@pytest.mark.parametrize("wait", [0, -1, float("nan"), float("inf")])
def test_a_wait_is_a_positive_number(places, wait):
    with pytest.raises(ConfigError, match="wait"):
        check_server("127.0.0.1:80", authority(places / "good"), wait=wait)


def test_address_and_authority_are_checked_before_anything_is_sent(places, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", None)
    with pytest.raises(ConfigError):
        check_server("127.0.0.1", authority(places / "good"))
    with pytest.raises(InvalidMessage):
        check_server("127.0.0.1:80", b"-----BEGIN CERTIFICATE-----")
