"""Nodes that are folders: what grows and shrinks, what fails, and what must not be lost."""

import json
import logging
import os
import re
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from federations import WORLD, Site, draw, encoder
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from fuzz import corpus

import clfed
import clfed.strategies
from clfed.deploy.federation import Federation, Rules
from clfed.deploy.flower_run import Places, raise_failure
from clfed.deploy.pace import Pace
from clfed.deploy.store import Store
from clfed.errors import (
    ClfedError,
    ConfigError,
    FederationError,
    InvalidMessage,
    MissingData,
    RunFolderError,
)
from clfed.federated import folder_node
from clfed.federated.bundle import Bundle
from clfed.federated.folder_state import STATE, FolderState, hold
from clfed.federated.frames import pack_records, unpack_records
from clfed.federated.grid import LocalGrid
from clfed.federated.intake import Limits, take_in
from clfed.federated.relay import Agent, ask
from clfed.federated.wire import encode_contribution
from clfed.prototypes import Contribution, ContributorLedger, PrototypeMemory


def assert_settled(site, *nodes):
    """Everybody holds the memory of what the folders hold, to the byte."""
    expected = site.expected(*nodes)
    assert site.server.strategy.memory.to_bytes() == expected.to_bytes()
    held = {name: memory for name, memory in site.held().items() if name in (nodes or site.names)}
    assert all(memory.to_bytes() == expected.to_bytes() for memory in held.values())
    assert Bundle.load(site.federation.folder).memory == expected


@pytest.mark.parametrize("moments", ["none", "shared", "class"])
def test_one_round_gives_every_node_the_memory_of_all(tmp_path, moments):
    site = Site(tmp_path, rules=Rules(moments=moments))
    site.round()
    assert_settled(site)
    assert len(site.server.strategy.memory) == 5


def test_pictures_and_classes_come_and_go(tmp_path):
    site = Site(tmp_path)
    site.round()
    draw(site.folders["hut"] / "wolf" / "new.jpg", 99)
    (site.folders["lodge"] / "owl" / "0.png").unlink()
    shutil.rmtree(site.folders["pier"] / "seal")
    shutil.copy(site.folders["hut"] / "elk" / "0.png", site.folders["hut"] / "elk" / "again.png")
    site.round()
    assert "seal" not in site.server.strategy.memory
    assert site.server.strategy.memory.select(["elk"]).total_count == 4
    assert "wolf" in site.server.strategy.memory  # jpg counts too
    held = site.held()
    assert len({memory.sha256() for memory in held.values()}) == 1
    # A picture that is changed in place is another picture.
    draw(site.folders["lodge"] / "owl" / "1.png", 1234)
    (site.folders["hut"] / "wolf" / "new.jpg").unlink()
    site.round()
    assert_settled(site)


def test_a_whole_node_can_leave(tmp_path):
    site = Site(tmp_path)
    site.round()
    shutil.rmtree(site.folders["pier"])
    site.folders["pier"].mkdir()
    site.round()
    assert_settled(site)
    assert "gull" not in site.server.strategy.memory


def test_nothing_new_sends_nothing(tmp_path):
    site = Site(tmp_path)
    first, second = site.server.round(), site.server.round()
    assert second.up < first.up / 3
    rows = site.server.store.execute("SELECT rows FROM messages WHERE round = 2")
    assert [row["rows"] for row in rows] == [0, 0, 0]


def test_an_unmounted_folder_is_not_an_empty_one(tmp_path):
    site = Site(tmp_path)
    memory = site.round()
    away = tmp_path / "away"
    site.folders["pier"].rename(away)
    assert site.round() == memory
    (row,) = site.server.store.execute("SELECT refused, note FROM nodes WHERE name = 'pier'")
    assert row["refused"] == 1 and "no folder" in row["note"]
    away.rename(site.folders["pier"])
    site.round()
    assert_settled(site)


def test_files_that_are_no_pictures_wait(tmp_path):
    site = Site(tmp_path)
    half = site.folders["hut"] / "elk" / "half.png"
    whole = (site.folders["hut"] / "elk" / "0.png").read_bytes()
    half.write_bytes(whole[: len(whole) // 2])
    (site.folders["hut"] / "elk" / "notes.txt").write_text("no picture")
    (site.folders["hut"] / ("x" * 200)).mkdir()
    draw(site.folders["hut"] / ("x" * 200) / "0.png", 5)
    site.round()
    assert site.server.strategy.memory.select(["elk"]).total_count == 3
    (row,) = site.server.store.execute("SELECT note FROM nodes WHERE name = 'hut'")
    assert "1 files" in row["note"]
    shutil.rmtree(site.folders["hut"] / ("x" * 200))
    draw(half, 77)
    site.round()
    assert_settled(site)


def test_state_keeps_no_picture_and_goes_with_it(tmp_path):
    site = Site(tmp_path)
    site.round()
    state = FolderState.from_bytes((site.states["lodge"] / STATE).read_bytes(), "state")
    assert len(state.album.hashes) == len(state.album.embeddings) == 6
    pixels = encoder().input_shape[1] ** 2 * 6
    assert (site.states["lodge"] / STATE).stat().st_size < pixels + 4000
    (site.folders["lodge"] / "owl" / "0.png").unlink()
    site.round()
    after = FolderState.from_bytes((site.states["lodge"] / STATE).read_bytes(), "state")
    assert len(after.album.hashes) == 5


@pytest.mark.parametrize("when", ["deleted", "restored", "damaged"])
def test_node_state_may_be_lost(tmp_path, when):
    site = Site(tmp_path)
    site.round()
    old = tmp_path / "old"
    shutil.copytree(site.states["lodge"], old)
    (site.folders["lodge"] / "owl" / "0.png").unlink()
    site.round()
    shutil.rmtree(site.folders["lodge"] / "fox")
    shutil.rmtree(site.states["lodge"])
    if when == "restored":
        shutil.copytree(old, site.states["lodge"])
    elif when == "damaged":
        site.states["lodge"].mkdir()
        (site.states["lodge"] / STATE).write_bytes(b"rubbish")
        memory = site.server.strategy.memory
        assert site.round() == memory
        (row,) = site.server.store.execute("SELECT note FROM nodes WHERE name = 'lodge'")
        assert STATE in row["note"]
        shutil.rmtree(site.states["lodge"])
    site.round()
    assert_settled(site)


class Twice(LocalGrid):
    """Delivers every message twice; both replies come."""

    def _handle(self, message):
        super()._handle(message)
        return super()._handle(message)

    def pull_messages(self, message_ids):
        replies = list(super().pull_messages(message_ids))
        return [*replies, *replies]


class Slow(LocalGrid):
    """Holds every second reply back until after the round."""

    count = 0

    def pull_messages(self, message_ids):
        replies = list(super().pull_messages(message_ids))
        kept = []
        for reply in replies:
            self.count += 1
            if self.count % 2 and not getattr(reply, "was_late", False):
                reply.was_late = True
                self._replies[reply.metadata.reply_to_message_id] = reply
                self.late = time.monotonic()
            elif getattr(reply, "was_late", False) and time.monotonic() - self.late < 0.5:
                self._replies[reply.metadata.reply_to_message_id] = reply
            else:
                kept.append(reply)
        return kept[::-1]


class Away(LocalGrid):
    """One node is not there for two rounds."""

    rounds = 0

    def get_node_ids(self):
        self.rounds += 1
        ids = super().get_node_ids()
        return ids[1:] if self.rounds in (2, 3) else ids


class Deaf(LocalGrid):
    """A node is killed in the middle of its round: it has done the work and never answers."""

    rounds = 0

    def _handle(self, message):
        identity = super()._handle(message)
        if message.metadata.dst_node_id == 2 and self.rounds < 2:
            self.rounds += 1
            self._replies.pop(identity)
        return identity


@pytest.mark.parametrize("grid", [Twice, Slow, Away, Deaf])
def test_messages_that_come_twice_late_or_never(tmp_path, grid):
    site = Site(tmp_path, grid=grid)
    site.round()
    (site.folders["hut"] / "elk" / "0.png").unlink()
    draw(site.folders["lodge"] / "owl" / "7.png", 70)
    site.round(5)
    assert_settled(site)


def test_a_silent_node_is_named_and_the_round_goes_on(tmp_path, caplog):
    site = Site(tmp_path, grid=Deaf)
    with caplog.at_level(logging.WARNING, "clfed"):
        site.round()
    assert "hut did not answer within 0.3 s" in caplog.text
    assert len(site.server.strategy.memory.select(["owl", "gull"])) == 2
    assert "elk" not in site.server.strategy.memory


def test_a_full_disk_at_a_node_loses_nothing(tmp_path, monkeypatch):
    site = Site(tmp_path)
    memory = site.round()
    before = (site.states["hut"] / STATE).read_bytes()
    draw(site.folders["hut"] / "elk" / "7.png", 70)
    original = folder_node.write_file

    def full(path, data, **options):
        if "hut" in str(path):
            raise RunFolderError(f"expected to write {path}, got [Errno 28] No space left")
        return original(path, data, **options)

    monkeypatch.setattr(folder_node, "write_file", full)
    assert site.round() == memory
    assert (site.states["hut"] / STATE).read_bytes() == before
    (row,) = site.server.store.execute("SELECT note FROM nodes WHERE name = 'hut'")
    assert "No space left" in row["note"]
    monkeypatch.setattr(folder_node, "write_file", original)
    site.round()
    assert_settled(site)


def test_two_processes_never_share_a_state(tmp_path):
    site = Site(tmp_path)
    with hold(tmp_path / "hut.node"), pytest.raises(FederationError, match="another process"):
        hold(tmp_path / "hut.node")
    with hold(site.states["hut"]):
        site.round()
    (row,) = site.server.store.execute("SELECT note FROM nodes WHERE name = 'hut'")
    assert "another process uses it" in row["note"]
    site.round()
    assert_settled(site)


def test_two_nodes_with_one_key_settle(tmp_path):
    """A copied machine: the messages of one key reach either of two states, in turn."""

    class Copied(LocalGrid):
        turn = 0

        def _handle(self, message):
            if message.metadata.dst_node_id == 1:
                self.turn += 1
                context = self._contexts[1]
                states = (context.node_config["state-dir"].removesuffix("-b"), "-b")
                config = dict(context.node_config)
                config["state-dir"] = states[0] + (states[1] if self.turn % 2 else "")
                context.node_config = config
            return super()._handle(message)

    site = Site(tmp_path, grid=Copied)
    site.round(2)
    (site.folders["lodge"] / "owl" / "0.png").unlink()
    site.round(3)
    assert site.server.strategy.memory == site.expected()
    rows = site.server.store.execute("SELECT rows FROM messages WHERE round = 5 AND node = 'lodge'")
    assert {row["rows"] for row in rows} == {0}


def in_a_child(act):
    """Start something in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            act()
        finally:
            os._exit(0)
    return child


def kill_at_random(site, rng, longest):
    """Run the server in a child process and kill it at a random moment."""
    child = in_a_child(lambda: site.start().run())
    time.sleep(float(rng.uniform(0.0, longest)))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked server")
def test_a_server_killed_at_20_random_moments_ends_in_the_same_bytes(tmp_path):
    site = Site(tmp_path)
    site.server.store.close()
    rng = np.random.default_rng(0)
    start = time.monotonic()
    os.waitpid(in_a_child(lambda: site.start().round()), 0)
    longest = 2 * (time.monotonic() - start)
    rounds = 1
    for kill in range(20):
        if kill % 4 == 1:
            draw(site.folders["hut"] / "elk" / f"{kill}.png", 1000 + kill)
        if kill % 4 == 3:
            next(iter(sorted((site.folders["pier"] / "gull").glob("*.png")))).unlink()
            draw(site.folders["pier"] / "gull" / f"{kill}.png", 2000 + kill)
        kill_at_random(site, rng, longest)
        store = Store(site.federation.folder / "ledger.db")
        numbers = [row["number"] for row in store.execute("SELECT number FROM rounds")]
        store.close()
        assert numbers == [*range(1, len(numbers) + 1)] and len(numbers) >= rounds
        rounds = len(numbers)
    site.server = site.start()
    assert site.server.round().number == rounds + 1
    site.round()
    assert_settled(site)
    assert rounds > 1, "no round was finished between the kills"


def test_what_was_acknowledged_survives_the_server(tmp_path):
    site = Site(tmp_path)
    memory = site.round()
    ledger = site.server.strategy.ledger.to_bytes()
    site.server.store.close()
    site.server = site.start()
    assert site.server.strategy.ledger.to_bytes() == ledger
    assert site.server.strategy.memory == memory
    assert site.server.round().number == 2
    rows = site.server.store.execute("SELECT rows FROM messages WHERE round = 2")
    assert [row["rows"] for row in rows] == [0, 0, 0]


def test_a_store_that_cannot_be_written_stops_the_server_and_loses_nothing(tmp_path):
    site = Site(tmp_path)
    site.round()
    ledger = site.server.strategy.ledger.to_bytes()
    draw(site.folders["hut"] / "elk" / "7.png", 70)
    blocker = sqlite3.connect(site.federation.folder / "ledger.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    site.server.store.execute("PRAGMA busy_timeout = 50")
    with pytest.raises(RunFolderError, match="locked"):
        site.server.round()
    blocker.execute("ROLLBACK")
    blocker.close()
    site.server = site.start()
    assert site.server.strategy.ledger.to_bytes() == ledger
    site.round()
    assert_settled(site)


def test_deleted_rows_leave_no_trace_in_the_file(tmp_path):
    site = Site(tmp_path)
    site.round()
    path = site.federation.folder / "ledger.db"
    row = site.server.strategy.ledger.share("hut").select(["elk"]).sums.numpy().tobytes()
    assert row in path.read_bytes()
    shutil.rmtree(site.folders["hut"] / "elk")
    site.round()
    assert row not in path.read_bytes()
    assert not [*path.parent.glob("ledger.db-*")]


def reply(content, node=1):
    request = Message(RecordDict(), dst_node_id=node, message_type="train")
    request.metadata.__dict__["_message_id"] = f"m{node}"
    return Message(content, reply_to=request)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A site, and a real message of one of its nodes."""
    site = Site(tmp_path_factory.mktemp("recorded"))
    site.round()
    share = site.server.strategy.ledger.share("pier")
    return site, Contribution.of("pier", 5, share)


@pytest.mark.slow
def test_ten_thousand_hostile_messages_change_nothing(recorded):
    site, valid = recorded
    taken = 0
    before = site.server.strategy.ledger.to_bytes()
    for variant in corpus(encode_contribution(valid), 10_000, seed=1, others=("lodge",)):
        ledger = ContributorLedger.from_bytes(before)
        status = ConfigRecord({"contributor": "pier"})
        content = RecordDict({"status": status})
        content["rows"] = variant.record
        try:
            take_in(reply(content), ledger, limits=Limits(classes=50_000), sender="pier")
        except ClfedError:
            assert ledger.to_bytes() == before
            continue
        taken += 1
        assert variant.fate != "refused", variant.kind
        others = [ledger.share(name) for name in ("lodge", "hut")]
        assert others == [site.server.strategy.ledger.share(name) for name in ("lodge", "hut")]
    assert taken < 2_000


def test_hostile_words_about_requests_are_refused(recorded):
    site, valid = recorded
    ledger = site.server.strategy.ledger
    before = ledger.to_bytes()
    for key, words in {
        "confirmed": ["[]", "{", '{"r": -1}', '{"r": "x"}', '{"r": 1e99}', "[" * 100_000],
        "requests": ["{}", "nope", '[{"id": "../x", "kind": "class"}]', "[" * 100_000, "[1]"],
    }.items():
        for text in words:
            status = ConfigRecord({"contributor": "pier", key: text})
            content = RecordDict({"status": status, "rows": encode_contribution(valid)})
            with pytest.raises(InvalidMessage):
                take_in(reply(content), ledger, limits=Limits())
    assert ledger.to_bytes() == before


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(bytes=100), "at most 100 bytes"),
        (Limits(classes=2), "at most 2 classes"),
        (Limits(ahead=1), "version"),
    ],
)
def test_limits_of_one_message(recorded, limits, words):
    site, valid = recorded
    content = RecordDict({"status": ConfigRecord({"contributor": "pier"})})
    content["rows"] = encode_contribution(valid)
    ledger = site.server.strategy.ledger
    with pytest.raises(InvalidMessage, match=words):
        take_in(reply(content), ledger, limits=limits)
    assert take_in(reply(content), ContributorLedger.from_bytes(ledger.to_bytes()), limits=Limits())


def test_a_key_names_its_node(tmp_path):
    site = Site(tmp_path)
    site.round()
    forged = Contribution.of("hut", 50, site.server.strategy.ledger.share("pier"))
    content = RecordDict({"status": ConfigRecord({"contributor": "hut"})})
    content["rows"] = encode_contribution(forged)
    ledger = site.server.strategy.ledger.to_bytes()
    with pytest.raises(InvalidMessage, match="key of 'pier' calls itself 'hut'"):
        site.server.strategy.take(reply(content, node=3))
    with pytest.raises(FederationError, match="the camera fell"):
        site.server.strategy.take(reply(Error(code=2, reason="the camera fell"), node=3))
    assert site.server.strategy.ledger.to_bytes() == ledger


def test_another_embedding_or_version_is_one_sentence(tmp_path, monkeypatch):
    site = Site(tmp_path)
    site.grid._contexts[1].node_config["embedding"] = "another"
    site.round()
    (row,) = site.server.store.execute("SELECT note FROM nodes WHERE name = 'lodge'")
    assert "invited for the embedding 'another'" in row["note"]
    monkeypatch.setattr("clfed.federated.answering.__version__", "9.9")
    site.round()
    rows = site.server.store.execute("SELECT note FROM nodes")
    assert all("Expected a server with clfed 9.9" in row["note"] for row in rows)


def test_robust_rules_hold_off_a_liar(tmp_path):
    world = dict.fromkeys("abcde", ("fox",))
    site = Site(tmp_path, world | {"e": ("fox", "yak")}, rules=Rules(robust="median"))
    site.round()
    ledger = site.server.strategy.ledger
    honest = torch.cat([ledger.share(name).select(["fox"]).prototypes() for name in "bcde"])
    lone = site.server.strategy.memory.select(["yak"])
    assert lone == site.server.strategy.ledger.total.select(["yak"])
    zero = PrototypeMemory.empty(16, encoder().embedding_id)
    lie = zero.observe(torch.full((1, 16), 30_000.0), ["fox"])
    ledger.receive(Contribution.of("a", 9, lie))
    voted = site.server.strategy.memory.select(["fox"]).prototypes()[0]
    slack = 2**-14
    assert bool((voted <= honest.amax(0) + slack).all() and (voted >= honest.amin(0) - slack).all())
    assert site.server.strategy.memory.select(["yak"]) == lone


def test_records_survive_the_way_between_processes():
    content = RecordDict(
        {
            "a": ConfigRecord({"text": "é", "n": 3, "yes": True, "raw": b"\0\xff", "x": 0.5}),
            "b": ArrayRecord(
                [np.arange(6, dtype=np.int16).reshape(2, 3), np.zeros((0, 4), np.float32)]
            ),
        }
    )
    there = unpack_records(pack_records(content))
    assert dict(there["a"]) == dict(content["a"])
    for one, two in zip(
        there["b"].to_numpy_ndarrays(), content["b"].to_numpy_ndarrays(), strict=True
    ):
        assert one.dtype == two.dtype and np.array_equal(one, two)
    for damaged in (b"", b"\0" * 7, pack_records(content)[:-1], b"\0" * 8 + b"x"):
        with pytest.raises(InvalidMessage):
            unpack_records(damaged)


def test_the_long_lived_process_answers(tmp_path):
    site = Site(tmp_path)
    asked = []

    def handle(action, content):
        asked.append(action)
        if action == "fail":
            raise MissingData("Expected a folder, got none.")
        if action == "bug":
            raise KeyError("oh")
        return content

    config = {"state-dir": str(tmp_path)}
    content = RecordDict({"a": ConfigRecord({"n": 3})})
    assert ask("keep", content, config) is None
    assert ask("keep", content, {}) is None
    agent = Agent(tmp_path, handle)
    try:
        assert dict(ask("keep", content, config)["a"]) == {"n": 3}
        assert agent.failure is None
        with pytest.raises(FederationError, match="Expected a folder"):
            ask("fail", content, config)
        assert isinstance(agent.failure, MissingData)
        with pytest.raises(FederationError, match="KeyError"):
            ask("bug", content, config)
        record = json.loads((tmp_path / "agent.json").read_text())
        (tmp_path / "agent.json").write_text(json.dumps(record | {"token": "00" * 32}))
        with pytest.raises(FederationError, match="did not answer"):
            ask("keep", content, config)
        assert asked == ["keep", "fail", "bug"]
    finally:
        agent.close()
    assert ask("keep", content, config) is None
    (tmp_path / "agent.json").write_text(json.dumps(record))  # what a killed process leaves
    assert ask("keep", content, config) is None
    assert site.names == [*WORLD]


def test_the_message_process_imports_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys, clfed.federated.client_app\n"
        "heavy = {'torch', 'lightning', 'torchvision', 'hydra', 'PIL', 'wandb'} & {*sys.modules}\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_federation_folders_refuse_what_does_not_fit(tmp_path):
    site = Site(tmp_path, {"hut": ("elk",)})
    folder = site.federation.folder
    with pytest.raises(RunFolderError, match="holds a federation already"):
        Federation.create(folder, name="x", address="a:1", encoder=encoder(), rules=Rules())
    with pytest.raises(MissingData, match="Expected a federation"):
        Federation.open(tmp_path)
    invitation = site.federation.invite("cabin", tmp_path / "cabin.invitation")
    assert invitation.name == "cabin" and "cabin" in site.federation.public_keys()
    with pytest.raises(RunFolderError, match="invited already"):
        site.federation.invite("cabin", tmp_path / "other.invitation")
    for name in ("../x", ".x", "a/b", "", "x" * 200, "bad\n"):
        with pytest.raises(InvalidMessage):
            site.federation.invite(name, tmp_path / "bad.invitation")
    assert not (tmp_path / "bad.invitation").exists()
    settings = folder / "federation.json"
    text = settings.read_text()
    for damaged in ("{}", "no", text.replace('"schema": 1', '"schema": 7')):
        settings.write_text(damaged)
        with pytest.raises(ClfedError, match=r"settings|schema"):
            Federation.open(folder)


ROOMS = ("backbones", "commands", "deploy", "federated", "prototypes")
FORBIDDEN = ("pickle", "torch.save", "torch.load", "marshal", "shelve", "dill", "joblib", "eval(")


def test_no_pickle_on_the_wire_or_on_disk(tmp_path):
    root = Path(clfed.__file__).parent
    sources = [path for room in ROOMS for path in (root / room).rglob("*.py")]
    sources += Path(clfed.strategies.__file__).parent.glob("*.py")
    assert len(sources) > 60
    found = [
        f"{path.name}: {word}"
        for path in sources
        for word in FORBIDDEN
        if word in re.sub(r"safetensors\.torch\.|\.eval\(", "", path.read_text())
    ]
    assert not found
    site = Site(tmp_path)
    site.round(2)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".db", ".pem", ".key"}
    for path in files:
        data = path.read_bytes()
        assert not data.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"))
        assert b"data.pkl" not in data


@pytest.mark.parametrize(
    "wrong",
    [
        {"every": -1.0},
        {"patience": float("nan")},
        {"gather": float("inf")},
        {"nodes": 0},
        {"rounds": 0},
    ],
)
def test_a_pace_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Pace(**wrong)


def test_what_ended_the_rounds_ends_the_command(tmp_path):
    site = Site(tmp_path)
    places = Places(site.federation)
    places.folder.mkdir()
    site.round()
    raise_failure(places, Pace(rounds=1), site.server.store)
    with pytest.raises(FederationError, match="ended by themselves after round 1"):
        raise_failure(places, Pace(rounds=2), site.server.store)
    note = {"code": RunFolderError.code, "message": "The disk is full.", "remedy": "Free some."}
    places.failure.write_text(json.dumps(note))
    with pytest.raises(RunFolderError, match="The disk is full") as caught:
        raise_failure(places, Pace(rounds=1), site.server.store)
    assert caught.value.remedy == "Free some."
