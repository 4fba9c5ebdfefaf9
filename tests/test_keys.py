"""Certificates that strict checkers accept, keys that Flower accepts, files that stay secret."""

import argparse
import os
import shutil
import ssl
import stat
import subprocess
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from hypothesis import given
from hypothesis import strategies as st

from clfed.deploy.certificates import check_authority, hosts_of, read_certificate
from clfed.deploy.keys import (
    days_left,
    issue_server_certificate,
    make_authority,
    node_key,
    public_key_of,
    write_secret,
)
from clfed.errors import (
    ConfigError,
    ExpiredCertificate,
    InvalidMessage,
    MissingData,
    RunFolderError,
)

HOSTS = ["hub.local", "192.168.1.5", "fd00::5"]
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture
def folder(tmp_path):
    make_authority(tmp_path, name="north herd")
    issue_server_certificate(tmp_path, HOSTS)
    return tmp_path


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """As ``folder``, for tests that only read."""
    place = tmp_path_factory.mktemp("federation")
    make_authority(place, name="north herd")
    issue_server_certificate(place, HOSTS)
    return place


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def handshake(folder, host, authority=None):
    """A TLS 1.3 handshake in memory, checked as strictly as OpenSSL can."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.pem", folder / "server.key")
    client = ssl.create_default_context(cafile=authority or folder / "ca.pem")
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert ends[0].version() == "TLSv1.3"


def test_four_files_with_secrets_readable_to_nobody_else(tmp_path):
    before = os.umask(0)
    try:
        make_authority(tmp_path, name="herd")
        issue_server_certificate(tmp_path, HOSTS)
        write_secret(tmp_path / "node.key", b"secret")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert {name for name, mode in modes.items() if mode == 0o600} == {
        "ca.key",
        "server.key",
        "node.key",
    }
    assert modes.keys() == {"ca.key", "ca.pem", "server.key", "server.pem", "node.key"}


@pytest.mark.parametrize("host", [*HOSTS, "localhost", "127.0.0.1"])
def test_openssl_accepts_the_server_under_each_of_its_addresses(shared, host):
    handshake(shared, host)


@pytest.mark.parametrize("host", ["hub.lan", "x.hub.local", "192.168.1.6", "::1"])
def test_openssl_refuses_it_under_others(shared, host):
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(shared, host)


def test_openssl_refuses_an_authority_of_the_same_name(shared, tmp_path):
    make_authority(tmp_path, name="north herd")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(shared, "hub.local", authority=tmp_path / "ca.pem")


def test_another_implementation_of_the_rules_agrees(shared):
    store = Store([x509.load_pem_x509_certificate((shared / "ca.pem").read_bytes())])
    server = x509.load_pem_x509_certificate((shared / "server.pem").read_bytes())
    policy = PolicyBuilder().store(store)
    assert policy.build_server_verifier(x509.DNSName("hub.local")).verify(server, [])
    with pytest.raises(VerificationError):
        policy.build_server_verifier(x509.DNSName("hub.lan")).verify(server, [])


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl command")
def test_openssl_command_accepts_the_chain(shared):
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_ip"]
    command += ["192.168.1.5", "-CAfile", "ca.pem", "server.pem"]
    done = subprocess.run(command, cwd=shared, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_addresses_are_typed_and_come_once(tmp_path):
    make_authority(tmp_path, name="herd")
    issue_server_certificate(tmp_path, ["127.0.0.1", "HUB.local", "hub.local", "FD00:0::5"])
    server = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["hub.local", "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "fd00::5"]
    assert hosts_of(server) == ["127.0.0.1", "hub.local", "fd00::5", "localhost"]


def test_flower_reads_both_keys_as_the_same_one(tmp_path):
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    private, public = node_key()
    (tmp_path / "node").write_bytes(private)
    (tmp_path / "node.pub").write_bytes(public)
    namespace = argparse.Namespace(
        auth_supernode_private_key=str(tmp_path / "node"), auth_supernode_public_key=None
    )
    _, derived = _try_setup_client_authentication(namespace)
    assert try_load_public_key(tmp_path / "node.pub") == public_key_to_bytes(derived)


def test_public_key_follows_from_the_private_one():
    (private, public), (other, _) = node_key(), node_key()
    assert private.startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----\n")
    assert public.startswith(b"ecdsa-sha2-nistp384 ")
    assert public_key_of(private) == public != public_key_of(other)


def openssh(key):
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


@pytest.mark.parametrize(
    "private",
    [
        b"",
        b"\xff\x00",
        node_key()[0][:-60],
        node_key()[1],
        openssh(ed25519.Ed25519PrivateKey.generate()),
        openssh(rsa.generate_private_key(65537, 2048)),
        ec.generate_private_key(ec.SECP384R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    ],
    ids=["empty", "bytes", "cut", "public", "ed25519", "rsa", "pkcs8"],
)
def test_no_other_key_is_a_node_key(private):
    with pytest.raises(InvalidMessage, match="Expected a node's private key"):
        public_key_of(private)


@given(st.integers(0, 500), st.integers(1, 255))
def test_damage_to_a_node_key_ends_in_one_sentence_if_it_is_seen(place, flip):
    private = bytearray(PRIVATE)
    private[place % len(private)] ^= flip
    try:
        public_key_of(bytes(private))
    except InvalidMessage as error:
        assert "Expected a node's private key" in str(error)


PRIVATE, _ = node_key()


@pytest.mark.parametrize("name", ["ca.key", "ca.pem", "server.key", "server.pem"])
def test_no_file_is_overwritten(tmp_path, name):
    if name.startswith("server"):
        make_authority(tmp_path, name="herd")
    (tmp_path / name).write_bytes(b"precious")
    before = contents(tmp_path)
    with pytest.raises(RunFolderError, match=name):
        if name.startswith("server"):
            issue_server_certificate(tmp_path, HOSTS)
        else:
            make_authority(tmp_path, name="herd")
    assert contents(tmp_path) == before


def test_a_secret_is_written_once(tmp_path):
    write_secret(tmp_path / "a", b"1")
    with pytest.raises(RunFolderError, match="exists"):
        write_secret(tmp_path / "a", b"2")
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match="exists"):
        write_secret(tmp_path / "dangling", b"2")
    with pytest.raises(RunFolderError, match="expected to write"):
        write_secret(tmp_path / "missing" / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1" and not (tmp_path / "elsewhere").exists()


def test_renewal_keeps_the_key_and_takes_new_addresses(folder):
    before = contents(folder)
    issue_server_certificate(folder, ["10.0.0.9"], renew=True)
    after = contents(folder)
    assert {name for name in after if after[name] != before[name]} == {"server.pem"}
    handshake(folder, "10.0.0.9")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(folder, "hub.local")


def test_renewal_needs_a_key_to_keep(folder):
    (folder / "server.key").unlink()
    before = contents(folder)
    with pytest.raises(MissingData, match=r"server\.key"):
        issue_server_certificate(folder, HOSTS, renew=True)
    assert contents(folder) == before


def test_days_left_counts_down_to_the_end_and_beyond(folder):
    for name, days in [("ca.pem", 3650), ("server.pem", 825)]:
        assert days - 0.01 < days_left((folder / name).read_bytes()) <= days
    issue_server_certificate(
        folder, [], days=1, now=datetime.now(UTC) - timedelta(hours=6), renew=True
    )
    assert 0.74 < days_left((folder / "server.pem").read_bytes()) <= 0.75


def test_a_clock_that_is_hours_slow_accepts_a_new_certificate(shared):
    for name in ["ca.pem", "server.pem"]:
        certificate = read_certificate((shared / name).read_bytes(), name)
        assert certificate.not_valid_before_utc < datetime.now(UTC) - timedelta(hours=12)


def test_a_certificate_does_not_outlive_its_authority(tmp_path):
    make_authority(tmp_path, name="herd", days=10)
    issue_server_certificate(tmp_path, HOSTS, days=825)
    ends = [
        read_certificate((tmp_path / name).read_bytes(), name).not_valid_after_utc
        for name in ["ca.pem", "server.pem"]
    ]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("offset", [timedelta(days=11), timedelta(days=-2)])
def test_an_authority_issues_nothing_outside_its_time(tmp_path, offset):
    make_authority(tmp_path, name="herd", days=10, now=LONG_AGO)
    before = contents(tmp_path)
    with pytest.raises(ExpiredCertificate, match=r"2019-12-31 to 2020-01-11"):
        issue_server_certificate(tmp_path, HOSTS, now=LONG_AGO + offset)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["ca.key", "ca.pem"])
def test_an_authority_in_parts_issues_nothing(tmp_path, name):
    other = tmp_path / "other"
    other.mkdir()
    make_authority(tmp_path, name="herd")
    make_authority(other, name="herd")
    with pytest.raises(MissingData, match=name):
        (other / name).rename(other / "away")
        issue_server_certificate(other, HOSTS)
    for damaged in [b"", b"\x00\xff", (tmp_path / name).read_bytes()[:-40]]:
        (other / name).write_bytes(damaged)
        with pytest.raises(InvalidMessage, match=name):
            issue_server_certificate(other, HOSTS)
    (other / name).write_bytes((tmp_path / name).read_bytes())
    with pytest.raises(InvalidMessage, match="two different authorities"):
        issue_server_certificate(other, HOSTS)
    assert not (other / "server.key").exists()


@pytest.mark.parametrize("days", [0, -1, 36_501, 1.5, True, None])
def test_days_are_a_number_of_days(tmp_path, days):
    with pytest.raises(ConfigError, match="days"):
        make_authority(tmp_path, name="herd", days=days)
    assert not contents(tmp_path)


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 65, "ж" * 33])
def test_a_federation_has_a_readable_name(tmp_path, name):
    with pytest.raises(ConfigError, match="name"):
        make_authority(tmp_path, name=name)
    assert not contents(tmp_path)


@pytest.mark.parametrize("hosts", ["hub.local", [""], ["*.local"], ["a b"], ["0.0.0.0"], ["x:1"]])
def test_hosts_are_hosts(tmp_path, hosts):
    make_authority(tmp_path, name="herd")
    before = contents(tmp_path)
    with pytest.raises(ConfigError):
        issue_server_certificate(tmp_path, hosts)
    assert contents(tmp_path) == before


def test_only_one_self_signed_authority_is_one(shared, tmp_path):
    authority, server = ((shared / name).read_bytes() for name in ["ca.pem", "server.pem"])
    assert check_authority(authority).subject.rfc4514_string() == "CN=north herd"
    middle = len(authority) // 2
    changed = authority[:middle] + bytes([authority[middle] ^ 1]) + authority[middle + 1 :]
    for bad in [b"", b"\xff", server, authority + server, authority + authority, changed]:
        with pytest.raises(InvalidMessage):
            check_authority(bad)
