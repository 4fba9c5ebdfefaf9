"""A folder of one's own pictures: names, odd files, damaged files."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clfed.data.folder import load
from clfed.errors import ConfigError, CorruptData, MissingData, NotEnoughData


def picture(path: Path, value=100, mode="RGB", size=(9, 9)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode != "RGB" else (value, value, value)).save(path)
    return path


def test_classes_are_sorted_and_pictures_follow_their_names(tmp_path):
    for name, value in (("pear", 30), ("apple", 10), ("apple/../fig", 20)):
        picture(tmp_path / name / "b.PNG", value + 1)
        picture(tmp_path / name / "a.png", value)
    pool = load(str(tmp_path)).train
    assert pool.classes == ("apple", "fig", "pear")
    assert pool.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert pool.images[:, 0, 0, 0].tolist() == [10, 11, 20, 21, 30, 31]


def test_channels_size_and_groups(tmp_path):
    for index in range(4):
        picture(tmp_path / f"c{index}" / "x.jpg", size=(30, 10))
    benchmark = load(str(tmp_path), image_size=12, channels=3, base_classes=3, validation_classes=1)
    assert benchmark.train.images.shape == (4, 3, 12, 12)
    assert tuple(map(len, benchmark.groups.values())) == (2, 1, 1)
    assert len(benchmark.mean) == 3 and benchmark.test is None
    plain = load(str(tmp_path))
    assert plain.mean == plain.std == (0.5,)
    assert plain.groups["field"] == ("c0", "c1", "c2", "c3")


def test_one_class_is_enough(tmp_path):
    picture(tmp_path / "only" / "x.png")
    assert load(str(tmp_path)).groups["field"] == ("only",)


def test_no_pictures(tmp_path):
    with pytest.raises(MissingData, match="nowhere") as caught:
        load(str(tmp_path / "nowhere"))
    assert "clfed data=folder data.root=PATH" in caught.value.remedy
    picture(tmp_path / "root" / "loose.png")
    picture(tmp_path / "root" / "deep" / "deeper" / "x.png")
    (tmp_path / "root" / "empty").mkdir()
    with pytest.raises(NotEnoughData, match=str(tmp_path / "root")):
        load(str(tmp_path / "root"))
    with pytest.raises(MissingData, match=r"loose\.png"):
        load(str(tmp_path / "root" / "loose.png"))


def test_hidden_and_foreign_files_are_ignored(tmp_path):
    picture(tmp_path / "a" / "x.png")
    picture(tmp_path / "a" / ".hidden.png")
    picture(tmp_path / ".trash" / "x.png")
    (tmp_path / "a" / "._x.png").write_bytes(b"not a picture")
    (tmp_path / "a" / "notes.txt").write_text("not a picture")
    (tmp_path / "a" / "folder.png").mkdir()
    (tmp_path / "empty").mkdir()
    pool = load(str(tmp_path)).train
    assert len(pool) == 1 and pool.classes == ("a",)


def test_links_are_read_but_loops_are_not(tmp_path):
    root = tmp_path / "root"
    picture(root / "a" / "x.png", 1)
    picture(tmp_path / "elsewhere" / "y.png", 2)
    (root / "b").symlink_to(tmp_path / "elsewhere")
    picture(root / "loose.png")
    (root / "here").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    (root / "self").symlink_to(root / "self")
    (root / "broken").symlink_to(tmp_path / "nothing")
    (root / "a" / "broken.png").symlink_to(tmp_path / "nothing.png")
    pool = load(str(root)).train
    assert pool.classes == ("a", "b") and pool.images.flatten(1)[:, 0].tolist() == [1, 2]


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"plain text", None])
def test_damaged_picture_is_named(content, tmp_path):
    picture(tmp_path / "a" / "good.png")
    rng = np.random.default_rng(0)
    bad = tmp_path / "a" / "z bad.png"
    Image.fromarray(rng.integers(0, 256, (40, 40), np.uint8)).save(bad)
    bad.write_bytes(bad.read_bytes()[:900] if content is None else content)
    with pytest.raises(CorruptData) as caught:
        load(str(tmp_path))
    assert str(bad) in str(caught.value) and caught.value.__cause__ is not None


def test_unicode_names(tmp_path):
    for name in ("猫", "Ωμέγα", "a b", unicodedata.normalize("NFD", "café")):
        picture(tmp_path / name / "x.png")
    classes = load(str(tmp_path)).train.classes
    assert classes == ("a b", "café", "Ωμέγα", "猫")
    picture(tmp_path / "café" / "x.png")
    with pytest.raises(CorruptData, match="two Unicode forms"):
        load(str(tmp_path))


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "x" * 129, "a\u200bb"])
def test_bad_names_are_refused(name, tmp_path):
    picture(tmp_path / name / "x.png")
    with pytest.raises(CorruptData, match="printable"):
        load(str(tmp_path))


def test_undecodable_name_is_refused(tmp_path):
    try:
        os.mkdir(os.fsencode(tmp_path) + b"/bad\xff")  # noqa: PTH102
    except OSError:
        pytest.skip("this file system refuses such names itself")
    picture(tmp_path / "bad\udcff" / "x.png")
    with pytest.raises(CorruptData, match="printable") as caught:
        load(str(tmp_path))
    str(caught.value).encode()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((9, 9), 128 * 257, np.uint16)).save(tmp_path / "a" / "x.png")
    assert load(str(tmp_path)).train.images.unique().tolist() == [128]


def test_phone_pictures_stand_upright(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, :4] = 255
    upright = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right when shown
    (tmp_path / "a").mkdir()
    upright.save(tmp_path / "a" / "x.png", exif=exif)
    image = load(str(tmp_path), image_size=8).train.images[0, 0]
    assert image[:4].min() == 255 and image[4:].max() == 0


@pytest.mark.parametrize("options", [{"channels": 2}, {"image_size": 0}, {"base_classes": 2}])
def test_bad_options_are_refused(options, tmp_path):
    picture(tmp_path / "a" / "x.png")
    with pytest.raises(ConfigError):
        load(str(tmp_path), **options)
