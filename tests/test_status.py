"""``clfed status``: what a real little federation did, as data, as text and as pictures."""

import argparse
import copy
import csv
import hashlib
import io
import json
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from test_encoder import conv4_encoder

from clfed.commands import status
from clfed.deploy.charts import MOST, NAMED, federation_charts, sums_by_node
from clfed.deploy.federation import Federation, Rules
from clfed.deploy.node_status import node_status
from clfed.deploy.pace import Pace
from clfed.deploy.serving import Server
from clfed.deploy.status_view import age, federation_view, node_view
from clfed.deploy.watching import federation_status, history, round_account
from clfed.errors import (
    ConfigError,
    InvalidMessage,
    MissingData,
    NotEnoughData,
    RequestError,
    RunFolderError,
    VersionMismatch,
)
from clfed.federated.client_app import app
from clfed.federated.grid import LocalGrid
from clfed.unlearning.requests import Request


class Field(LocalGrid):
    """Nodes that are not there, or that are there and do not answer."""

    absent: frozenset[int] = frozenset()
    silent: frozenset[int] = frozenset()

    def get_node_ids(self):
        return [node for node in super().get_node_ids() if node not in self.absent]

    def push_messages(self, messages):
        return [
            "lost" if message.metadata.dst_node_id in self.silent else self._handle(message)
            for message in messages
        ]


FOLDERS = {"a": ("owl", "fox"), "b": ("fox", "elk"), "c": ("owl",), "e": ("owl", "asp")}


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """Four rounds: one request finished, one on its way, one waiting; every state of a node."""
    root = tmp_path_factory.mktemp("birds")
    rng = np.random.default_rng(0)
    for node, classes in FOLDERS.items():
        for name in classes:
            (root / node / name).mkdir(parents=True)
            for index in range(4):
                pixels = rng.integers(0, 255, (28, 28), dtype=np.uint8)
                Image.fromarray(pixels).save(root / node / name / f"{index}.png")
    (root / "b" / "elk" / "torn.png").write_bytes(b"no picture")
    encoder = conv4_encoder()
    rules = Rules()
    federation = Federation.create(
        root / "fed", name="birds", address="localhost:8000", encoder=encoder, rules=rules
    )
    federation.invite("d", root / "d.invitation")
    identity = dict.fromkeys(FOLDERS, federation.embedding) | {"c": "0" * 64}
    grid = Field(
        app,
        [
            {
                "name": node,
                "folder": str(root / node),
                "state-dir": str(root / f"state-{node}"),
                "embedding": identity[node],
            }
            for node in FOLDERS
        ],
    )
    store = federation.store()
    for number, node in enumerate(FOLDERS, start=1):
        store.update_node(node, node_id=str(number))
    reports = []
    pace = Pace(every=0, patience=0.3)
    server = Server(federation, store, grid, pace, report=reports.append)
    grid.absent = frozenset({3, 4})
    server.round()
    store.ask(Request("r0", "class", classes=("fox",)), "operator")
    server.round()
    grid.absent = frozenset()
    server.round()
    picture = hashlib.sha256((root / "a" / "owl" / "0.png").read_bytes()).hexdigest()
    store.ask(Request("r1", "picture", pictures=(picture,)), "a")
    grid.absent, grid.silent = frozenset({4}), frozenset({2})
    server.round()
    store.ask(Request("r2", "contributor", contributor="e"), "operator")
    store.close()
    memory = server.strategy.memory.sha256()
    folder = federation.folder
    return SimpleNamespace(
        root=root, folder=folder, reports=reports, picture=picture, memory=memory, id=federation.id
    )


@pytest.fixture
def folder(birds, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(birds.folder, tmp_path / "fed")
    return tmp_path / "fed"


@pytest.fixture
def fresh(tmp_path):
    """A federation in which nothing has happened."""
    encoder = conv4_encoder()
    return Federation.create(
        tmp_path / "new", name="new", address="localhost:1", encoder=encoder, rules=Rules()
    ).folder


def ask(*arguments):
    parser = argparse.ArgumentParser()
    status.add_arguments(parser)
    status.run(parser.parse_args([*map(str, arguments)]))


def as_json(capsys, *arguments):
    ask(*arguments, "--json")
    return json.loads(capsys.readouterr().out)


def text_of(view, width=120):
    console = Console(record=True, width=width, file=io.StringIO(), highlight=False)
    console.print(view)
    return console.export_text()


def by_name(rows, key="name"):
    return {row[key]: row for row in rows}


# --- a federation as data ---------------------------------------------------------------------


def test_rounds_are_those_that_the_server_reported(birds, capsys):
    told = as_json(capsys, birds.folder)
    assert told["kind"] == "federation" and told["name"] == "birds" and told["id"] == birds.id
    assert told["address"] == "localhost:8000" and 800 < told["certificate_days"] < 830
    assert told["rounds"] == [asdict(report) for report in reversed(birds.reports)]
    assert told["round"] == told["rounds"][0] and told["round"]["number"] == 4
    assert told["round"]["memory"] == birds.memory
    # owl: 3 of a, 4 of e; elk: 4 of b; asp: 4 of e
    assert (told["round"]["classes"], told["round"]["examples"]) == (3, 15)


def test_every_node_is_there_with_its_state(birds):
    nodes = by_name(federation_status(birds.folder)["nodes"])
    states = {name: node["state"] for name, node in nodes.items()}
    assert states == {
        "a": "connected",
        "b": "late",
        "c": "connected",
        "d": "never seen",
        "e": "away",
    }
    held = {name: (node["classes"], node["examples"]) for name, node in nodes.items()}
    assert held == {"a": (1, 3), "b": (1, 4), "c": (0, 0), "d": (0, 0), "e": (2, 8)}
    assert nodes["a"]["pictures"] == 3 and nodes["d"]["pictures"] is None
    # The picture that was forgotten in round 4 is in what b and e hold.
    assert {name for name, node in nodes.items() if node["current"]} == {"a"}
    assert nodes["c"]["refused"] == 2 and "embedding" in nodes["c"]["note"]
    assert nodes["d"]["last_seen"] is None and nodes["d"]["up"] == 0
    with sqlite3.connect(birds.folder / "ledger.db") as db:
        kept = "name, up, down, seconds, accepted, refused"
        for name, *values in db.execute(f"SELECT {kept} FROM nodes"):
            assert [nodes[name][key] for key in kept.split(", ")[1:]] == values
    assert nodes["a"]["accepted"] > 0 == nodes["a"]["refused"] and nodes["a"]["up"] > 0


def test_a_late_node_has_come_back_when_it_answers(birds, folder):
    with sqlite3.connect(folder / "ledger.db") as db:
        db.execute("UPDATE nodes SET note = '', last_seen = last_seen + 1e6 WHERE name = 'b'")
    assert by_name(federation_status(folder)["nodes"])["b"]["state"] == "connected"


def test_one_that_was_late_in_an_old_round_is_away(birds, folder):
    with sqlite3.connect(folder / "ledger.db") as db:
        db.execute("UPDATE nodes SET note = 'no answer in round 2' WHERE name = 'b'")
    assert by_name(federation_status(folder)["nodes"])["b"]["state"] == "away"


def test_requests_tell_who_is_awaited(birds):
    requests = by_name(federation_status(birds.folder)["requests"], "id")
    assert [*requests] == ["r0", "r1", "r2"]
    done, open_, new = requests.values()
    assert done["state"] == "finished" and done["what"] == ["fox"] and done["awaited"] == []
    assert done["confirmed"] == {"a": 4, "b": 4, "e": 0} and done["finished"] > done["applied"]
    assert open_["state"] == "applied" and open_["what"] == [birds.picture]
    assert open_["origin"] == "a" and open_["kind"] == "picture"
    assert open_["confirmed"] == {"a": 1} and open_["awaited"] == ["b", "e"]
    assert new["state"] == "waiting" and new["what"] == "e" and new["applied"] is None


def test_refused_messages_come_with_their_reason(birds):
    refusals = federation_status(birds.folder)["refusals"]
    assert [(row["node"], row["round"]) for row in refusals] == [("c", 4), ("c", 3)]
    assert all("embedding" in row["reason"] for row in refusals)


def test_the_account_of_a_round_adds_up(birds):
    with sqlite3.connect(birds.folder / "ledger.db") as db:
        messages = db.execute("SELECT round, node, up, down, seconds FROM messages").fetchall()
    for number in (1, 2, 3, 4):
        account = by_name(round_account(birds.folder, number), "node")
        mine = [row for row in messages if row[0] == number]
        assert account.keys() == {row[1] for row in mine}
        for node, row in account.items():
            assert row["round"] == number
            assert row["messages"] == sum(one[1] == node for one in mine)
            for index, key in ((2, "up"), (3, "down"), (4, "seconds")):
                assert row[key] == pytest.approx(sum(o[index] for o in mine if o[1] == node))
    assert {node for node, row in account.items() if row["refused"]} == {"c"}
    assert federation_status(birds.folder)["account"] == [*account.values()]
    assert round_account(birds.folder, 99) == []


def test_the_account_of_a_running_round_can_be_seen(birds, folder):
    with sqlite3.connect(folder / "ledger.db") as db:
        db.execute("INSERT INTO messages VALUES (5, 'a', 1, 10, 20, 0.5, 3, '')")
    (row,) = federation_status(folder, number=5)["account"]
    assert (row["node"], row["up"], row["rows"]) == ("a", 10, 3)
    nothing = federation_status(birds.folder, number=5)
    assert nothing["account"] == []
    assert "no node sent anything" in text_of(federation_view(nothing, account=True))


@pytest.mark.parametrize("number", [-1, 0, 6, 2**70])
def test_a_round_that_never_was_is_refused(birds, number):
    with pytest.raises(ConfigError, match=r"from 1 to 5"):
        federation_status(birds.folder, number=number)


def test_looking_changes_nothing(birds):
    def state():
        return {
            path: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted(birds.folder.rglob("*"))
            if path.is_file()
        }

    before = state()
    federation_status(birds.folder)
    history(birds.folder)
    assert state() == before


def test_a_writer_is_not_waited_for(birds, folder):
    before = federation_status(folder, now=0.0)
    db = sqlite3.connect(folder / "ledger.db", isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    db.execute("DELETE FROM rounds")
    during = federation_status(folder, now=0.0)
    db.execute("COMMIT")
    db.close()
    assert {**during, "certificate_days": 0} == {**before, "certificate_days": 0}
    assert federation_status(folder)["round"] is None


def test_a_server_that_was_killed_while_it_wrote_is_no_obstacle(birds, folder, tmp_path):
    db = sqlite3.connect(folder / "ledger.db", isolation_level=None)
    db.execute("PRAGMA cache_size = 1")
    db.execute("BEGIN IMMEDIATE")
    db.execute("DELETE FROM rounds")
    # More than fits into the cache is in the file before it is committed.
    for index in range(2000):
        row = (9, f"node {index}", 1.0, 1, 1, 1.0, 1, "x" * 100)
        db.execute("INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
    shutil.copytree(folder, tmp_path / "killed")
    db.execute("ROLLBACK")
    db.close()
    assert (tmp_path / "killed" / "ledger.db-journal").stat().st_size > 0
    assert (tmp_path / "killed" / "ledger.db").stat().st_size > 100_000
    now, old = (federation_status(one) for one in (tmp_path / "killed", birds.folder))
    assert now["round"] == old["round"] and now["refusals"] == old["refusals"]


# --- a federation for people ------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_view_shows_what_the_data_say(birds, width):
    told = federation_status(birds.folder)
    text = text_of(federation_view(told), width)
    assert "birds at localhost:8000" in text and birds.memory[:12] in text
    assert "round 4, finished" in text and "3 classes, 15 examples" in text
    for word in ("connected", "late", "away", "never seen", "current", "accepted", "kB down"):
        assert word in text
    words = " ".join(text.split())
    assert "no answer in round 4" in words and "3 of 4" in words
    assert "waits for" in words and "finished" in words and birds.picture[:12] in words
    assert "Round 4" not in text and "Round 4" in text_of(federation_view(told, account=True))


def test_the_command_prints_the_view(birds, capsys):
    ask(birds.folder, "--round", 3)
    out = capsys.readouterr().out
    assert "Round 3" in out and "Refused messages" in out and "Requests to forget" in out


def test_nothing_yet_is_said(fresh):
    told = federation_status(fresh)
    assert (told["round"], told["nodes"], told["rounds"], told["account"]) == (None, [], [], [])
    text = text_of(federation_view(told))
    assert "no round has been finished yet" in text and "clfed invite" in text


def test_long_names_are_whole_and_names_do_not_steer_the_terminal(birds):
    told = federation_status(birds.folder)
    told["nodes"][0]["name"] = "Ł" * 128
    told["nodes"][1]["name"] = "[red]b[/red]"
    told["nodes"][1]["note"] = "\x1b[2J\x9b2J gone"
    told["refusals"][0]["reason"] = "evil\x1b]0;title\x07"
    for width in (80, 140):
        text = text_of(federation_view(told), width)
        assert text.count("Ł") % 128 == 0 and "Ł" in text
        assert "[red]b[/red]" in text
        assert not {"\x1b", "\x9b", "\x07"} & {*text} and "?[2J?2J gone" in text


@pytest.mark.parametrize(
    ("days", "words"), [(-3.2, "expired 3 days ago"), (12.0, "good for 12 days")]
)
def test_the_certificate_is_spoken_of(birds, days, words):
    told = federation_status(birds.folder) | {"certificate_days": days}
    assert words in text_of(federation_view(told))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (-5, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (5399, "90 min"),
        (5400, "2 h"),
        (129600, "2 days"),
        (8.64e7, "1000 days"),
    ],
)
def test_ages_are_in_words(seconds, text):
    assert age(seconds) == text


def test_requests_are_in_words(birds):
    text = " ".join(text_of(federation_view(federation_status(birds.folder)), 200).split())
    assert "confirmed by 1 of 3, not by b, e" in text
    assert "waits for the next round" in text and "ago, 8 examples" in text


def test_many_pictures_are_not_all_written_out(birds):
    told = federation_status(birds.folder)
    told["requests"][1]["what"] = [f"{index:064x}" for index in range(7)]
    assert "and 4 more" in " ".join(text_of(federation_view(told), 200).split())


# --- a node -----------------------------------------------------------------------------------


def test_a_node_tells_what_it_holds(birds, capsys):
    told = as_json(capsys, birds.root / "state-a")
    assert told["kind"] == "node" and told["federation_id"] == birds.id
    assert (told["name"], told["federation"]) == ("a", "birds")
    assert told["classes"] == {"owl": 3} and told["pictures"] == 3 and told["unreadable"] == 0
    assert told["memory"]["sha256"] == birds.memory
    assert (told["memory"]["classes"], told["memory"]["examples"]) == (3, 15)
    assert told["requests"] == {"r0": 4, "r1": 1} and told["retired"] == ["fox"]
    assert told["erased"] == 1 and not told["forgotten"] and told["outbox"] == []
    text = text_of(node_view(told))
    assert birds.memory[:12] in text and "owl" in text and "r1" in text and "fox" in text


def test_a_node_that_was_silent_holds_the_memory_of_before(birds):
    told = node_status(birds.root / "state-b")
    assert told["memory"]["sha256"] == birds.reports[2].memory != birds.memory
    assert told["unreadable"] == 1 and told["pictures"] == 5
    assert "1 of them cannot be read" in text_of(node_view(told))


def test_requests_in_the_outbox_are_shown(birds, tmp_path):
    node = tmp_path / "node"
    shutil.copytree(birds.root / "state-a", node)
    (node / "bundle.safetensors").unlink()
    (node / "outbox").mkdir(exist_ok=True)
    request = Request("mine", "class", classes=("owl",))
    (node / "outbox" / "mine.json").write_text(json.dumps(request.plain()))
    told = node_status(node)
    assert told["outbox"] == [{"id": "mine", "kind": "class", "what": ["owl"]}]
    text = text_of(node_view(told))
    assert "Waiting for the next round" in text and "holds no merged memory yet" in text
    (node / "outbox" / "mine.json").write_text('{"id": "mine"}')
    with pytest.raises(RequestError, match=r"mine\.json"):
        node_status(node)


def test_a_node_is_read_again_when_it_has_changed(birds, tmp_path):
    node = tmp_path / "node"
    shutil.copytree(birds.root / "state-a", node)
    first = node_status(node)
    for name in ("node.safetensors", "bundle.safetensors"):
        shutil.copyfile(birds.root / "state-b" / name, node / name)
    second = node_status(node)
    assert first["classes"] == {"owl": 3} and second["classes"] == {"elk": 4}
    assert first["memory"]["sha256"] != second["memory"]["sha256"]


@pytest.mark.parametrize("option", ["--round=1", "--figures=x", "--csv=x"])
def test_a_node_knows_no_rounds(birds, option):
    with pytest.raises(ConfigError, match=option.split("=")[0]):
        ask(birds.root / "state-a", option)


# --- what is missing or damaged ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("federation.json", b"{", InvalidMessage),
        ("federation.json", b"[]", InvalidMessage),
        ("federation.json", b"\xff\xfe", InvalidMessage),
        ("federation.json", b'{"schema": 1}', InvalidMessage),
        ("ledger.db", b"this is no database at all, " * 200, RunFolderError),
        ("ledger.db", b"", RunFolderError),
        ("ledger.db", None, MissingData),
        ("server.pem", b"-----BEGIN CERTIFICATE-----", InvalidMessage),
        ("server.pem", None, MissingData),
    ],
)
def test_a_damaged_federation_is_one_sentence(folder, name, data, error):
    (folder / name).unlink()
    if data is not None:
        (folder / name).write_bytes(data)
    with pytest.raises(error) as caught:
        ask(folder)
    assert caught.value.remedy and "\n" not in str(caught.value)


def test_another_schema_is_another_version(folder):
    path = folder / "federation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(VersionMismatch, match="99"):
        ask(folder)


def test_a_ledger_of_another_schema_is_refused(folder):
    with sqlite3.connect(folder / "ledger.db") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(RunFolderError, match="99"):
        ask(folder)


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_a_place_that_is_neither_is_named(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(MissingData, match=name):
        ask(tmp_path / name)


# --- live view --------------------------------------------------------------------------------


def test_the_live_view_looks_until_an_interrupt(birds):
    looks, pauses = [], []

    def draw():
        looks.append(federation_status(birds.folder)["round"]["number"])
        return f"look {len(looks)}"

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=60, highlight=False)
    with pytest.raises(KeyboardInterrupt):
        status.watch(draw, console, pause)
    assert len(looks) == 3 and pauses == [1.0] * 3
    assert all(f"look {number}" in screen.getvalue() for number in (1, 2, 3))


def test_a_live_view_needs_a_terminal():
    with pytest.raises(ConfigError, match="terminal"):
        status.watch(lambda: "x", Console(file=io.StringIO()), lambda seconds: None)


# --- files ------------------------------------------------------------------------------------


def test_figures_show_something(birds, tmp_path, capsys):
    folder = tmp_path / "deep" / "figures"
    ask(birds.folder, "--figures", folder)
    said = "".join(capsys.readouterr().out.split())
    bare = federation_charts([asdict(birds.reports[0])], [], tmp_path)
    assert [path.name for path in bare] == ["known.png", "bytes.png", "seconds.png", "refused.png"]
    for other in bare:
        assert "".join(f"wrote {folder / other.name}".split()) in said
        with Image.open(folder / other.name) as image, Image.open(other) as empty:
            assert image.size == empty.size == (1200, 720)
            pixels, nothing = (np.asarray(one.convert("RGB"), int) for one in (image, empty))
        assert len(np.unique(pixels @ (1, 256, 65536))) > 50
        assert (pixels != nothing).any(axis=2).sum() > 1000


def test_figures_take_odd_names_and_many_rounds(birds, tmp_path):
    rounds = [{**asdict(birds.reports[0]), "number": number} for number in range(1, 1001)]
    names = ["_hidden", "$x_{", "\\frac", *(f"node {index}" for index in range(9))]
    messages = [
        {"round": 1 + index % 1000, "node": names[index % 12], "up": 5, "down": 5, "refused": "x"}
        for index in range(3000)
    ]
    paths = federation_charts(rounds, messages, tmp_path)
    assert all(path.stat().st_size > 5000 for path in paths)


messages = st.tuples(
    st.sampled_from("abcdefghij"), st.integers(1, 500), st.integers(1, 9).map(float)
)


@given(st.lists(messages, max_size=40), st.integers(500, 2000))
def test_bars_lose_nothing(amounts, last):
    bars = sums_by_node(amounts, last)
    assert len(bars) <= NAMED + 1 and all(len(one) <= MOST for one in bars.values())
    assert sum(one.sum() for one in bars.values()) == sum(amount for _, _, amount in amounts)
    totals = {}
    for node, _, amount in amounts:
        totals[node] = totals.get(node, 0) + amount
    for node in [*bars][:NAMED]:
        assert bars[node].sum() == totals[node]
        assert bars[node].sum() >= max([totals[one] for one in totals.keys() - bars.keys()] or [0])


def test_a_bar_holds_its_own_rounds():
    bars = sums_by_node([("a", 1, 1.0), ("a", 2, 2.0), ("a", 3, 4.0), ("a", 120, 8.0)], 120)
    assert len(bars["a"]) == 60 and bars["a"].nonzero()[0].tolist() == [0, 1, 59]
    assert bars["a"][[0, 1, 59]].tolist() == [3.0, 4.0, 8.0]


def test_csv_holds_the_whole_history(birds, tmp_path):
    ask(birds.folder, "--csv", tmp_path)
    rounds, messages = history(birds.folder)
    assert [row["number"] for row in rounds] == [1, 2, 3, 4]
    for name, rows in (("rounds", rounds), ("messages", messages)):
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            assert [*csv.DictReader(file)] == [
                {key: str(value) for key, value in row.items()} for row in rows
            ]


@pytest.mark.parametrize("option", ["--figures", "--csv"])
def test_without_a_round_there_is_nothing_to_write(fresh, tmp_path, option):
    with pytest.raises(NotEnoughData, match="round"):
        ask(fresh, option, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(birds, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="file"):
        ask(birds.folder, "--csv", tmp_path / "file" / "below")


# --- cost -------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--json", "--round=1"])
def test_a_federation_is_watched_without_torch(birds, option):
    code = f"""
import argparse, sys
from clfed.commands import status
parser = argparse.ArgumentParser()
status.add_arguments(parser)
status.run(parser.parse_args([{str(birds.folder)!r}, {option!r}]))
heavy = {{"torch", "flwr", "lightning", "numpy", "matplotlib", "wandb"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_view_does_not_change_what_it_is_given(birds):
    told = federation_status(birds.folder)
    before = copy.deepcopy(told)
    text_of(federation_view(told, account=True))
    assert told == before
