"""An invitation comes back as it was made, or not at all."""

import hashlib
import ipaddress
import json
import stat
from contextlib import suppress
from dataclasses import FrozenInstanceError, asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clfed import __version__
from clfed.deploy.address import parse_address
from clfed.deploy.invitation import Invitation
from clfed.deploy.keys import issue_server_certificate, make_authority, node_key
from clfed.errors import (
    ClfedError,
    ConfigError,
    InvalidMessage,
    MissingData,
    RunFolderError,
    VersionMismatch,
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation")
    make_authority(folder, name="herd")
    issue_server_certificate(folder, [])
    return folder


@pytest.fixture(scope="module")
def invitation(authority):
    return Invitation(
        federation="0123456789abcdef" * 2,
        name="северный узел 1",
        address="hub.local:8000",
        authority=(authority / "ca.pem").read_text(),
        key=node_key()[0].decode(),
        embedding="ab" * 32,
    )


@pytest.fixture(scope="module")
def saved(invitation, tmp_path_factory):
    path = tmp_path_factory.mktemp("invitations") / "node"
    invitation.save(path)
    return path.read_bytes()


def forged(content):
    """The file of somebody who knows how the digest is made."""
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps(content | {"digest": digest}, indent=1, sort_keys=True) + "\n").encode()


def test_comes_back_whole_from_a_file_of_its_owner(invitation, tmp_path):
    path = tmp_path / "node"
    invitation.save(path)
    assert Invitation.read(path) == invitation
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [*tmp_path.iterdir()] == [path]


def test_the_same_content_has_the_same_bytes(invitation, saved):
    assert saved == forged(asdict(invitation))
    assert saved.isascii()


def test_an_existing_file_stays(invitation, tmp_path):
    (tmp_path / "node").write_text("precious")
    with pytest.raises(RunFolderError, match="node"):
        invitation.save(tmp_path / "node")
    assert (tmp_path / "node").read_text() == "precious"


def test_cannot_be_changed_and_does_not_show_the_key(invitation):
    with pytest.raises(FrozenInstanceError):
        invitation.name = "x"
    assert "PRIVATE KEY" in invitation.key and "PRIVATE KEY" not in repr(invitation)


def test_version_is_checked_on_demand(invitation, tmp_path):
    invitation.check_version()
    old = replace(invitation, clfed="0.0.9")
    old.save(tmp_path / "node")
    with pytest.raises(VersionMismatch, match=f"clfed 0.0.9.*got {__version__}"):
        Invitation.read(tmp_path / "node").check_version()


@pytest.mark.parametrize("name", ["missing", "."])
def test_no_file_is_missing_data(tmp_path, name):
    with pytest.raises(MissingData, match="Expected an invitation at") as caught:
        Invitation.read(tmp_path / name)
    assert "clfed invite" in caught.value.remedy


def test_a_newer_schema_asks_for_the_newer_program(saved, tmp_path):
    content = {"schema": 2, "something": ["new"]}
    (tmp_path / "node").write_bytes(json.dumps(content).encode())
    with pytest.raises(VersionMismatch, match="schema 2"):
        Invitation.read(tmp_path / "node")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b"[" * 60_000,
        b'{"schema": 1}',
        b'{"schema": NaN}',
        b'{"schema": ' + b"9" * 5000 + b"}",
        b'{"name": "\\ud800"}',
        b" " * 65_537,
    ],
    ids=range(11),
)
def test_something_else_is_no_invitation(data, tmp_path):
    (tmp_path / "node").write_bytes(data)
    with pytest.raises(InvalidMessage, match="Expected an undamaged invitation at") as caught:
        Invitation.read(tmp_path / "node")
    assert "clfed invite" in caught.value.remedy


@given(st.data())
def test_no_byte_can_change_the_content_unnoticed(invitation, saved, tmp_path_factory, data):
    place = data.draw(st.integers(0, len(saved) - 1))
    changed = bytearray(saved)
    changed[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("damaged") / "node"
    path.write_bytes(changed)
    with suppress(InvalidMessage, VersionMismatch):
        assert Invitation.read(path) == invitation  # white space has no meaning


@given(st.integers(0, 10_000))
def test_no_part_of_the_file_passes_for_the_whole(invitation, saved, tmp_path_factory, length):
    path = tmp_path_factory.mktemp("cut") / "node"
    path.write_bytes(saved[: length % (len(saved) - 2)])
    with pytest.raises(InvalidMessage):
        Invitation.read(path)


BAD = {
    "schema": [0, -1, "1", 1.0, True, None],
    "federation": ["", "AB" * 16, "ab" * 15, "xy" * 16, "ab" * 17, 7, None],
    "name": ["", "a\nb", "x" * 129, 7, None, ["a"]],
    "address": ["hub.local", "", 8000, None],
    "authority": ["", "ж", "-----BEGIN CERTIFICATE-----", None],
    "key": ["", "ж", "-----BEGIN OPENSSH PRIVATE KEY-----", None],
    "embedding": ["", "a\x00", "x" * 129, None],
    "clfed": ["", "1\n", 1, None],
}


@pytest.mark.parametrize("name, value", [(name, bad) for name in BAD for bad in BAD[name]])
def test_a_value_that_does_not_fit_is_refused_when_made_and_when_read(
    invitation, tmp_path, name, value
):
    with pytest.raises((InvalidMessage, ConfigError)) as caught:
        replace(invitation, **{name: value})
    assert "PRIVATE" not in str(caught.value)
    (tmp_path / "node").write_bytes(forged(asdict(invitation) | {name: value}))
    with pytest.raises(InvalidMessage, match="got one with a flaw"):
        Invitation.read(tmp_path / "node")


def test_a_server_is_no_authority_and_a_public_key_no_key(invitation, authority):
    with pytest.raises(InvalidMessage):
        replace(invitation, authority=(authority / "server.pem").read_text())
    with pytest.raises(InvalidMessage):
        replace(invitation, key=node_key()[1].decode())


def test_entries_are_neither_added_nor_left_out(invitation, tmp_path):
    content = asdict(invitation)
    for name, other in [("more", content | {"role": "operator"}), ("less", dict(content))]:
        other.pop("name" if name == "less" else "", None)
        (tmp_path / name).write_bytes(forged(other))
        with pytest.raises(InvalidMessage, match="entries"):
            Invitation.read(tmp_path / name)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("hub.local:8000", ("hub.local", 8000)),
        ("HUB:1", ("hub", 1)),
        ("xn--bro-hoa.de:65535", ("xn--bro-hoa.de", 65535)),
        ("camera_3:80", ("camera_3", 80)),
        ("192.168.1.5:8000", ("192.168.1.5", 8000)),
        ("[::1]:8000", ("::1", 8000)),
        ("[FD00:0:0::5]:8000", ("fd00::5", 8000)),
    ],
)
def test_addresses(text, parts):
    assert parse_address(text) == parts


PORTS = ["", ":0", ":65536", ":-1", ":+1", ":08", ":1e3", ":٨٠", ":80 ", ":80\n", ":" + "9" * 5000]
HOSTS = ["", " a", "a b", "a\n", "-a", "a-", "a..b", ".a", "a.", "*", "u@a", "bücher.de", "x" * 64]
LONG = ".".join(["x" * 60] * 5)
NUMBERS = ["1.2.3", "1.2.3.4.5", "256.1.1.1", "0.0.0.0", "::1", "[::]", "[::g]", "[fe80::1%eth0]"]
OTHERS = ["::1", "[::1]", "[::1]8000", "[hub]:80", "[]:80", "https://hub:80", "hub:80/x", ":"]


@pytest.mark.parametrize(
    "text",
    [
        *(f"hub{port}" for port in PORTS),
        *(f"{host}:80" for host in [*HOSTS, LONG, *NUMBERS]),
        *OTHERS,
    ],
)
def test_nonsense_is_no_address(text):
    with pytest.raises(ConfigError) as caught:
        parse_address(text)
    assert len(str(caught.value)) < 200


@given(st.ip_addresses().filter(lambda ip: not ip.is_unspecified), st.integers(1, 65535))
def test_every_ip_address_comes_back(ip, port):
    host = f"[{ip}]" if ip.version == 6 else ip
    found, number = parse_address(f"{host}:{port}")
    assert (ipaddress.ip_address(found), number) == (ip, port)


@given(st.text())
def test_any_text_is_an_address_or_refused(text):
    try:
        host, port = parse_address(text)
    except ClfedError as error:
        assert isinstance(error, ConfigError)
    else:
        assert host and host.isascii() and 1 <= port <= 65535
