"""Letters drawn from the DejaVu faces that Matplotlib ships, and which of them look distinct."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFont
from torch import Tensor

from clfed.data.files import reading
from clfed.errors import CorruptData, MissingData

FACES = tuple(
    f"DejaVu{family}{style}.ttf"
    for family, slanted in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
    for style in ("", "-Bold", f"-{slanted}", f"-Bold{slanted}")
)
# Blocks below U+0590 are Latin, Greek, Cyrillic and Armenian; Mkhedruli is the Georgian script.
LETTERS = (*range(0x0041, 0x0590), *range(0x10D0, 0x1100), *range(0x1E00, 0x1F00))
CANVAS = 48  # pixels; a letter's longer side fills INK of them, the rest is margin
INK = 40
FONT_SIZE = 80  # pixels an em, so that nearly all letters are drawn larger than INK and shrunk


def face_files() -> list[Path]:
    """The twelve DejaVu text faces.

    Raises:
        MissingData: Matplotlib's font folder lacks one of them.
    """
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = [folder / face for face in FACES]
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise MissingData(
            f"Expected the font {absent[0]}, which Matplotlib ships; it is not there.",
            remedy="pip install --force-reinstall matplotlib",
        )
    return files


def letters_of(script: str, files: Sequence[Path]) -> list[str]:
    """Plain letters of a script that every face draws, in code point order.

    Plain: neither composed of another letter and a mark nor a variant of one, so U+00C9 (E with
    acute) is out, and neither are modifier letters, which are small copies.

    Args:
        script: First word of the letters' Unicode names, e.g. ``"GREEK"``.
        files: Font files.
    """
    from matplotlib.ft2font import FT2Font

    drawn = set.intersection(*(set(FT2Font(str(file)).get_charmap()) for file in files))
    return [
        chr(code)
        for code in LETTERS
        if code in drawn
        and unicodedata.category(chr(code)) in {"Lu", "Ll", "Lo"}
        and unicodedata.name(chr(code)).split()[0] == script
        and not unicodedata.decomposition(chr(code))
    ]


def draw(letters: Sequence[str], files: Sequence[Path]) -> Tensor:
    """Draw letters in faces, centred, the longer side scaled to ``INK`` pixels.

    Args:
        letters: Single characters.
        files: Font files.

    Returns:
        ``(len(letters), len(files), CANVAS, CANVAS)`` uint8, ink bright.

    Raises:
        CorruptData: A font file cannot be read, or draws nothing for a letter.
    """
    canvas = np.zeros((len(letters), len(files), CANVAS, CANVAS), np.uint8)
    for column, file in enumerate(files):
        with reading(file):
            # From memory: given a path that it cannot read, PIL takes a system font of that name.
            content = io.BytesIO(file.read_bytes())
            font = ImageFont.truetype(content, FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
        for row, letter in enumerate(letters):
            ink = _ink(font, letter)
            if ink is None:
                raise CorruptData(f"{file} draws nothing for {letter!r}.")
            height, width = ink.shape
            top, left = (CANVAS - height) // 2, (CANVAS - width) // 2
            canvas[row, column, top : top + height, left : left + width] = ink
    return torch.from_numpy(canvas)


def _ink(font: ImageFont.FreeTypeFont, letter: str) -> NDArray[np.uint8] | None:
    mask = font.getmask(letter, mode="L")
    width, height = mask.size
    picture = Image.frombytes("L", (width, height), bytes(mask))
    box = picture.getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    scale = INK / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return np.asarray(picture.resize(size, Image.Resampling.BOX))


def distinct(drawings: Tensor, threshold: float) -> list[int]:
    r"""Letters that look like no earlier one.

    Two letters look alike when their drawings correlate too much in the half of the faces, H, in
    which they are most alike (faces of one family often agree while another tells them apart):

    .. math:: s_{ij} = \frac{1}{|H|} \sum_{f \in H}
        \frac{\langle x_{if}, x_{jf} \rangle}{\lVert x_{if} \rVert \lVert x_{jf} \rVert}
        > \text{threshold}

    with :math:`x_{if}` the drawing of letter i in face f, shrunk and thereby blurred. The inner
    products are sums of integers below 2**53, thus the same on every machine.

    Args:
        drawings: ``(N, F, CANVAS, CANVAS)`` uint8, F at least 2.
        threshold: Largest allowed :math:`s_{ij}`, in 0..1.

    Returns:
        Ascending positions of the letters kept; an earlier letter wins over a later one.
    """
    sums = torch.nn.functional.avg_pool2d(drawings.float(), 3, divisor_override=1)
    shrunk = sums.flatten(2).transpose(0, 1).double()
    inner = shrunk @ shrunk.mT
    length = inner.diagonal(dim1=1, dim2=2).sqrt()
    similarity = inner / (length[:, :, None] * length[:, None, :])
    alike = similarity.topk(len(similarity) // 2, dim=0).values.mean(0) > threshold
    kept: list[int] = []
    for row, likenesses in enumerate(alike.tolist()):
        if not any(likenesses[column] for column in kept):
            kept.append(row)
    return kept
