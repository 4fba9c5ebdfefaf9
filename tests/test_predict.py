"""``clfed predict``: pictures in, one answer each, and nothing that is hidden."""

import argparse
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clfed.backbones import Encoder, Identity
from clfed.commands import predict
from clfed.errors import CorruptData, EncoderError, InvalidMessage, MissingData, NotEnoughData
from clfed.federated.bundle import BUNDLE, Bundle
from clfed.prototypes import PrototypeMemory

SIDE = 4
ENCODER = Encoder(
    Identity(),
    {"_target_": "clfed.backbones.Identity"},
    input_shape=(1, SIDE, SIDE),
    mean=(0.0,),
    std=(1.0,),
)
KNOWN = {"dark": 0, "grey [b]": 100, "light": 200}


def picture(path: Path, value: int, *, size: int = SIDE, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = value if mode == "L" else (value,) * 3
    Image.new(mode, (size, size), colour).save(path)
    return path


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    """A node's folder that knows three greys; what is 30 levels off is unknown."""
    known = PrototypeMemory.empty(ENCODER.dim, ENCODER.embedding_id)
    for name, value in KNOWN.items():
        images = torch.full((3, 1, SIDE, SIDE), value, dtype=torch.uint8)
        known += known.observe(ENCODER.embed(images), [name] * 3)
    limit = -SIDE * SIDE * (30 / 255) ** 2 / (1 + 1 / 3)
    (tmp_path / "node").mkdir()
    Bundle(ENCODER, known, limit, "greys", 7).save(tmp_path / "node" / BUNDLE)
    return tmp_path / "node"


def answer(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    predict.add_arguments(parser)
    predict.run(parser.parse_args([*map(str, arguments)]))


def as_json(capsys, *arguments: object) -> list[dict]:
    answer(*arguments, "--json")
    return json.loads(capsys.readouterr().out)


def score(value: int, nearest: int) -> float:
    return -SIDE * SIDE * ((value - nearest) / 255) ** 2 / (1 + 1 / 3)


def test_known_and_unknown(memory, tmp_path, capsys):
    files = [picture(tmp_path / f"{value}.png", value) for value in (5, 111, 145, 229, 231)]
    rows = as_json(capsys, memory, *files)
    assert [list(row) for row in rows] == [["path", "class", "nearest", "score", "error"]] * 5
    assert [row["path"] for row in rows] == [*map(str, files)]
    assert [row["class"] for row in rows] == ["dark", "grey [b]", None, "light", None]
    assert [row["nearest"] for row in rows] == ["dark", "grey [b]", "grey [b]", "light", "light"]
    expected = [score(5, 0), score(111, 100), score(145, 100), score(229, 200), score(231, 200)]
    assert [row["score"] for row in rows] == pytest.approx(expected, rel=1e-3)
    assert {row["error"] for row in rows} == {None}


def test_the_file_itself_says_the_same_as_its_folder(memory, tmp_path, capsys):
    file = picture(tmp_path / "a.png", 90)
    assert as_json(capsys, memory, file) == as_json(capsys, memory / BUNDLE, file)


def test_no_unknown_and_another_threshold(memory, tmp_path, capsys):
    files = [picture(tmp_path / f"{value}.png", value) for value in (20, 45, 255)]
    labels = {
        option: [row["class"] for row in as_json(capsys, memory, *files, *option)]
        for option in [(), ("--no-unknown",), ("--threshold=-0.001",), ("--threshold", "-9.5")]
    }
    assert labels == {
        (): ["dark", None, None],
        ("--no-unknown",): ["dark", "dark", "light"],
        ("--threshold=-0.001",): [None, None, None],
        ("--threshold", "-9.5"): ["dark", "dark", "light"],
    }


def test_folders_are_searched_in_order_and_nothing_is_answered_twice(memory, tmp_path, capsys):
    root = tmp_path / "pictures"
    for name in ("b/2.PNG", "b/1.jpg", "a/deep/er/3.jpeg", "4.png", ".hidden/5.png", "a/.6.png"):
        picture(root / name, 10)
    (root / "note.txt").write_text("no picture")
    (root / "loop").symlink_to(root, target_is_directory=True)
    odd = tmp_path / "odd"
    odd.write_bytes((root / "4.png").read_bytes())
    rows = as_json(capsys, memory, odd, root, root / "4.png", odd)
    assert [os.path.relpath(row["path"], tmp_path) for row in rows] == [
        "odd",
        "pictures/4.png",
        "pictures/a/deep/er/3.jpeg",
        "pictures/b/1.jpg",
        "pictures/b/2.PNG",
    ]


def test_pictures_of_any_size_and_mode_fit_the_encoder(memory, tmp_path, capsys):
    files = [
        picture(tmp_path / "big.png", 100, size=37),
        picture(tmp_path / "colour.jpg", 100, size=9, mode="RGB"),
    ]
    assert [row["class"] for row in as_json(capsys, memory, *files)] == ["grey [b]"] * 2


def test_colours(tmp_path, capsys):
    encoder = Encoder(
        Identity(),
        {"_target_": "clfed.backbones.Identity"},
        input_shape=(3, SIDE, SIDE),
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )
    known = PrototypeMemory.empty(encoder.dim, encoder.embedding_id)
    for name, channel in (("red", 0), ("blue", 2)):
        images = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)
        images[:, channel] = 255
        known += known.observe(encoder.embed(images), [name])
    Bundle(encoder, known, None).save(tmp_path / "colours")
    Image.new("RGB", (8, 8), (10, 0, 240)).save(tmp_path / "sky.png")
    assert as_json(capsys, tmp_path / "colours", tmp_path / "sky.png")[0]["class"] == "blue"


def test_batches_and_order_do_not_matter(memory, tmp_path, capsys, monkeypatch):
    g = np.random.default_rng(0)
    files = []
    for number in range(11):
        pixels = g.integers(0, 256, (6, 6), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        files.append(tmp_path / f"{number}.png")
    whole = as_json(capsys, memory, *files, "--top", 3)
    for size in (1, 2, 5):
        monkeypatch.setattr(predict, "BATCH", size)
        assert as_json(capsys, memory, *files, "--top", 3) == whole
        assert as_json(capsys, memory, *files[::-1], "--top", 3) == whole[::-1]


def test_the_nearest_classes(memory, tmp_path, capsys):
    file = picture(tmp_path / "a.png", 120)
    (row,) = as_json(capsys, memory, file, "--top", 2)
    assert list(row) == ["path", "class", "nearest", "score", "nearest_2", "score_2", "error"]
    assert (row["nearest"], row["nearest_2"]) == ("grey [b]", "light")
    assert row["score_2"] == pytest.approx(score(120, 200), rel=1e-3)
    (more,) = as_json(capsys, memory, file, "--top", 10**9)
    assert more["nearest_3"] == "dark" and "nearest_4" not in more


def test_csv(memory, tmp_path, capsys):
    files = [picture(tmp_path / name, value) for name, value in (("a, b.png", 5), ("c.png", 45))]
    answer(memory, *files, "--csv", "--top", 2)
    told = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(told.out)))
    assert [row["path"] for row in rows] == [*map(str, files)]
    assert [row["class"] for row in rows] == ["dark", ""]
    assert [row["nearest_2"] for row in rows] == ["grey [b]"] * 2
    assert float(rows[1]["score"]) == pytest.approx(score(45, 0), rel=1e-3)
    assert rows == [
        {key: "" if value is None else str(value) for key, value in row.items()}
        for row in as_json(capsys, memory, *files, "--top", 2)
    ]
    assert "1 of 2 pictures called unknown" in told.err


def test_table(memory, tmp_path, capsys):
    picture(tmp_path / "p" / "known.png", 101)
    picture(tmp_path / "p" / "odd.png", 50)
    answer(memory, tmp_path / "p")
    told = " ".join(capsys.readouterr().out.split())
    assert "2 pictures" in told and "grey [b]" in told and "unknown" in told
    assert "1 of 2 pictures called unknown: score below -0.17" in told
    sha = Bundle.load(memory).memory.sha256()
    assert f"3 classes known of greys, round 7; memory {sha[:12]}" in told
    assert ENCODER.embedding_id[:12] in told


def test_long_names_are_not_cut(tmp_path, capsys):
    name = "-".join(f"part{i}" for i in range(18))
    known = PrototypeMemory.empty(ENCODER.dim, ENCODER.embedding_id)
    known = known.observe(torch.zeros(1, ENCODER.dim), [name])
    Bundle(ENCODER, known, -0.5).save(tmp_path / "b")
    files = [picture(tmp_path / "p" / f"{value}.png", value) for value in (0, 255)]
    answer(tmp_path / "b", *files)
    told = capsys.readouterr().out
    assert "…" not in told
    assert len(name) > 80 and told.count("part17") == 2


def test_a_bundle_without_threshold_says_so(memory, tmp_path, capsys):
    open_bundle = Bundle.load(memory)
    Bundle(open_bundle.encoder, open_bundle.memory, None).save(tmp_path / "open")
    answer(tmp_path / "open", picture(tmp_path / "a.png", 45))
    assert "nothing is called unknown" in capsys.readouterr().out
    answer(tmp_path / "open", tmp_path / "a.png", "--json")
    told = capsys.readouterr()
    assert json.loads(told.out)[0]["class"] == "dark"
    assert "nothing is called unknown" in told.err


def test_truth(memory, tmp_path, capsys):
    root = tmp_path / "p"
    for place, value in (("dark/1", 3), ("dark/2", 99), ("light/1", 199), ("light/2", 150)):
        picture(root / f"{place}.png", value)
    for place, value in (("mid/1", 50), ("mid/2", 51), ("mid/3", 90)):
        picture(root / f"{place}.png", value)
    answer(memory, root, "--truth", "--json")
    told = capsys.readouterr()
    truth = ["dark"] * 2 + ["light"] * 2 + ["mid"] * 3
    assert [row["truth"] for row in json.loads(told.out)] == truth
    assert "of known classes: accuracy 50.0%, 1 of 4 pictures called unknown" in told.err
    assert "of other classes: 2 of 3 pictures called unknown" in told.err
    answer(memory, root / "dark" / "1.png", "--truth")
    told = capsys.readouterr()
    assert "accuracy 100.0%" in told.out and "other classes" not in told.out
    answer(memory, root, "--json")
    assert "accuracy" not in capsys.readouterr().err


def test_a_damaged_picture_does_not_stop_the_others(memory, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "BATCH", 2)
    whole = picture(tmp_path / "0.png", 100, size=64).read_bytes()
    (tmp_path / "1.png").write_bytes(whole[:40])
    (tmp_path / "2.png").write_bytes(b"no picture")
    (tmp_path / "3.png").write_bytes(b"")
    picture(tmp_path / "4.png", 200)
    files = [tmp_path / f"{number}.png" for number in range(5)]
    with pytest.raises(CorruptData, match=r"5 pictures, got 3 .*1\.png.*others are answered"):
        answer(memory, *files, "--json", "--truth", "--top", 2)
    told = capsys.readouterr()
    rows = json.loads(told.out)
    assert [row["class"] for row in rows] == ["grey [b]", None, None, None, "light"]
    assert [row["score"] is None for row in rows] == [False, True, True, True, False]
    assert len({tuple(row) for row in rows}) == 1
    for row, file in zip(rows[1:4], files[1:4], strict=True):
        assert str(file) in row["error"]
    assert "of 2 pictures" in told.err
    with pytest.raises(CorruptData):
        answer(memory, *files)
    assert capsys.readouterr().out.count("cannot be read") == 3


def test_names_that_are_no_text(memory, tmp_path, capsys):
    strange = os.fsencode(tmp_path) + b"/\xff\x1b.png"
    whole = picture(tmp_path / "a.png", 100).read_bytes()
    Path(os.fsdecode(strange)).write_bytes(whole)
    for form in ("--json", "--csv"):
        answer(memory, os.fsdecode(strange), form)
        assert "grey [b]" in capsys.readouterr().out
    answer(memory, os.fsdecode(strange))
    told = capsys.readouterr().out
    assert "??.png" in told and "\x1b" not in told


def test_nothing_to_answer(memory, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "note.txt").write_text("no picture")
    with pytest.raises(NotEnoughData, match="empty") as caught:
        answer(memory, tmp_path / "empty")
    assert ".png" in caught.value.remedy
    with pytest.raises(MissingData, match="absent"):
        answer(memory, tmp_path / "empty", tmp_path / "absent")


def test_bundles_that_cannot_answer(memory, tmp_path):
    file = picture(tmp_path / "a.png", 5)
    with pytest.raises(MissingData, match="bundle"):
        answer(tmp_path / "absent", file)
    (tmp_path / "damaged").write_bytes((memory / BUNDLE).read_bytes()[:-1])
    with pytest.raises(InvalidMessage, match="damaged"):
        answer(tmp_path / "damaged", file)
    Bundle(ENCODER, PrototypeMemory.empty(ENCODER.dim, ENCODER.embedding_id), None).save(
        tmp_path / "new"
    )
    with pytest.raises(NotEnoughData, match="at least one known class"):
        answer(tmp_path / "new", file)
    features = Encoder(Identity(), {"_target_": "clfed.backbones.Identity"}, input_shape=(5,))
    known = PrototypeMemory.empty(5, features.embedding_id).observe(torch.zeros(1, 5), ["a"])
    Bundle(features, known, None).save(tmp_path / "features")
    with pytest.raises(EncoderError, match="encoder of square pictures") as caught:
        answer(tmp_path / "features", file)
    assert "ready features" in caught.value.remedy


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["memory"],
        ["memory", "a.png", "--threshold", "nan"],
        ["memory", "a.png", "--threshold", "low"],
        ["memory", "a.png", "--threshold", "-1", "--no-unknown"],
        ["memory", "a.png", "--json", "--csv"],
        ["memory", "a.png", "--top", "0"],
        ["memory", "a.png", "--top", "1.5"],
    ],
    ids=" ".join,
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        answer(*arguments)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


def test_declaring_the_command_imports_nothing_heavy():
    program = (
        "import argparse, sys; from clfed.commands import predict\n"
        "predict.add_arguments(argparse.ArgumentParser())\n"
        "print([m for m in ('torch', 'numpy', 'PIL', 'rich', 'flwr') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert said.stdout.strip() == "[]", said.stderr


def test_flower_is_not_needed_to_predict(memory, tmp_path):
    file = picture(tmp_path / "a.png", 100)
    program = (
        "import argparse, sys; from clfed.commands import predict\n"
        "parser = argparse.ArgumentParser(); predict.add_arguments(parser)\n"
        f"predict.run(parser.parse_args([{str(memory)!r}, {str(file)!r}]))\n"
        "print([m for m in ('flwr', 'lightning', 'wandb', 'matplotlib') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert said.stdout.splitlines()[-1] == "[]", said.stderr


def test_a_folder_that_cannot_be_read_is_not_passed_over(memory, tmp_path, monkeypatch):
    picture(tmp_path / "p" / "a.png", 5)
    picture(tmp_path / "p" / "locked" / "b.png", 5)
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(MissingData, match=r"locked.*Permission denied"):
        answer(memory, tmp_path / "p")
