"""``clfed forget``: what is asked is noted once, what cannot be asked is not, and both are told."""

import argparse
import hashlib
import json
import subprocess
import sys

import pytest
from test_forgetting import PICTURES, World, content_of

from clfed.commands import forget
from clfed.errors import MissingData, RequestError
from clfed.federated.outbox import outbox_of
from clfed.unlearning.requests import Request, read_requests, to_file


@pytest.fixture(scope="module")
def met(tmp_path_factory):
    """A federation after its first round."""
    world = World(tmp_path_factory.mktemp("met"))
    world.rounds()
    return world


@pytest.fixture
def asked(met):
    """The same, in which nobody has asked for anything."""
    yield met
    met.store.execute("DELETE FROM requests")
    for name in met.names:
        for path in outbox_of(met.state(name)):
            path.unlink()


def call(*words):
    parser = argparse.ArgumentParser()
    forget.add_arguments(parser)
    forget.run(parser.parse_args([*map(str, words)]))


def noted(world):
    return [one.request for one in world.store.requests()]


def waits(world, name):
    return [json.loads(path.read_bytes()) for path in outbox_of(world.state(name))]


def test_a_class_at_the_server(asked, capsys):
    call(asked.home, "--class", "fox", "elk")
    (request,) = noted(asked)
    assert request.kind == "class" and request.classes == ("fox", "elk")
    assert request.id.startswith("class-20") and len(request.id) == len("class-20250101-12345678")
    told = capsys.readouterr().out
    assert f"now {4 * PICTURES} examples (3 of a, 6 of b, 3 of c)." in told
    assert f"clfed status {asked.home}" in told and "at its next round" in told
    assert asked.asked(request.id).origin == "operator"


def test_a_picture_as_a_file_or_as_its_hash(asked, capsys):
    path = asked.root / "b" / "fox" / "1.png"
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    other = content_of(asked.root / "a" / "owl" / "0.png")
    call(asked.home, "--picture", path, content.upper(), other, "--id", "mine")
    (request,) = noted(asked)
    assert request == Request("mine", "picture", pictures=(content, other))
    assert "2 pictures, at every node" in capsys.readouterr().out
    call(asked.state("b"), "--picture", path)
    assert waits(asked, "b")[0]["pictures"] == [content]
    told = capsys.readouterr().out
    assert "1 picture, at every node" in told and "1 of this node's files are meant" in told
    assert "with this node's next reply" in told


def test_what_nobody_knows_is_said_and_noted(asked, capsys):
    call(asked.home, "--class", "gnu")
    assert len(noted(asked)) == 1
    told = capsys.readouterr().out
    assert "nothing is known here so far" in told and "shut out wherever it comes from" in told


def test_a_contributor(asked, capsys):
    call(asked.home, "--contributor", "b")
    assert noted(asked)[0].contributor == "b"
    assert f"now {2 * PICTURES} examples ({2 * PICTURES} of b)" in capsys.readouterr().out
    asked.federation.invite("z", asked.root / "z.invitation")
    call(asked.home, "--contributor", "z")  # was invited, and may be on its way
    assert noted(asked)[1].contributor == "z"


def test_a_node_about_itself(asked, capsys):
    call(asked.state("c"), "--me")
    call(asked.state("a"), "--contributor", "a", "--id", "x")
    assert waits(asked, "c")[0]["contributor"] == "c"
    assert waits(asked, "a") == [{"id": "x", "kind": "contributor", "contributor": "a"}]
    assert "everything of contributor c, now 6 examples" in capsys.readouterr().out


def test_a_file_of_requests(asked, tmp_path):
    requests = [
        Request("r1", "class", classes=("fox",)),
        Request("r2", "picture", pictures=("0" * 64,)),
        Request("r3", "contributor", contributor="a"),
    ]
    to_file(requests, tmp_path / "requests.yaml")
    assert read_requests(tmp_path / "requests.yaml") == requests
    call(asked.home, "--request", tmp_path / "requests.yaml")
    assert noted(asked) == requests
    call(asked.state("a"), "--request", tmp_path / "requests.yaml")
    assert [Request.parse(one) for one in waits(asked, "a")] == requests


def refused(world, *words, match, error=RequestError):
    """Neither side has noted anything."""
    before = noted(world), [waits(world, name) for name in world.names]
    with pytest.raises(error, match=match) as caught:
        call(*words)
    assert (noted(world), [waits(world, name) for name in world.names]) == before
    assert len(str(caught.value).splitlines()) == 1 and caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "got none"),
        (["--class", "fox", "--picture", "0" * 64], "got --class and --picture"),
        (["--contributor", "b", "--class", "fox"], "got --class and --contributor"),
        (["--me"], "state directory of a node"),
        (["--contributor", "lodeg"], "a, b, c.*'lodeg', who was never invited"),
        (["--contributor", ""], "got none"),
        (["--class", "fox", "fox"], "one twice"),
        (["--class", ""], "printable"),
        (["--class", "fo\nx"], "printable"),
        (["--class", "x" * 129], "1 to 128 characters"),
        (["--class", "fox", "--id", "../fox"], "as id of a request"),
        (["--class", "fox", "--id", ""], "as id of a request"),
        (["--picture", "nowhere.png"], "'nowhere.png'"),
        (["--picture", "."], "a file"),
        (["--picture", "0" * 63], "SHA-256"),
        (["--request", "nowhere.yaml"], "nowhere.yaml"),
        (["--request", "x.yaml", "--id", "x"], "--id too"),
    ],
)
def test_what_cannot_be_asked(asked, words, match):
    assert refused(asked, asked.home, *words, match=match).code == 60


def test_all_of_a_file_or_nothing(asked, tmp_path):
    good = Request("good", "class", classes=("fox",))
    for bad in (
        Request("bad", "sample", samples=(1,)),
        Request("bad", "contributor", contributor="nobody"),
    ):
        to_file([good, bad], tmp_path / "two.yaml")
        refused(asked, asked.home, "--request", tmp_path / "two.yaml", match="bad|nobody")
        refused(asked, asked.state("a"), "--request", tmp_path / "two.yaml", match="bad|nobody")
    to_file([good, Request("known", "class", classes=("elk",))], tmp_path / "two.yaml")
    call(asked.home, "--class", "owl", "--id", "known")
    refused(asked, asked.home, "--request", tmp_path / "two.yaml", match="'known'")


def test_an_id_twice(asked):
    for place in (asked.home, asked.state("a")):
        call(place, "--class", "fox")
        refused(asked, place, "--class", "fox", match="was asked before")
        call(place, "--class", "fox", "--id", "other")
        refused(asked, place, "--class", "owl", "--id", "other", match="'other'")


def test_a_node_asks_for_itself_alone(asked):
    error = refused(asked, asked.state("a"), "--contributor", "b", match="'a' about itself")
    assert "--me" in error.remedy


def test_neither_a_federation_nor_a_node(asked, tmp_path):
    for place in (tmp_path, tmp_path / "nowhere", asked.root / "a"):
        error = refused(asked, place, "--class", "fox", match="neither", error=MissingData)
        assert error.code == 10


def test_from_the_command_to_the_certificate(tmp_path, capsys):
    world = World(tmp_path)
    world.rounds()
    call(world.home, "--class", "fox", "--id", "one")
    call(world.state("c"), "--me", "--id", "two")
    world.rounds(2)
    assert world.memory.classes == ("elk", "owl")
    assert [asked.finished is not None for asked in world.store.requests()] == [True, True]
    for name, words in (("a", ["--class", "fox", "--id", "one"]), ("c", ["--class", "owl"])):
        refused(world, world.state(name), *words, match="asked before|was forgotten")
    refused(world, world.home, "--class", "owl", "--id", "two", match="'two'")


def test_help_needs_no_torch():
    code = "import clfed.commands.forget as f, sys; assert f.SENTENCE; assert not {'torch', 'flwr', 'lightning'} & {*sys.modules}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
