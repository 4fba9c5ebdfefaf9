"""Glyphs: the same bytes everywhere, no look-alikes, hard for pixels."""

import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch
from PIL import features

from clfed.data import fonts, glyphs
from clfed.errors import ConfigError, CorruptData, MissingData

# Of the default data set, drawn by FreeType 2.14 (PIL.features.version("freetype2")).
COUNTS = {"base": 180, "validation": 35, "field": 164}
TRAIN = "e8fbf3d57143bc801418ab1c4f00c082be193c7713cf032c960ce0a3e9375c46"
TEST = "e441eb6dd9f7f03900d7692f48e891d9c1dbeca43f0af77c0547a1c722be494b"


@pytest.fixture(scope="module")
def default():
    return glyphs.load()


@pytest.fixture(scope="module")
def letters():
    files = fonts.face_files()
    scripts = glyphs.FIELD_SCRIPTS + glyphs.BASE_SCRIPTS
    return [letter for script in scripts for letter in fonts.letters_of(script, files)]


def test_counts(default):
    groups = default.groups
    assert {name: len(names) for name, names in groups.items()} == COUNTS
    assert len(default.train.classes) == sum(COUNTS.values())
    assert torch.bincount(default.train.labels).unique().tolist() == [20]
    assert torch.bincount(default.test.labels).unique().tolist() == [10]
    assert default.train.images.shape[1:] == (1, 28, 28)


def test_fingerprint_is_pinned(default):
    drawn_by = features.version("freetype2")
    assert (default.train.fingerprint, default.test.fingerprint) == (TRAIN, TEST), drawn_by


def test_another_process_with_other_threads_draws_the_same_bytes_with_few_imports(default):
    program = (
        "import sys, torch; torch.set_num_threads(3); from clfed.data import glyphs;"
        "benchmark = glyphs.load(); print(benchmark.train.fingerprint, benchmark.test.fingerprint);"
        "print({'matplotlib.pyplot', 'torchvision', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    fingerprints = f"{default.train.fingerprint} {default.test.fingerprint}"
    assert done.stdout.decode().splitlines() == [fingerprints, "set()"]


def test_groups_are_scripts(default):
    scripts = {
        group: {name.split()[0] for name in names} for group, names in default.groups.items()
    }
    assert scripts["field"] == set(glyphs.FIELD_SCRIPTS)
    assert scripts["base"] == scripts["validation"] == set(glyphs.BASE_SCRIPTS)


def test_no_class_is_another_with_a_mark(default):
    for name in default.train.classes:
        letter = unicodedata.lookup(name)
        assert unicodedata.normalize("NFKD", letter) == letter
        assert unicodedata.category(letter).startswith("L")


# Drawn alike in most faces: Greek, Latin, Cyrillic capital A and O, small nu and v, I and l.
@pytest.mark.parametrize(
    "alike", ["\u0391A\u0410", "\u039fO\u041e", "\u03bdv\u0475", "\u0399Il\u04c0", "Ss\u0455"]
)
def test_at_most_one_of_each_look_alike_is_a_class(alike, default):
    names = {unicodedata.name(letter) for letter in alike}
    assert len(names & set(default.train.classes)) <= 1


def test_look_alikes_are_judged_like_numpy_does(letters):
    some = letters[::12]
    drawings = fonts.draw(some, fonts.face_files())
    blocks = drawings.numpy().astype(float).reshape(len(some), 12, 16, 3, 16, 3).sum((3, 5))
    kept: list[int] = []
    for i in range(len(some)):
        alike = [
            np.mean(
                sorted(
                    (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
                    for x, y in zip(blocks[i], blocks[j], strict=True)
                )[6:]
            )
            for j in kept
        ]
        if max(alike, default=0) <= 0.8:
            kept.append(i)
    assert len(kept) < len(some)
    assert fonts.distinct(drawings, 0.8) == kept


def test_letters_fill_their_canvas(letters):
    drawings = fonts.draw(letters[:50], fonts.face_files()[:3])
    for drawing in drawings.flatten(0, 1):
        extent = drawing.nonzero().amax(0) - drawing.nonzero().amin(0) + 1
        assert max(extent.tolist()) == fonts.INK


def test_train_and_test_are_other_draws(default):
    def pictures(images):
        return {picture.tobytes() for picture in images.images.numpy()}

    train, test = pictures(default.train), pictures(default.test)
    assert len(train) == len(default.train) and not train & test


def test_options(default):
    other = glyphs.load(samples=2, test_samples=3, seed=1)
    assert other.train.classes == default.train.classes
    assert (len(other.train), len(other.test)) == (2 * 379, 3 * 379)
    assert other.train.images[::2].ne(default.train.images[::20]).any()
    plain = glyphs.load(samples=40, test_samples=1, strength=0)
    one = plain.train.of_classes(["GEORGIAN LETTER AN"]).images
    assert len({picture.tobytes() for picture in one.numpy()}) <= len(fonts.FACES)


@pytest.mark.parametrize(
    "options", [{"samples": 0}, {"test_samples": 0}, {"strength": -1}, {"strength": 2.1}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError, match=rf"data\.{next(iter(options))}"):
        glyphs.load(**options)


def test_pixels_alone_are_a_poor_embedding(default):
    """Nearest class mean of raw pixels, 5 shots, all field classes: hard but not hopeless."""
    field = default.groups["field"]
    train, test = default.train.of_classes(field), default.test.of_classes(field)
    shots = torch.stack([positions[:5] for positions in train.indices_by_class()])
    means = train.images[shots].float().flatten(2).mean(1)
    nearest = torch.cdist(test.images.float().flatten(1), means).argmin(1)
    assert 0.35 < (nearest == test.labels).float().mean() < 0.6


def test_missing_and_damaged_fonts(tmp_path, monkeypatch):
    broken = tmp_path / "DejaVuSans.ttf"
    broken.write_bytes(b"no font")
    with pytest.raises(CorruptData, match=str(broken)):
        fonts.draw("a", [broken])
    with pytest.raises(CorruptData, match="draws nothing"):
        fonts.draw(" ", fonts.face_files()[:1])
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    with pytest.raises(MissingData, match=r"DejaVuSans\.ttf") as caught:
        glyphs.load()
    assert "pip install" in caught.value.remedy
