"""The pictures of a real node: what its folder holds now, and an embedding for each content.

Files are told apart by the SHA-256 of their bytes; which file had which is remembered together
with its size and time of change, so that only new files are read again. An embedding is kept for
each content that is in use, as personal data that goes when the picture goes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from os import cpu_count
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clfed.backbones import Encoder
from clfed.data.benchmark import check_class_name
from clfed.data.files import channels_first
from clfed.data.folder import class_folders, read_picture
from clfed.errors import CorruptData, MissingData

logger = logging.getLogger(__name__)
CHUNK = 1024  # pictures in memory at a time
Stamp = tuple[int, int, str]  # size in bytes, time of change in ns, SHA-256 of the content


@dataclass(frozen=True)
class Album:
    """What is known of a folder.

    Attributes:
        files: Stamp of each file, by its path below the folder.
        labels: Class of each file.
        hashes: Content of each row of the embeddings.
        embeddings: ``(N, D)`` float32.
        unreadable: Contents that are no pictures, such as files that are still being copied.
    """

    embeddings: Tensor
    hashes: tuple[str, ...] = ()
    files: Mapping[str, Stamp] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    unreadable: frozenset[str] = frozenset()

    def scan(self, folder: Path) -> Album:
        """Look at the folder again; contents without an embedding wait for :meth:`embed`.

        Raises:
            MissingData: There is no such folder, which is not the same as an empty one.
        """
        if not folder.is_dir():
            raise MissingData(
                f"Expected pictures at {folder}/CLASS/*.png, but {folder} is no folder.",
                remedy="Mount or make the folder again; nothing was forgotten meanwhile.",
            )
        files: dict[str, Stamp] = {}
        labels: dict[str, str] = {}
        for name, path in _pictures(folder):
            place = str(path.relative_to(folder))
            try:
                stat = path.stat()
                known = self.files.get(place)
                if known is not None and known[:2] == (stat.st_size, stat.st_mtime_ns):
                    files[place] = known
                else:
                    content = hashlib.sha256(path.read_bytes()).hexdigest()
                    files[place] = (stat.st_size, stat.st_mtime_ns, content)
            except FileNotFoundError:  # gone since it was listed
                continue
            labels[place] = name
        used = {stamp[2] for stamp in files.values()}
        return replace(self, files=files, labels=labels, unreadable=self.unreadable & used)

    def without(self, classes: frozenset[str], contents: frozenset[str]) -> Album:
        """Leave out files of these classes or contents, which were forgotten on request."""
        files = {
            place: stamp
            for place, stamp in self.files.items()
            if self.labels[place] not in classes and stamp[2] not in contents
        }
        return replace(self, files=files, labels={place: self.labels[place] for place in files})

    def embed(self, folder: Path, encoder: Encoder) -> Iterator[Album]:
        """Embed contents that have no embedding yet, chunk by chunk, and drop unused ones.

        Yields:
            What is known so far; the last one is complete.
        """
        album = self._trimmed()
        known = {*album.hashes, *album.unreadable}
        missing = {stamp[2]: place for place, stamp in self.files.items() if stamp[2] not in known}
        contents = sorted(missing)
        for start in range(0, len(contents), CHUNK):
            chunk = contents[start : start + CHUNK]
            album = album._with(chunk, [folder / missing[name] for name in chunk], encoder)
            yield album
        if not contents:
            yield album

    def live(self) -> tuple[Tensor, list[str]]:
        """Return embeddings ``(B, D)`` and class names of all files, in the order of their paths.

        Two files of one content are two examples.
        """
        row = {content: number for number, content in enumerate(self.hashes)}
        places = [place for place in sorted(self.files) if self.files[place][2] in row]
        rows = torch.tensor([row[self.files[place][2]] for place in places], dtype=torch.int64)
        return self.embeddings[rows], [self.labels[place] for place in places]

    def _trimmed(self) -> Album:
        used = {stamp[2] for stamp in self.files.values()}
        kept = [number for number, content in enumerate(self.hashes) if content in used]
        if len(kept) == len(self.hashes):
            return self
        return replace(
            self,
            hashes=tuple(self.hashes[number] for number in kept),
            embeddings=self.embeddings[torch.tensor(kept, dtype=torch.int64)].clone(),
        )

    def _with(self, contents: Sequence[str], paths: Sequence[Path], encoder: Encoder) -> Album:
        channels, size, _ = encoder.input_shape

        def decode(content: str, path: Path) -> NDArray[np.uint8] | CorruptData | None:
            try:
                data = path.read_bytes()
                # What has changed since it was looked at is looked at again at the next round.
                same = hashlib.sha256(data).hexdigest() == content
                return read_picture(path, size, channels, data) if same else None
            except FileNotFoundError:
                return None
            except CorruptData as error:
                return error

        with ThreadPoolExecutor(cpu_count()) as threads:
            decoded = dict(zip(contents, threads.map(decode, contents, paths), strict=True))
        for found in decoded.values():
            if isinstance(found, CorruptData):
                logger.warning("Left out for now: %s", found)
        good = {name: found for name, found in decoded.items() if isinstance(found, np.ndarray)}
        bad = {name for name, found in decoded.items() if isinstance(found, CorruptData)}
        embeddings = self.embeddings
        if good:
            pixels = channels_first(np.stack([*good.values()]))
            embeddings = torch.cat([embeddings, encoder.embed(pixels)])
        return replace(
            self,
            hashes=(*self.hashes, *good),
            embeddings=embeddings,
            unreadable=self.unreadable | bad,
        )


def _pictures(folder: Path) -> Iterator[tuple[str, Path]]:
    for name, paths in class_folders(folder):
        try:
            check_class_name(name)
        except CorruptData as error:
            logger.warning("Left out: %s", error)
            continue
        for path in paths:
            yield name, path
