"""Random generators that depend on a run's seed and on what they are for, and on nothing else."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose of a run.

    Two different purposes get unrelated streams, so adding a consumer of randomness never shifts
    the numbers of another one.

    Args:
        seed: The run's seed.
        purpose: Names and numbers that say what the stream is for, e.g. ``"missions", node``.
    """
    text = "\x1f".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a CPU generator for one purpose of a run, see :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
