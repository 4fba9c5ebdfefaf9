"""Characters of five scripts, drawn from the fonts at hand: no file, no download.

One class a character. The field scripts (Greek, Armenian, Georgian) share no look-alike with the
base scripts (Latin, Cyrillic). A sample is a face drawn at random, turned, sheared, stretched,
moved and given a thicker or thinner stroke. All arithmetic on pixels is on integers, so that the
data set is the same bytes on every machine that draws the letters alike.
"""

from __future__ import annotations

import math
import unicodedata

import torch
from torch import Tensor

from clfed.data.benchmark import Benchmark, ImageSet
from clfed.data.fonts import CANVAS, INK, distinct, draw, face_files, letters_of
from clfed.data.pixels import channel_statistics
from clfed.errors import ConfigError
from clfed.seeding import generator

FIELD_SCRIPTS = ("GREEK", "ARMENIAN", "GEORGIAN")
BASE_SCRIPTS = ("LATIN", "CYRILLIC")
IMAGE_SIZE = 28
LETTER_SIZE = 19  # pixels of IMAGE_SIZE that the longer side of an unchanged letter fills
OVERSAMPLING = 2  # points a pixel and axis
LOOK_ALIKE = 0.94  # correlation above which two characters count as drawn alike
VALIDATION_EVERY = 6  # each sixth base character is held out to pick checkpoints
FRACTION_BITS = 10  # of fixed-point coordinates
CHUNK = 2048  # samples drawn at once: about 50 MB of coordinates


def load(
    root: str | None = None,
    download: bool = False,
    *,
    samples: int = 20,
    test_samples: int = 10,
    strength: float = 1.0,
    seed: int = 0,
) -> Benchmark:
    """Draw the data set.

    Args:
        root: Not used; every data set has it.
        download: Not used; every data set has it.
        samples: Training images a class.
        test_samples: Test images a class, drawn independently of the training images.
        strength: How much samples of a class differ: 0 changes nothing but the face.
        seed: Seed of the draws; the classes do not depend on it.

    Returns:
        28 x 28 images, ink bright.

    Raises:
        ConfigError: A count is not positive, or the strength lies outside 0..2.
        MissingData: Matplotlib's fonts are not installed.
    """
    if samples < 1 or test_samples < 1:
        raise ConfigError(
            "data.samples and data.test_samples must be at least 1, "
            f"got {samples} and {test_samples}."
        )
    if not 0 <= strength <= 2:
        raise ConfigError(f"data.strength must lie in 0..2, got {strength}.")
    files = face_files()
    by_script = {script: letters_of(script, files) for script in FIELD_SCRIPTS + BASE_SCRIPTS}
    letters = [letter for script in by_script.values() for letter in script]
    drawings = draw(letters, files)
    kept = distinct(drawings, LOOK_ALIKE)
    drawings, letters = drawings[kept], [letters[index] for index in kept]
    classes = tuple(unicodedata.name(letter) for letter in letters)

    field = tuple(name for name in classes if name.split()[0] in FIELD_SCRIPTS)
    base = tuple(name for name in classes if name.split()[0] in BASE_SCRIPTS)
    validation = base[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]
    train, test = (
        ImageSet(
            _samples(drawings, count, strength, generator(seed, "glyphs", part)),
            torch.arange(len(classes)).repeat_interleave(count),
            classes,
        )
        for part, count in (("train", samples), ("test", test_samples))
    )
    held_out = set(validation)
    mean, std = channel_statistics(train.of_classes(base).images)
    return Benchmark(
        name="glyphs",
        train=train,
        test=test,
        groups={
            "base": tuple(name for name in base if name not in held_out),
            "validation": validation,
            "field": field,
        },
        mean=mean,
        std=std,
        protocol=(
            f"{len(field)} Greek, Armenian and Georgian characters in the field, {len(base)} Latin "
            f"and Cyrillic ones as base, none drawn like another, in {len(files)} DejaVu faces; "
            f"{samples} training and {test_samples} test images a class."
        ),
    )


def _samples(drawings: Tensor, count: int, strength: float, rng: torch.Generator) -> Tensor:
    """Draw ``count`` samples of each letter.

    Args:
        drawings: ``(N, F, CANVAS, CANVAS)`` uint8.
        count: Samples a letter.
        strength: Size of the changes.
        rng: Source of all draws.

    Returns:
        ``(N * count, 1, IMAGE_SIZE, IMAGE_SIZE)`` uint8, letter by letter.
    """
    letters, faces = drawings.shape[:2]
    total = letters * count
    face = torch.randint(faces, (total,), generator=rng)
    letter = torch.arange(letters).repeat_interleave(count)
    uniform = (torch.rand(total, 7, generator=rng, dtype=torch.float64) * 2 - 1) * strength
    matrix, shift = _affine(uniform)
    level = (128 + 40 * uniform[:, 6]).round().to(torch.int16)
    blurred = _blur(drawings).flatten()
    first = ((letter * faces + face) * CANVAS * CANVAS).to(torch.int32)
    parts = [
        _look_up(blurred, first[part], matrix[part], shift[part], level[part])
        for part in torch.split(torch.arange(total), CHUNK)
    ]
    return torch.cat(parts).unsqueeze(1)


def _affine(uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Maps from image to drawing: matrices ``(N, 2, 2)`` and shifts ``(N, 2)`` in drawing pixels.

    Args:
        uniform: ``(N, 7)`` numbers in -1..1 times the strength.
    """
    angle = uniform[:, 0] * math.radians(8)
    zoom = torch.exp(uniform[:, 1] * 0.12)
    stretch = torch.exp(uniform[:, 2] * 0.1)
    slant = uniform[:, 3] * 0.12
    cosine, sine, one = angle.cos(), angle.sin(), torch.ones_like(angle)
    turn = torch.stack([cosine, -sine, sine, cosine], 1).view(-1, 2, 2)
    shear = torch.stack([zoom * stretch, slant, one * 0, zoom / stretch], 1).view(-1, 2, 2)
    matrix = turn @ shear * (INK / LETTER_SIZE)
    return matrix, uniform[:, 4:6] * 1.2 * (INK / LETTER_SIZE)


def _blur(drawings: Tensor) -> Tensor:
    """Average with the eight neighbours, so that a threshold can thicken or thin a stroke."""
    wide = torch.nn.functional.pad(drawings, (1, 1, 1, 1)).to(torch.int16)
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    return torch.div(sums, 9, rounding_mode="floor").to(torch.uint8)


def _look_up(source: Tensor, first: Tensor, matrix: Tensor, shift: Tensor, level: Tensor) -> Tensor:
    """Sample drawings at transformed points, sharpen around a level, and shrink to image size.

    Args:
        source: All drawings, flat uint8.
        first: ``(B,)`` int32, where each sample's drawing starts.
        matrix: ``(B, 2, 2)`` from image to drawing.
        shift: ``(B, 2)`` in drawing pixels.
        level: ``(B,)`` int16, grey value that becomes half ink.

    Returns:
        ``(B, IMAGE_SIZE, IMAGE_SIZE)`` uint8.
    """
    points = IMAGE_SIZE * OVERSAMPLING
    axis = (torch.arange(points, dtype=torch.float64) + 0.5) / OVERSAMPLING - IMAGE_SIZE / 2

    def coordinate(row: int) -> Tensor:
        along_x = matrix[:, row, 0, None, None] * axis[None, None, :]
        along_y = matrix[:, row, 1, None, None] * axis[None, :, None]
        along_y = along_y + shift[:, row, None, None] + CANVAS / 2
        scale = 1 << FRACTION_BITS
        fixed = (along_x * scale).floor().to(torch.int32) + (along_y * scale).floor().to(
            torch.int32
        )
        return fixed.bitwise_right_shift_(FRACTION_BITS).clamp_(0, CANVAS - 1)

    index = coordinate(1).mul_(CANVAS).add_(coordinate(0)).add_(first[:, None, None])
    grey = source.index_select(0, index.flatten()).view(-1, points, points).to(torch.int16)
    grey = ((grey - level[:, None, None]) * 3 + 128).clamp_(0, 255)
    # Sums of four integers and a quarter of them are exact in float32.
    return torch.nn.functional.avg_pool2d(grey.float(), OVERSAMPLING).to(torch.uint8)
