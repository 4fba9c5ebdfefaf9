"""What travels to whoever wants to classify: encoder, memory and threshold as one file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clfed.backbones import Encoder
from clfed.errors import EmbeddingMismatch, EncoderError, InvalidMessage, MissingData
from clfed.evaluation.rejection import rank_classes
from clfed.files import read_file, write_file
from clfed.prototypes import PrototypeMemory
from clfed.prototypes.storage import pack, unpack
from clfed.prototypes.tables import checked_names

#: Name of the bundle in a node's state folder and in a server's federation folder.
BUNDLE = "bundle.safetensors"
_KIND = "bundle"
_PARTS = ("encoder", "memory")
_FIELDS = ("threshold", "federation", "round")
_REMEDY = "Copy the bundle again from a node or from the server."


@dataclass(frozen=True)
class Prediction:
    """What is said of one image.

    Attributes:
        label: The class, or None where the image fits no known one.
        ranking: Nearest classes with their scores, nearest first, at least one.
    """

    label: str | None
    ranking: tuple[tuple[str, float], ...]

    @property
    def nearest(self) -> str:
        """The nearest class, whether the image fits it or not."""
        return self.ranking[0][0]

    @property
    def score(self) -> float:
        """How surely the image is of a known class, at most 0."""
        return self.ranking[0][1]


@dataclass(frozen=True, eq=False)
class Bundle:
    """An encoder, what is known of each class under it, and when to say that nothing fits.

    Args:
        encoder: From image to embedding.
        memory: Class statistics of that embedding; no class may have fewer images than one.
        threshold: The lowest score of :func:`clfed.evaluation.rejection.rank_classes` that is
            taken for known; None where nothing is ever unknown.
        federation: Name of the federation that the memory is of, at most 128 characters.
        round: The last round that is in the memory; 0 before the first.

    Raises:
        EmbeddingMismatch: The memory is of another embedding than the encoder's.
        InvalidMessage: Another part is not as described here.
    """

    encoder: Encoder
    memory: PrototypeMemory
    threshold: float | None
    federation: str = ""
    round: int = 0

    def __post_init__(self) -> None:
        if self.memory.embedding_id != self.encoder.embedding_id:
            raise EmbeddingMismatch(
                f"Expected a memory of the encoder's embedding {self.encoder.embedding_id[:8]}, "
                f"got one of {self.memory.embedding_id[:8]}."
            )
        if self.memory.dim != self.encoder.dim:
            raise InvalidMessage(
                f"Expected sums of {self.encoder.dim} numbers as the encoder makes them, "
                f"got {self.memory.dim}."
            )
        self.memory.means()  # refuses debts, which have no mean
        _check_fields(self.threshold, self.federation, self.round)

    def scores(self, embeddings: Tensor) -> Tensor:
        """Score of the nearest class, ``(B, D)`` to ``(B,)`` float64; unknown below the threshold.

        Raises:
            NotEnoughData: No class is known.
            InvalidEmbedding: Wrong shape, or values that are not finite.
        """
        return rank_classes(self.memory, embeddings)[1][:, 0]

    def predict(self, images: Tensor, top: int = 1) -> list[Prediction]:
        """Classify images; what is said of one does not depend on the others.

        Args:
            images: uint8 ``(N, C, H, W)``, or float32 ``(N, D)`` for ready features.
            top: How many nearest classes to name.

        Returns:
            One prediction for each image.

        Raises:
            NotEnoughData: No class is known.
            InvalidEmbedding: The images are not of the encoder's type and shape.
            ConfigError: ``top`` is less than 1.
        """
        rows, scores = rank_classes(self.memory, self.encoder.embed(images), top)
        names = self.memory.classes
        predictions = []
        for row, values in zip(rows.tolist(), scores.tolist(), strict=True):
            ranking = tuple((names[index], score) for index, score in zip(row, values, strict=True))
            known = self.threshold is None or values[0] >= self.threshold
            predictions.append(Prediction(ranking[0][0] if known else None, ranking))
        return predictions

    def to_bytes(self) -> bytes:
        """One safetensors file, the same bytes for the same content, with its own digest."""
        parts = {"encoder": self.encoder.to_bytes(), "memory": self.memory.to_bytes()}
        header = {
            "embedding_id": self.encoder.embedding_id,
            "threshold": self.threshold,
            "federation": self.federation,
            "round": self.round,
        }
        tensors = {
            name: torch.frombuffer(bytearray(data), dtype=torch.uint8)
            for name, data in parts.items()
        }
        return pack(tensors, _KIND, header | {"sha256": _digest(header, parts)})

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "these bytes") -> Bundle:
        """Read what :meth:`to_bytes` wrote, believing nothing.

        Args:
            data: The bytes; they may come over a network, and nothing in them is executed.
            source: Where they came from, for the message.

        Raises:
            InvalidMessage: Truncated, damaged, or something else; names ``source``.
            EncoderError: The encoder in it cannot be built.
            EmbeddingMismatch: Encoder, memory and header are not of one embedding.
        """
        try:
            return cls._read(data, source)
        except (InvalidMessage, EncoderError, EmbeddingMismatch) as error:
            said = str(error) if source in str(error) else f"{source}: {error}"
            raise type(error)(said, remedy=_REMEDY) from error

    @classmethod
    def _read(cls, data: bytes, source: str) -> Bundle:
        tensors, header = unpack(data, _KIND, source)
        try:
            parts = {name: _bytes_of(tensors[name]) for name in _PARTS}
            fields = {name: header[name] for name in _FIELDS}
            embedding_id, digest = header["embedding_id"], header["sha256"]
        except KeyError as error:
            raise InvalidMessage(f"expected a complete {_KIND} in {source}: {error!r}") from error
        if digest != _digest(fields | {"embedding_id": embedding_id}, parts):
            raise InvalidMessage(f"expected an undamaged {_KIND} in {source}, got another digest")
        encoder = Encoder.from_bytes(parts["encoder"])
        if embedding_id != encoder.embedding_id:
            raise EmbeddingMismatch(
                f"Expected an encoder of embedding {str(embedding_id)[:8]} in {source}, "
                f"got {encoder.embedding_id[:8]}."
            )
        return cls(encoder, PrototypeMemory.from_bytes(parts["memory"], source), **fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_bytes`, all or none.

        Raises:
            RunFolderError: The file cannot be written.
        """
        write_file(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read a bundle.

        Args:
            path: The file, or the folder of a node or of a federation that holds one.

        Raises:
            MissingData: There is no bundle at that path.
            InvalidMessage: The file is damaged or something else.
            EncoderError: The encoder in it cannot be built.
            EmbeddingMismatch: Encoder and memory are not of one embedding.
        """
        file = Path(path)
        if file.is_dir():
            file /= BUNDLE
        if not file.is_file():
            raise MissingData(
                f"Expected a bundle at {file}, found none.",
                remedy="Name a bundle file, or the folder of a node or server that has finished "
                "a round.",
            )
        return cls.from_bytes(read_file(file), str(file))


def _check_fields(threshold: Any, federation: Any, number: Any) -> None:
    if threshold is not None and not (isinstance(threshold, float) and math.isfinite(threshold)):
        raise InvalidMessage(f"Expected a finite float as threshold, or none, got {threshold!r}.")
    if federation != "":
        checked_names([federation], "federation name")
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise InvalidMessage(f"Expected a round of at least 0, got {number!r}.")


def _bytes_of(part: Tensor) -> bytes:
    if part.dtype != torch.uint8 or part.ndim != 1:
        raise InvalidMessage(f"expected bytes, got {part.dtype} of shape {tuple(part.shape)}")
    return part.numpy().tobytes()


def _digest(header: Mapping[str, Any], parts: Mapping[str, bytes]) -> str:
    """Hexadecimal digest of everything that a bundle says; the file's layout is left out."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in _PARTS:
        digest.update(hashlib.sha256(parts[name]).digest())
    return digest.hexdigest()
