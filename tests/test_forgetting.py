"""Forgetting in a federation: as if it had never been there, for good, with certificates."""

import copy
import hashlib
import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_encoder import conv4_encoder

from clfed.config import compose
from clfed.deploy.federation import Federation, Rules
from clfed.deploy.pace import Pace
from clfed.deploy.serving import Server
from clfed.deploy.verification import verify
from clfed.errors import CertificateError, RequestError
from clfed.federated.bundle import BUNDLE, Bundle
from clfed.federated.certificates import certify, places
from clfed.federated.client_app import app
from clfed.federated.folder_node import FolderNode
from clfed.federated.folder_state import STATE, FolderState, read_state
from clfed.federated.forgetting import (
    MESSAGE_REQUESTS,
    REQUEST_BYTES,
    carried_out,
    check_asked,
    is_done,
    new_id,
    sendable,
)
from clfed.federated.grid import LocalGrid
from clfed.federated.outbox import OUTBOX, outbox_of, put
from clfed.federated.pictures import Album
from clfed.jobs.verify import run as verify_job
from clfed.prototypes import Contribution, PrototypeMemory
from clfed.unlearning.certificate import read
from clfed.unlearning.requests import Request

ENCODER = conv4_encoder(3)  # small numbers, whose squares can be summed
HELD = {"a": ["owl", "fox"], "b": ["fox", "elk"], "c": ["elk", "ape"]}
PICTURES = 3  # of each class at each node


class Grid(LocalGrid):
    """Nodes that may be away, that may lose what is broadcast, and a network that repeats.

    Attributes:
        away: Node ids that are not there.
        deaf: Node ids that no broadcast reaches.
        repeats: Whether every reply of the past comes again with each look for new ones.
        change: What becomes of a reply's content on its way.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.away, self.deaf = set(), set()
        self.repeats, self.past = False, []
        self.change = lambda node, content: content

    def get_node_ids(self):
        return [node for node in super().get_node_ids() if node not in self.away]

    def push_messages(self, messages):
        messages = list(messages)
        heard = [m for m in messages if not self._lost(m)]
        ids = dict(zip(map(id, heard), super().push_messages(heard), strict=True))
        return [ids.get(id(message), "lost") for message in messages]

    def _lost(self, message):
        return message.metadata.dst_node_id in self.deaf and "merged" in (
            message.metadata.message_type
        )

    def pull_messages(self, message_ids):
        new = list(super().pull_messages(message_ids))
        for reply in new:
            if reply.has_content():
                reply.content = self.change(reply.metadata.src_node_id, reply.content)
        repeated = list(self.past) if self.repeats and new else []
        self.past += copy.deepcopy(new)
        return [*repeated, *new, *repeated] if self.repeats else new


class World:
    """A federation of nodes with folders, in one process.

    Args:
        root: Where everything lies.
        held: Classes by node.
        rules: Of the federation.
    """

    def __init__(self, root, held=HELD, **rules):
        self.root, self.names = root, sorted(held)
        for name, classes in held.items():
            (root / name).mkdir(parents=True)
            for class_ in classes:
                self.draw(name, class_)
        self.home = root / "server"
        Federation.create(
            self.home, name="t", address="localhost:8000", encoder=ENCODER, rules=Rules(**rules)
        )
        embedding = ENCODER.embedding_id
        configs = [
            {
                "name": name,
                "folder": str(root / name),
                "state-dir": str(self.state(name)),
                "embedding": embedding,
            }
            for name in self.names
        ]
        self.grid = Grid(app, configs)
        self.start()
        for number, name in enumerate(self.names, 1):
            self.store.update_node(name, node_id=str(number))

    def start(self):
        """Start the server, anew where it was running."""
        self.federation = Federation.open(self.home)
        self.store = self.federation.store()
        self.server = Server(self.federation, self.store, self.grid, Pace(patience=0.1))

    def draw(self, name, class_, number=PICTURES):
        folder = self.root / name / class_
        folder.mkdir(exist_ok=True)
        for i in range(number):
            rng = np.random.default_rng([*f"{name}/{class_}/{i}".encode()])
            pixels = rng.integers(0, 255, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
        return folder

    def state(self, name):
        return self.root / f"{name}.node"

    def rounds(self, number=1):
        for _ in range(number):
            self.server.round()

    def ask(self, request):
        assert self.store.ask(request, "operator")
        return request

    @property
    def memory(self):
        return self.server.strategy.memory

    def held(self):
        """Digest of the merged memory at the server and at every node."""
        folders = {"server": self.home, **{name: self.state(name) for name in self.names}}
        return {name: Bundle.load(folder).memory.sha256() for name, folder in folders.items()}

    def asked(self, identity):
        (found,) = [one for one in self.store.requests() if one.request.id == identity]
        return found

    def certificate(self, directory, identity):
        (place,) = [one for one in places(directory) if one.request == identity]
        return place.path, read(place.path)


def content_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def forgets(world, kind, identity="r"):
    """A request of each kind, about something that node b holds."""
    if kind == "picture":
        return Request(identity, kind, pictures=(content_of(world.root / "b" / "fox" / "1.png"),))
    if kind == "class":
        return Request(identity, kind, classes=("fox",))
    return Request(identity, kind, contributor="b")


def never_had(root, kind, **rules):
    """A federation that never had what the request of this kind means."""
    held = HELD if kind != "contributor" else {n: c for n, c in HELD.items() if n != "b"}
    if kind == "class":
        held = {name: [c for c in classes if c != "fox"] for name, classes in held.items()}
    world = World(root, held, **rules)
    if kind == "picture":
        (world.root / "b" / "fox" / "1.png").unlink()
    world.rounds(2)
    return world.memory.sha256()


@pytest.mark.parametrize("moments", ["none", "shared", "class"])
@pytest.mark.parametrize("kind", ["picture", "class", "contributor"])
@pytest.mark.parametrize("origin", ["operator", "node"])
def test_forgotten_is_as_if_it_had_never_been_there(tmp_path, kind, moments, origin):
    world = World(tmp_path / "had", moments=moments)
    world.rounds()
    before = world.memory.sha256()
    request = forgets(world, kind)
    if origin == "operator":
        world.ask(request)
    else:
        put(world.state("b"), request)
        world.rounds()
        assert world.asked("r").origin == "b" and world.memory.sha256() == before
    world.rounds()
    expected = never_had(tmp_path / "never", kind, moments=moments)
    assert {*world.held().values()} == {expected} and expected != before
    assert (tmp_path / "had" / "b" / "fox" / "1.png").is_file()
    assert not outbox_of(world.state("b"))
    world.rounds(2)
    assert {*world.held().values()} == {expected}
    asked = world.asked("r")
    assert asked.finished and asked.before == before and asked.after == expected


def test_only_files_of_the_same_bytes_are_forgotten_wherever_they_are(tmp_path):
    world = World(tmp_path)
    source = tmp_path / "b" / "fox" / "1.png"
    shutil.copy(source, tmp_path / "a" / "owl" / "copy.png")
    world.rounds()
    world.ask(forgets(world, "picture"))
    world.rounds()
    assert world.memory.total_count == 6 * PICTURES - 1
    assert world.store.confirmations("r") == {"a": 1, "b": 1, "c": 0}
    shutil.copy(source, tmp_path / "c" / "ape" / "again.png")
    world.rounds(2)
    assert world.memory.total_count == 6 * PICTURES - 1


def lose_state(world, kept):
    shutil.rmtree(world.state("b"))


def restore_state(world, kept):
    shutil.rmtree(world.state("b"))
    shutil.copytree(kept, world.state("b"))


def restart_server(world, kept):
    world.store.close()
    world.start()


def repeat_all(world, kept):
    world.grid.repeats = True


def copy_files(world, kept):
    for class_ in ("elk", "fox", "gnu"):
        folder = world.root / "b" / class_
        folder.mkdir(exist_ok=True)
        shutil.copy(world.root / "b" / "fox" / "1.png", folder / "copy.png")


def touch_files(world, kept):
    for path in (world.root / "b").glob("*/*.png"):
        path.touch()


MISHAPS = [lose_state, restore_state, restart_server, repeat_all, copy_files, touch_files]


@pytest.mark.parametrize("mishap", MISHAPS, ids=lambda mishap: mishap.__name__)
@pytest.mark.parametrize("kind", ["picture", "class", "contributor"])
def test_nothing_brings_back_what_was_forgotten(tmp_path, kind, mishap):
    world = World(tmp_path / "had")
    world.rounds()
    kept = shutil.copytree(world.state("b"), tmp_path / "kept")
    world.ask(forgets(world, kind))
    world.rounds()
    expected = world.memory.sha256()
    gone = world.root / "b" / "fox" / "1.png"
    mishap(world, kept)
    for _ in range(3):
        world.rounds()
        if (kind, mishap) == ("class", copy_files):
            # In folders of other classes the pictures are examples of those.
            assert "fox" not in world.memory
        else:
            assert world.memory.sha256() == expected
            assert {*world.held().values()} == {expected}
    assert gone.is_file()


def test_every_mishap_before_the_request_arrives(tmp_path):
    """The node that has to forget is away, loses its state meanwhile, and the server starts anew."""
    world = World(tmp_path / "had")
    world.rounds()
    world.grid.away = {2}
    world.ask(forgets(world, "picture"))
    world.rounds(2)
    assert world.store.awaited("r") == {"b": False}
    lose_state(world, None)
    restart_server(world, None)
    world.grid.away = set()
    world.rounds()
    assert {*world.held().values()} == {never_had(tmp_path / "never", "picture")}
    assert world.store.confirmations("r") == {"a": 0, "b": 1, "c": 0}


# ------------------------------------------------------------------------------- certificates


def holds(path, certificate, **options):
    """Names of the checks of a certificate that fail."""
    return [check.name for check in verify(path, certificate, **options) if not check.ok]


@pytest.mark.parametrize("moments", ["none", "shared"])
def test_certificates_on_both_sides(tmp_path, moments, capsys):
    world = World(tmp_path, moments=moments)
    world.rounds()
    before = world.memory.sha256()
    for kind in ("picture", "class", "contributor"):
        world.ask(forgets(world, kind, kind))
        world.rounds()
    picture = forgets(world, "picture").pictures[0]
    path, first = world.certificate(world.home, "picture")
    assert path.name == "01-picture.json" and first.previous is None
    assert first.deleted == {"b": 1} and first.evidence["examples"]["value"] == 1
    assert first.statistics_from == before and first.model_file is first.data_from is None
    assert first.settings["confirmed"] == ["a", "b", "c"]
    _, second = world.certificate(world.home, "class")
    assert second.deleted == {"a": PICTURES, "b": PICTURES - 1}
    assert second.previous == first.digest and second.statistics_from == first.statistics_to
    path, third = world.certificate(world.home, "contributor")
    assert third.deleted == {"b": PICTURES} and third.statistics_to == world.memory.sha256()
    assert third.settings["confirmed"] == ["a", "b", "c"]
    _, own = world.certificate(world.state("b"), "picture")
    assert own.deleted == {picture: 1} and own.model_from == own.model_to
    _, own = world.certificate(world.state("b"), "class")
    foxes = {content_of(one) for one in (tmp_path / "b" / "fox").glob("*.png")} - {picture}
    assert own.deleted == dict.fromkeys(foxes, 1)
    _, own = world.certificate(world.state("a"), "contributor")
    assert own.deleted == {} and own.statistics_from == own.statistics_to
    for directory in (world.home, *map(world.state, "abc")):
        assert [place.number for place in places(directory)] == [1, 2, 3]
        for place in places(directory):
            assert not holds(place.path, read(place.path))
            verify_job(compose(["job=verify", f"job.certificate='{place.path}'"]))
    told = capsys.readouterr().out
    assert "failed" not in told and "The chain of 3 certificates is whole." in told


def test_the_certificate_waits_for_a_node_that_is_away(tmp_path, caplog):
    caplog.set_level("INFO", logger="clfed")
    world = World(tmp_path)
    world.rounds()
    world.grid.away = {3}
    world.ask(forgets(world, "class"))
    world.rounds(2)
    assert world.store.awaited("r") == {"c": False} and not places(world.home)
    assert caplog.text.count("Request r waits for c (away).") == 1
    world.grid.away = set()
    world.rounds()
    assert world.asked("r").finished and not world.store.awaited("r")
    assert [place.request for place in places(world.home)] == ["r"]


def test_the_certificate_waits_until_every_node_holds_the_memory_of_afterwards(tmp_path):
    world = World(tmp_path)
    world.rounds()
    world.grid.deaf = {1}
    world.ask(forgets(world, "picture"))
    world.rounds()
    assert world.asked("r").cleared and world.store.awaited("r") == {"a": True}
    assert not places(world.home)
    # Others go on, so node a never holds this very memory, but a later one.
    world.draw("c", "ape", PICTURES + 1)
    world.grid.deaf = set()
    world.rounds()
    assert world.asked("r").finished and not world.store.awaited("r")
    assert world.asked("r").after != world.memory.sha256()
    path, certificate = world.certificate(world.home, "r")
    assert not holds(path, certificate)
    assert "has changed since" in verify(path, certificate)[-1].sentence


def test_a_contributor_that_is_forgotten_is_not_awaited_and_hears_of_it_later(tmp_path):
    world = World(tmp_path / "had")
    world.rounds()
    world.grid.away = {2}
    world.ask(forgets(world, "class", "r1"))
    world.rounds()
    assert world.store.awaited("r1") == {"b": False}
    world.ask(forgets(world, "contributor", "r2"))
    world.rounds()
    assert world.asked("r1").finished and world.asked("r2").finished
    _, certificate = world.certificate(world.home, "r2")
    assert certificate.settings["confirmed"] == ["a", "c"]
    assert certificate.deleted == {"b": PICTURES}  # the elks; its foxes went with the class
    shutil.rmtree(tmp_path / "had" / "b")  # it has not even the folder any more
    world.grid.away = set()
    world.rounds()
    state = read_state(world.state("b"))
    assert state.forgotten and not state.album.hashes and not state.own
    assert world.store.confirmations("r2") == {"a": 0, "b": 2 * PICTURES - PICTURES, "c": 0}
    expected = never_had(tmp_path / "never", "contributor")
    assert {*world.held().values()} != {expected}  # the class is gone as well
    path, certificate = world.certificate(world.state("b"), "r2")
    assert not holds(path, certificate)


def test_a_forgotten_node_has_no_say(tmp_path, caplog):
    world = World(tmp_path)
    world.rounds()
    world.ask(forgets(world, "contributor"))
    world.rounds()
    put(world.state("b"), Request("late", "class", classes=("ape",)))
    world.rounds(2)
    assert "ape" in world.memory and "was forgotten" in caplog.text
    assert [asked.request.id for asked in world.store.requests()] == ["r"]


def test_a_server_killed_between_certificate_and_account_goes_on(tmp_path, monkeypatch):
    world = World(tmp_path)
    world.rounds()
    world.ask(forgets(world, "class"))
    real = type(world.store).execute

    def killed(store, statement, *values):
        if "SET finished" in statement:
            raise KeyboardInterrupt
        return real(store, statement, *values)

    with monkeypatch.context() as patch:
        patch.setattr(type(world.store), "execute", killed)
        with pytest.raises(KeyboardInterrupt):
            world.rounds()
    path, certificate = world.certificate(world.home, "r")
    restart_server(world, None)
    world.rounds()
    assert world.certificate(world.home, "r") == (path, certificate)
    assert world.asked("r").finished and not holds(path, certificate)


def test_a_node_killed_between_certificate_and_state_goes_on(tmp_path, monkeypatch):
    world = World(tmp_path)
    world.rounds()
    world.ask(forgets(world, "picture"))

    def killed(node, state):
        assert not state.confirmed  # else the process is killed here

    with monkeypatch.context() as patch:
        patch.setattr(FolderNode, "_save", killed)
        world.rounds()
    assert world.store.awaited("r") == dict.fromkeys("abc", False)
    first = world.certificate(world.state("b"), "r")
    world.rounds()
    assert world.certificate(world.state("b"), "r") == first
    assert world.asked("r").finished and first[1].deleted


def test_signatures(tmp_path):
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    world = World(tmp_path)
    world.rounds()
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    (world.home / "signing.pem").write_bytes(pem)
    world.ask(forgets(world, "class"))
    world.rounds()
    public = key.public_key().public_bytes_raw().hex()
    assert not holds(*world.certificate(world.home, "r"), public_key=public)
    assert holds(*world.certificate(world.state("a"), "r"), public_key=public) == ["signer"]
    path, certificate = world.certificate(world.home, "r")
    forged = replace(certificate, deleted={})
    forged = replace(forged, digest=forged.computed_digest)
    assert holds(path, forged, public_key=public) == ["signature"]


def test_a_damaged_key_delays_the_certificate_alone(tmp_path, caplog):
    world = World(tmp_path)
    world.rounds()
    (world.home / "signing.pem").write_bytes(b"words")
    world.ask(forgets(world, "class"))
    world.rounds(2)
    assert "fox" not in world.memory and not world.asked("r").finished
    assert "has no certificate yet" in caplog.text
    (world.home / "signing.pem").unlink()
    world.rounds()
    assert world.asked("r").finished and len(places(world.home)) == 1


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A federation in which two requests are finished."""
    world = World(tmp_path_factory.mktemp("done"))
    world.rounds()
    kept = shutil.copytree(world.state("b"), world.root / "kept")
    for kind in ("class", "picture"):
        world.ask(forgets(world, kind, kind))
        world.rounds()
    return world, kept


@pytest.mark.parametrize("side", ["server", "b"])
def test_every_changed_byte_is_found(done, tmp_path, side):
    world, _ = done
    source = world.home if side == "server" else world.state("b")
    folder = shutil.copytree(source / "certificates", tmp_path / "certificates")
    path = folder / "02-picture.json"
    data = path.read_bytes()
    rng = random.Random(0)
    for i in rng.sample(range(len(data)), 60):
        path.write_bytes(data[:i] + bytes([data[i] ^ rng.randint(1, 255)]) + data[i + 1 :])
        try:
            certificate = read(path)
        except CertificateError:
            continue
        assert holds(path, certificate)
    path.write_bytes(data)
    assert not holds(path, read(path))  # on its own, without a federation around it
    (folder / "01-class.json").unlink()
    with pytest.raises(CertificateError, match="number 1"):
        verify(path, read(path))


@pytest.mark.parametrize(
    ("field", "value", "check"),
    [
        ("model_to", "0" * 64, "ledger after"),
        ("statistics_from", "0" * 64, "memory before"),
        ("statistics_to", None, "memory after"),
        ("request", {"id": "picture", "kind": "class", "classes": ["ape"]}, "request"),
        ("request", {"id": "picture"}, "files"),
        ("previous", None, "chain"),
        ("number", 3, "chain"),
        ("settings", {}, "place"),
        ("settings", {"federation": "", "place": "server", "confirmed": [[]]}, "confirmations"),
        ("settings", {"federation": "", "place": "server", "confirmed": 3}, "confirmations"),
        ("settings", {"federation": "x", "place": "server", "confirmed": []}, "federation"),
        (
            "settings",
            {"federation": "", "place": "server", "confirmed": ["z"]},
            "confirmations",
        ),
    ],
)
def test_what_contradicts_the_folder_is_found(done, field, value, check):
    world, _ = done
    path, certificate = world.certificate(world.home, "picture")
    forged = replace(certificate, **{field: value})
    forged = replace(forged, digest=forged.computed_digest)
    try:
        assert check in holds(path, forged)
    except CertificateError:  # a number beyond the chain has none before it
        assert field == "number"


def test_a_memory_that_still_knows_the_class_is_found(done, tmp_path):
    world, kept = done
    home = shutil.copytree(world.home, tmp_path / "home")
    path = home / "certificates" / "01-class.json"
    assert not holds(path, read(path))
    memory = world.memory
    more = memory.observe(torch.ones(1, memory.dim), ["fox"])
    bundle = Bundle.load(home)
    replace(bundle, memory=more).save(home / BUNDLE)
    assert holds(path, read(path)) == ["memory"]
    state = shutil.copytree(world.state("b"), tmp_path / "state")
    shutil.copy(kept / STATE, state / STATE)
    path = state / "certificates" / "01-class.json"
    assert holds(path, read(path)) == ["tombstones", "rows"]
    path = state / "certificates" / "02-picture.json"
    assert holds(path, read(path)) == ["tombstones", "embeddings"]


def test_a_ledger_that_still_holds_the_class_is_found(done, tmp_path):
    world, _ = done
    home = shutil.copytree(world.home, tmp_path / "home")
    store = Federation.open(home).store()
    # The share of a node as it would be after a restored backup.
    empty = world.federation.empty(ENCODER)
    ledger = store.read_ledger(empty, cap=world.federation.rules.cap)
    ledger.readmit_class("fox")
    more = empty.observe(torch.ones(1, empty.dim), ["fox"])
    ledger.receive(Contribution.of("a", 99, more))
    with store.transaction():
        store.write_ledger(ledger)
    store.close()
    path = home / "certificates" / "01-class.json"
    assert holds(path, read(path)) == ["ledger"]


def test_certificates_of_another_federation_are_not_taken_for_ones_own(tmp_path):
    request = Request("r", "class", classes=("fox",))
    content = dict.fromkeys(["statistics_from", "statistics_to", "data_from", "data_to"], None) | {
        "scope": "",
        "deleted": {},
        "touched": {},
        "model_from": "",
        "model_to": "",
    }
    options = {"place": "node", "settings": {}, "evidence": {}, **content}
    one = certify(tmp_path, request, federation="one", **options)
    assert certify(tmp_path, request, federation="one", **options) == one
    two = certify(tmp_path, request, federation="two", **options)
    assert two.number == 2 and two.previous == one.digest
    other = Request("r", "class", classes=("owl",))
    assert certify(tmp_path, other, federation="two", **options).number == 3


# ----------------------------------------------------------------------- requests of all sorts


def test_two_nodes_ask_the_same(tmp_path):
    world = World(tmp_path)
    world.rounds()
    same = Request(new_id("class", ["fox"]), "class", classes=("fox",))
    put(world.state("a"), same)
    put(world.state("b"), same)
    put(world.state("c"), Request("mine", "class", classes=("fox",)))
    world.rounds(2)
    assert [asked.request.id for asked in world.store.requests()] == [same.id, "mine"]
    assert all(asked.finished for asked in world.store.requests())
    _, first = world.certificate(world.home, same.id)
    _, second = world.certificate(world.home, "mine")
    assert first.deleted == {"a": PICTURES, "b": PICTURES} and second.deleted == {}
    assert not any(outbox_of(world.state(name)) for name in "abc")


def test_an_id_that_is_taken_is_left_and_asked_again_under_another(tmp_path):
    world = World(tmp_path)
    world.rounds()
    put(world.state("b"), Request("r", "class", classes=("ape",)))
    theirs = world.ask(Request("r", "class", classes=("owl",)))
    world.rounds()
    assert world.asked("r").request == theirs and world.asked("r").origin == "operator"
    world.rounds(2)
    assert world.memory.classes == ("elk", "fox")
    (again,) = [one for one in world.store.requests() if one.request.id != "r"]
    assert again.request.classes == ("ape",) and again.origin == "b" and again.finished
    with pytest.raises(RequestError, match="id of its own"):
        world.store.ask(Request("r", "class", classes=("elk",)), "operator")
    assert not world.store.ask(theirs, "operator")


def test_an_id_that_is_taken_is_refused_by_name(tmp_path, caplog):
    world = World(tmp_path)
    world.rounds()
    theirs = world.ask(Request("r", "class", classes=("owl",)))
    asks = Request("r", "class", classes=("ape",)), Request("s", "class", classes=("elk",))
    hostile(world, 2, requests=json.dumps([request.plain() for request in asks]))
    world.draw("b", "gnu")
    world.rounds(2)
    assert "'r' of b under an id of its own" in caplog.text
    assert world.asked("r").request == theirs
    # The rest of the message counts.
    assert world.memory.classes == ("ape", "fox", "gnu") and world.asked("s").origin == "b"


def test_a_class_that_nobody_has_is_shut_out_all_the_same(tmp_path):
    world = World(tmp_path)
    world.rounds()
    world.ask(Request("r", "class", classes=("gnu",)))
    world.draw("b", "gnu")
    world.rounds()
    assert "gnu" not in world.memory and world.asked("r").finished
    assert world.certificate(world.state("b"), "r")[1].evidence["examples"]["value"] == PICTURES
    assert world.certificate(world.home, "r")[1].deleted == {}
    # A node that sends it against the rules: gone when the next round begins, and refused then.
    empty = world.federation.empty(ENCODER)
    ledger = world.server.strategy.ledger
    rows = ledger.share("b").observe(torch.ones(2, empty.dim), ["gnu", "gnu"])
    ledger.receive(Contribution.of("b", 50, rows))
    assert "gnu" in world.memory
    world.server.requests.apply(ledger, lambda: world.memory)
    assert "gnu" not in world.memory and ledger.retired_classes == ("gnu",)
    assert ledger.receive(Contribution.of("b", 51, rows)).refused == ("gnu",)
    assert json.loads(world.asked("r").subtracted) == {"b": 2}
    restart_server(world, None)
    assert world.server.strategy.ledger.retired_classes == ("gnu",)


def hostile(world, node, **entries):
    """Let a node say something else in its status."""

    def change(sender, content):
        if sender != node or "status" not in content or "confirmed" not in content["status"]:
            return content
        changed = RecordDict(dict(content))
        changed["status"].update(entries)
        return changed

    world.grid.change = change


def plain(number, **more):
    return [{"id": f"x{i}", "kind": "class", "classes": ["ape"], **more} for i in range(number)]


BOMBS = {
    "too many": {"requests": json.dumps(plain(MESSAGE_REQUESTS + 1))},
    "too long": {
        "requests": json.dumps(
            [{"id": "x", "kind": "picture", "pictures": [f"{i:064x}" for i in range(16_000)]}]
        )
    },
    "too deep": {"requests": "[" * 100_000},
    "too large": {"requests": " " * 5_000_000 + "[]"},
    "a long id": {"requests": json.dumps(plain(1, id="x" * 65))},
    "an id of a path": {"requests": json.dumps(plain(1, id="../x"))},
    "sample ids": {"requests": '[{"id": "x", "kind": "sample", "samples": [1]}]'},
    "no list": {"requests": '{"id": "x"}'},
    "a long class": {"requests": json.dumps(plain(1, classes=["x" * 129]))},
    "no text": {"requests": 3},
    "NaN": {"confirmed": '{"r": NaN}'},
    "a negative number": {"confirmed": '{"r": -1}'},
    "a list": {"confirmed": "[1]"},
    "a truth": {"confirmed": '{"r": true}'},
    "many ids": {"confirmed": json.dumps({str(i): 1 for i in range(400_000)})},
}


def test_a_hostile_status_is_refused_as_a_whole(tmp_path):
    world = World(tmp_path)
    world.rounds()
    before = world.memory
    world.draw("b", "gnu")
    for number, (bomb, entries) in enumerate(BOMBS.items(), 1):
        hostile(world, 2, **entries)
        world.rounds()
        assert world.memory == before and not world.store.requests(), bomb
        (row,) = world.store.execute("SELECT refused FROM nodes WHERE name = 'b'")
        assert row["refused"] == number, bomb
    world.grid.change = lambda node, content: content
    world.rounds()
    assert "gnu" in world.memory


def test_what_nobody_asked_is_not_confirmed(tmp_path):
    world = World(tmp_path)
    world.rounds()
    hostile(world, 2, confirmed='{"ghost": 3, "r": 3}')
    world.rounds()  # r is not there yet
    world.ask(forgets(world, "class"))
    world.rounds()
    assert world.store.confirmed("b") == {"r": 3}


def test_a_node_may_ask_for_itself_alone(tmp_path, caplog):
    world = World(tmp_path)
    world.rounds()
    put(world.state("a"), Request("r", "contributor", contributor="b"))
    world.rounds(2)
    assert not world.store.requests() and "only the operator" in caplog.text
    assert "elk" in world.memory


def test_an_outbox_with_rubbish_stops_nobody(tmp_path, caplog):
    world = World(tmp_path)
    folder = world.state("b") / OUTBOX
    folder.mkdir(parents=True)
    rubbish = ["", "[1]", '{"id": "x"}', "[" * 100_000, '{"id":"s","kind":"sample","samples":[1]}']
    for number, text in enumerate(rubbish):
        (folder / f"{number}.json").write_text(text)
    (folder / "bytes.json").write_bytes(b"\xff\xfe")
    world.rounds()
    put(world.state("b"), forgets(world, "class"))
    world.rounds(2)
    assert "fox" not in world.memory and world.asked("r").finished
    for path in folder.glob("*.json"):
        assert f"{path} is no request" in caplog.text
    assert len(outbox_of(world.state("b"))) == 1 + len(rubbish)


def test_more_requests_than_a_message_may_bring_come_one_after_another(tmp_path, monkeypatch):
    monkeypatch.setattr("clfed.federated.forgetting.MESSAGE_REQUESTS", 10)
    world = World(tmp_path, {"a": ["owl"], "b": ["fox"]})
    world.rounds()
    for i in range(15):
        put(world.state("a"), Request(f"q{i:03d}", "class", classes=(f"no-{i}",)))
    world.rounds()
    assert len(world.store.requests()) == 10
    world.rounds(2)
    assert all(asked.finished for asked in world.store.requests())
    assert len(world.store.requests()) == len(places(world.home)) == 15
    place = places(world.home)[-1]
    assert place.number == 15 and not holds(place.path, read(place.path))


def test_limits():
    pictures = tuple(f"{i:064x}" for i in range(15_000))
    large = Request("x", "picture", pictures=pictures)
    check_asked(large)
    with pytest.raises(RequestError, match=f"{REQUEST_BYTES:,}"):
        check_asked(
            Request(
                "x", "picture", pictures=(*pictures, *(f"{i:064x}" for i in range(15_000, 16_000)))
            )
        )
    assert len(sendable([large] * 10)) == 4 and sendable([]) == []
    assert len(sendable([Request("x", "class", classes=("a",))] * 101)) == MESSAGE_REQUESTS
    for bad in (Request("x", "sample", samples=(1,)), Request("x", "class", classes=("y" * 129,))):
        with pytest.raises(RequestError):
            check_asked(bad)


# ---------------------------------------------------------------- what a request means at a node

NAMES = st.sampled_from("xyz")
CONTENTS = st.sampled_from([letter * 64 for letter in "abcd"])
FOLDERS = st.dictionaries(st.tuples(NAMES, st.integers(0, 3)), CONTENTS, max_size=8)
ASKED = st.one_of(
    st.sets(NAMES, min_size=1).map(lambda names: ("class", "classes", sorted(names))),
    st.sets(CONTENTS, min_size=1).map(lambda names: ("picture", "pictures", sorted(names))),
    st.sampled_from(["me", "you"]).map(lambda name: ("contributor", "contributor", name)),
)


def album(folder):
    files = {f"{name}/{i}": (1, 1, content) for (name, i), content in folder.items()}
    labels = {f"{name}/{i}": name for name, i in folder}
    return Album(torch.zeros(0, 2), (), files, labels)


@given(FOLDERS, FOLDERS, st.lists(ASKED, max_size=4))
def test_each_example_is_counted_once_by_the_first_request_that_means_it(then, now, asked):
    state = FolderState(
        name="me",
        session="s",
        federation="f",
        embedding_id="e",
        moments="none",
        threshold=None,
        version=1,
        own=PrototypeMemory.empty(2, "e"),
        album=album(then),
    )
    live = {*then.items(), *now.items()}
    for number, (kind, key, what) in enumerate(asked):
        request = Request.parse({"id": f"r{number}", "kind": kind, key: what})
        assert not is_done(state, request)
        state, carried = carried_out(state, request, album(now))
        goes = {
            (place, content)
            for place, content in live
            if (kind == "class" and place[0] in what)
            or (kind == "picture" and content in what)
            or (kind == "contributor" and what == "me")
        }
        live -= goes
        assert carried.examples == len(goes) == state.confirmed[request.id]
        assert {*carried.removed} == {content for _, content in goes}
        assert is_done(state, request)
    left = album(dict(live)).without(state.retired, state.erased)
    assert state.forgotten or len(left.files) == len(dict(live))


def test_a_request_under_a_known_id_with_other_content_is_carried_out(tmp_path):
    """As after a server that was restored from an older copy."""
    world = World(tmp_path)
    world.rounds()
    world.ask(Request("r", "class", classes=("owl",)))
    world.rounds()
    content = json.dumps(Request("r", "class", classes=("ape",)).plain(), sort_keys=True)
    world.store.execute("DELETE FROM confirmations")
    world.store.execute("UPDATE requests SET content = ?, applied = NULL, finished = NULL", content)
    world.rounds()
    assert world.memory.classes == ("elk", "fox")
    assert read_state(world.state("c")).retired == {"owl", "ape"}
    assert world.asked("r").finished
    assert [place.number for place in places(world.state("c"))] == [1, 2]
