"""``clfed predict``: classify pictures with what a federation has learned."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from clfed.errors import CorruptData, EncoderError, MissingData, NotEnoughData

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from clfed.federated.bundle import Bundle
    from clfed.reporting.predictions import Answer

SENTENCE = "classify pictures with the merged memory, or say that nothing fits"
# Pictures that are in memory at a time.
BATCH = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``clfed predict`` takes."""
    parser.add_argument(
        "memory",
        metavar="MEMORY",
        type=Path,
        help="a bundle file, or the folder of a node or server that holds one",
    )
    parser.add_argument(
        "images",
        metavar="IMAGES",
        type=Path,
        nargs="+",
        help="picture files, and folders of which every picture below is taken",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON array, one object a picture")
    form.add_argument("--csv", action="store_true", help="CSV with a line of names on top")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument(
        "--threshold",
        metavar="X",
        type=_finite,
        help="lowest score of a known class, for instance --threshold=-6.5",
    )
    limit.add_argument("--no-unknown", action="store_true", help="always name the nearest class")
    parser.add_argument(
        "--top", metavar="K", type=_positive, default=1, help="nearest classes to name (1)"
    )
    parser.add_argument(
        "--truth",
        action="store_true",
        help="the folder of each picture is named after its class: tell the accuracy",
    )


def run(args: argparse.Namespace) -> None:
    """Classify pictures and print the answers.

    A picture that cannot be decoded does not stop the others; it is listed with its error, and
    the command ends with :class:`CorruptData` after all answers are printed. JSON and CSV go to
    standard output alone, sentences about them to standard error.

    Args:
        args: What :func:`add_arguments` declares.

    Raises:
        MissingData: No bundle, or a path does not exist.
        NotEnoughData: No picture, or no known class.
        InvalidMessage: The bundle is damaged.
        EncoderError: The encoder takes ready features, not pictures.
        EmbeddingMismatch: Encoder and memory of the bundle do not belong together.
        CorruptData: Some pictures cannot be decoded; the others have been answered.
    """
    from clfed.federated.bundle import Bundle
    from clfed.reporting.console import console
    from clfed.reporting.predictions import prediction_notes, prediction_rows, prediction_table

    bundle = Bundle.load(args.memory)
    if args.no_unknown or args.threshold is not None:
        bundle = replace(bundle, threshold=args.threshold)
    _check(bundle, args.memory)
    top = min(args.top, len(bundle.memory))
    answers = list(_answers(bundle, find_pictures(args.images), top))
    notes = prediction_notes(bundle, answers, truth=args.truth)
    if args.json or args.csv:
        rows = prediction_rows(answers, top, truth=args.truth)
        if args.json:
            sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        else:
            writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        sys.stderr.write("".join(f"{note}\n" for note in notes))
    else:
        console().print(prediction_table(bundle, answers, notes))
    damaged = [answer for answer in answers if answer.error]
    if damaged:
        raise CorruptData(
            f"Expected {len(answers)} pictures, got {len(damaged)} that cannot be read, the first "
            f"is {str(damaged[0].path)!r}; the others are answered.",
            remedy="Look at the pictures that are listed as such, or leave them out.",
        )


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """Picture files in the order given, each once; those below a folder are sorted.

    Args:
        paths: Files, whatever they are called, and folders, of which every ``.png``, ``.jpg`` and
            ``.jpeg`` at any depth is taken; what is hidden and folders that are links are not.

    Raises:
        MissingData: A path does not exist, or a folder cannot be read.
        NotEnoughData: There is no picture.
    """
    from clfed.data.folder import SUFFIXES

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = (file for file in _visible(path) if file.suffix.lower() in SUFFIXES)
            files += sorted(file for file in below if file.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise MissingData(
                f"Expected a picture or a folder of pictures at {str(path)!r}, found none.",
                remedy="Check the spelling of the path.",
            )
    if not files:
        raise NotEnoughData(
            f"Expected pictures below {', '.join(repr(str(path)) for path in paths)}, got none.",
            remedy=f"Pictures are files that end in {', '.join(sorted(SUFFIXES))}.",
        )
    return list(dict.fromkeys(files))


def _visible(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> NoReturn:
        raise MissingData(
            f"Expected a folder of pictures at {error.filename!r}, got {error.strerror}.",
            remedy="Allow reading the folder, or leave it out.",
        ) from error

    for here, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(here, name) for name in files if not name.startswith("."))


def _check(bundle: Bundle, source: Path) -> None:
    from clfed.data.folder import MODES

    shape = bundle.encoder.input_shape
    if len(shape) != 3 or shape[0] not in MODES or shape[1] != shape[2]:
        raise EncoderError(
            f"Expected an encoder of square pictures of 1 or 3 channels in {str(source)!r}, "
            f"got one of inputs of shape {shape}.",
            remedy="Pictures need a bundle whose encoder takes pictures, not ready features.",
        )
    if not bundle.memory.classes:
        raise NotEnoughData(
            f"Expected at least one known class in {str(source)!r}, got none.",
            remedy="Finish a round in which a node has labelled pictures, then take the new one.",
        )


def _answers(bundle: Bundle, files: Sequence[Path], top: int) -> Iterator[Answer]:
    """Decode and classify batch by batch, so that any number of pictures fits into memory."""
    import numpy as np
    from rich.console import Console

    from clfed.data.files import channels_first
    from clfed.data.folder import read_picture
    from clfed.reporting.predictions import Answer
    from clfed.reporting.progress import progress

    channels, size, _ = bundle.encoder.input_shape

    def read(file: Path) -> NDArray[np.uint8] | CorruptData:
        try:
            return read_picture(file, size, channels)
        except CorruptData as error:
            return error

    with (
        progress(Console(stderr=True)) as track,
        track.phase("classifying", total=len(files)) as bar,
        ThreadPoolExecutor(os.cpu_count()) as threads,
    ):
        for start in range(0, len(files), BATCH):
            batch = files[start : start + BATCH]
            found = list(threads.map(read, batch))
            pixels = [one for one in found if not isinstance(one, CorruptData)]
            images = channels_first(np.stack(pixels)) if pixels else None
            said = iter(() if images is None else bundle.predict(images, top))
            for file, one in zip(batch, found, strict=True):
                if isinstance(one, CorruptData):
                    yield Answer(file, None, str(one))
                else:
                    yield Answer(file, next(said))
            bar.update(start + len(batch))


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return value
