"""A frozen embedding with an identity: what every node of a federation must share."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from clfed.backbones.build import (
    FORMAT,
    FeatureMap,
    build_backbone,
    build_feature_map,
    check_metadata,
)
from clfed.errors import EncoderError, InvalidEmbedding
from clfed.files import write_file
from clfed.finite import all_finite

# An image's embedding changes in its last bits with the batch size, but not with its neighbours,
# its position or the number of threads; multiples of 32 agree with one another.
BATCH = 64


class Transform:
    r"""Turn images into the input of a backbone: :math:`(x / 255 - \mu_c) / \sigma_c`.

    Args:
        mean: :math:`\mu`, mean of each channel of ``image / 255``; empty for ready features.
        std: :math:`\sigma`, standard deviation of each channel; empty for ready features.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, images: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` in 0..255 to float32; ready features ``(B, D)`` stay as they are."""
        if not self.mean:
            return images.float()
        mean, std = (
            torch.tensor(values, device=images.device).view(1, -1, 1, 1)
            for values in (self.mean, self.std)
        )
        return (images.float() / 255 - mean) / std


class Encoder:
    """A backbone in eval mode with its input transform, read-only from here on.

    The same image gives the same bits whatever its neighbours, its place, the number of images
    and the number of threads, because every batch has the same shape (the last one is padded).
    It always computes in float32 on the CPU. Machines with other instruction sets may differ in
    the last bits.

    Args:
        backbone: Maps float32 ``(B, *input_shape)`` to ``(B, D)``; it is copied.
        config: The backbone's configuration: ``_target_`` and options, so that
            ``instantiate(config, in_channels=C, image_size=H)`` builds it again.
        input_shape: ``(C, H, W)`` of the images, or ``(D,)`` of ready features.
        mean: Mean of each channel of ``image / 255``; empty for ready features.
        std: Standard deviation of each channel of ``image / 255``.
        feature_map: Configuration of a map of the embeddings in ``clfed.prototypes.features``.

    Attributes:
        embedding_id: SHA-256 over architecture, transform, feature map and weights.
        dim: Length ``D`` of an embedding.

    Raises:
        EncoderError: The configuration names anything but a backbone of clfed, or the parts do
            not fit one another.
    """

    embedding_id: str
    dim: int

    def __init__(
        self,
        backbone: nn.Module,
        config: Mapping[str, Any],
        *,
        input_shape: Sequence[int],
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        feature_map: Mapping[str, Any] | None = None,
    ) -> None:
        # Pretrained weights are where training began; the encoder holds the ones it ended with.
        plain = {key: value for key, value in config.items() if key != "weights"}
        self._meta: dict[str, Any] = {
            "format": FORMAT,
            "backbone": plain,
            "input_shape": [int(size) for size in input_shape],
            "mean": [float(value) for value in mean],
            "std": [float(value) for value in std],
            "feature_map": dict(feature_map) if feature_map else None,
        }
        check_metadata(self._meta)
        copied = copy.deepcopy(backbone).cpu().float().eval().requires_grad_(False)
        self._backbone: nn.Module = copied.to(memory_format=torch.channels_last)
        self._transform = Transform(self._meta["mean"], self._meta["std"])
        self._feature_map: FeatureMap | None = None
        self._feature_map = build_feature_map(self._meta["feature_map"], self._probe())
        self.dim = self._probe()
        self.embedding_id = _identity(self._meta, self._backbone.state_dict())

    @property
    def input_shape(self) -> tuple[int, ...]:
        """``(C, H, W)`` of the images, or ``(D,)`` of ready features."""
        return tuple(self._meta["input_shape"])

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if len(self.input_shape) == 1 else torch.uint8

    @property
    def backbone(self) -> nn.Module:
        """The frozen network itself, in eval mode; copy it before changing anything."""
        return self._backbone

    @property
    def transform(self) -> Transform:
        """What turns images into the backbone's input."""
        return self._transform

    def embed(self, images: Tensor) -> Tensor:
        """Embed images in fixed batches.

        Args:
            images: uint8 ``(N, C, H, W)``, or float32 ``(N, D)`` for ready features.

        Returns:
            float32 ``(N, dim)``.

        Raises:
            InvalidEmbedding: Wrong type or shape, or a number that is not finite comes out.
        """
        self._check_input(images)
        embeddings = torch.empty(len(images), self.dim)
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            batch = part.new_zeros(BATCH, *self.input_shape)
            batch[: len(part)] = part
            embeddings[start : start + len(part)] = self._forward(batch)[: len(part)]
        if not all_finite(embeddings):
            bad = int((~torch.isfinite(embeddings)).any(1).sum())
            raise InvalidEmbedding(
                f"{bad} of {len(images)} embeddings hold numbers that are not finite."
            )
        return embeddings

    def to_bytes(self) -> bytes:
        """Return the encoder as one safetensors file: weights, and the rest as JSON metadata."""
        from safetensors.torch import save

        tensors = {
            name: tensor.contiguous() for name, tensor in self._backbone.state_dict().items()
        }
        header = json.dumps(self._meta | {"embedding_id": self.embedding_id}, sort_keys=True)
        # A file needs one tensor at least, and ready features have none.
        return save(tensors or {"empty": torch.zeros(0)}, {"clfed_encoder": header})

    @classmethod
    def from_bytes(cls, data: bytes) -> Encoder:
        """Build an encoder from :meth:`to_bytes`; the bytes may come over a network.

        Nothing in them is executed: only classes of ``clfed.backbones`` are built, without
        weights of their own, and only if the tensors fit them.

        Raises:
            EncoderError: The bytes are damaged, or name anything but a backbone of clfed.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(data)
            meta = json.loads(_safetensors_metadata(data)["clfed_encoder"])
            expected = meta.pop("embedding_id")
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EncoderError(f"These {len(data)} bytes are not an encoder: {error}.") from error
        check_metadata(meta)
        tensors.pop("empty", None)
        backbone = build_backbone(meta, tensors)
        encoder = cls(
            backbone,
            meta["backbone"],
            input_shape=meta["input_shape"],
            mean=meta["mean"],
            std=meta["std"],
            feature_map=meta["feature_map"],
        )
        if encoder.embedding_id != expected:
            raise EncoderError(
                f"The encoder claims the identity {str(expected)[:8]}, but its content has "
                f"{encoder.embedding_id[:8]}: it is damaged."
            )
        return encoder

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_bytes` to a file; a reader sees the old file or the new one whole.

        Raises:
            RunFolderError: The file cannot be written.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_file(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Encoder:
        """Read an encoder from a file.

        Raises:
            EncoderError: The file is missing or damaged.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise EncoderError(f"Cannot read the encoder {path}: {error.strerror}.") from error
        try:
            return cls.from_bytes(data)
        except EncoderError as error:
            raise EncoderError(f"{path}: {error}") from error

    def _probe(self) -> int:
        try:
            blank = torch.zeros(2, *self.input_shape, dtype=self._dtype)
            embeddings = self._forward(blank)
        except RuntimeError as error:
            raise EncoderError(
                f"The backbone does not take inputs of shape {self.input_shape}: {error}"
            ) from error
        if embeddings.dim() != 2 or len(embeddings) != len(blank):
            raise EncoderError(
                f"A backbone must give one row for each of {len(blank)} images, "
                f"got shape {tuple(embeddings.shape)}."
            )
        return int(embeddings.shape[1])

    @torch.inference_mode()
    def _forward(self, batch: Tensor) -> Tensor:
        # Somebody else's autocast region must not change the bits.
        with torch.autocast("cpu", enabled=False):
            inputs = self._transform(batch)
            if inputs.dim() == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            embeddings = cast(Tensor, self._backbone(inputs)).float()
            return self._feature_map(embeddings).float() if self._feature_map else embeddings

    def _check_input(self, images: Tensor) -> None:
        if images.dtype != self._dtype or tuple(images.shape[1:]) != self.input_shape:
            raise InvalidEmbedding(
                f"Expected {self._dtype} images of shape (N, "
                f"{', '.join(map(str, self.input_shape))}), "
                f"got {images.dtype} of shape {tuple(images.shape)}.",
                remedy="Use the data set that the encoder was made for, or make a new encoder.",
            )


def _identity(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _safetensors_metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    header: dict[str, dict[str, str]] = json.loads(data[8 : 8 + length])
    return header["__metadata__"]
