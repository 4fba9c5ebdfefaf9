r"""The Gaussian mechanism of one federation: what is public, how much noise, and what it spends.

Every mission is one release. What several of them reveal together depends on how often one example
can be in them, which the scenario decides and not the data:

========================  =====================================================================
every image met once      the releases are of disjoint data, so the largest of them is all that
                          one example spends (McSherry 2009, "Privacy integrated queries", thm. 4)
images met again          they add: :math:`\mu^2 = \sum_i \Delta^2 / \sigma_i^2`
also at other nodes       :math:`K` releases a mission, or one to which an example adds :math:`K`
                          times: :math:`\Delta` becomes :math:`K \Delta`
========================  =====================================================================

A whole node is in every release, whether it met something or not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from clfed.errors import ConfigError
from clfed.privacy.accountant import GaussianAccount, parallel
from clfed.privacy.gaussian import check_delta, check_positive, gaussian_sigma
from clfed.privacy.noise import Entropy
from clfed.privacy.release import SlotTable, release
from clfed.privacy.sensitivity import Bounds
from clfed.prototypes import PrototypeMemory
from clfed.seeding import derive_seed

Unit = Literal["example", "node"]


@dataclass(frozen=True)
class Exposure:
    """How often one example can be in what is released.

    Attributes:
        again: Whether a node may meet an image in several missions.
        holders: Nodes that may meet the same image, at least 1.
    """

    again: bool = False
    holders: int = 1


@dataclass(frozen=True)
class Mechanism:
    r"""Noise on class statistics, the same for every release.

    Attributes:
        classes: The public list.
        bounds: What one example or node contributes to a release at most.
        epsilon: :math:`\varepsilon` of one release.
        delta: :math:`\delta`.
        seed: Of noise that can be drawn again, for simulations; None: from the operating system.

    Raises:
        ConfigError: A value is out of range.
    """

    classes: tuple[str, ...]
    bounds: Bounds
    epsilon: float
    delta: float
    seed: int | None

    def __post_init__(self) -> None:
        check_positive("epsilon", self.epsilon)
        check_delta(self.delta)
        if not self.classes:
            raise ConfigError("Expected a public list of at least one class, got none.")

    @cached_property
    def sigma(self) -> float:
        """Standard deviation of the noise, in embedding units."""
        return gaussian_sigma(self.epsilon, self.delta, self.bounds.sensitivity)

    @property
    def unit(self) -> Unit:
        """Whose presence is hidden."""
        return "example" if self.bounds.neighbours == "example" else "node"

    def entropy(self, *purpose: str | int) -> Entropy:
        """Return where the random bytes of one release come from; no purpose is used twice."""
        return entropy(self.seed, *purpose)

    def release(self, new: PrototypeMemory, *purpose: str | int, share: int = 1) -> SlotTable:
        r"""Return one node's new evidence with noise.

        Args:
            new: Of clipped embeddings.
            purpose: Names the release: the node and its number.
            share: Number of such tables, at least, in a sum of which none is seen alone; each gets
                :math:`\sigma / \sqrt{share}`.

        Raises:
            ClfedError: As :func:`clfed.privacy.release.release`.
        """
        sigma = self.sigma / math.sqrt(share)
        return release(
            new, self.classes, bounds=self.bounds, sigma=sigma, entropy=self.entropy(*purpose)
        )

    def account(self, releases: int, exposure: Exposure, *, pooled: bool) -> GaussianAccount:
        """Return what so many missions have spent.

        Args:
            releases: Missions so far.
            exposure: How often one example can be in them.
            pooled: Whether the nodes' evidence of a mission is one release, not one each.
        """
        if self.unit == "node":
            return GaussianAccount.of(self.bounds.sensitivity, self.sigma, releases)
        sensitivity = self.bounds.sensitivity * (exposure.holders if pooled else 1)
        each = 1 if pooled else exposure.holders
        missions = [GaussianAccount.of(sensitivity, self.sigma, each)] * releases
        return sum(missions, start=GaussianAccount()) if exposure.again else parallel(missions)

    def settings(self) -> dict[str, Any]:
        """Return what :meth:`of` takes, JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Mechanism:
        """Return the mechanism of these settings.

        Raises:
            ConfigError: A value is out of range.
        """
        bounds = Bounds(**settings["bounds"])
        return cls(**{**settings, "classes": tuple(settings["classes"]), "bounds": bounds})


def entropy(seed: int | None, *purpose: str | int) -> Entropy:
    """Return a source of random bytes.

    Args:
        seed: Of bytes that can be drawn again by whoever knows it; None: from the system.
        purpose: What the bytes are for.
    """
    if seed is None:
        return os.urandom
    return np.random.default_rng(derive_seed(seed, "privacy", *purpose)).bytes
