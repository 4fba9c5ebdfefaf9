"""The privacy tiers with noise: what they promise holds whoever looks, and whatever they know.

See :mod:`clfed.privacy.tiers` for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

from clfed.errors import ConfigError
from clfed.federated.channels import Channel, Ground
from clfed.federated.masked_sums import NoisedSums
from clfed.federated.noised_channels import NoisedTables, TrustedNoise
from clfed.privacy.accountant import GaussianAccount
from clfed.privacy.gaussian import check_delta, check_positive, gaussian_sigma
from clfed.privacy.mechanism import Mechanism, Unit
from clfed.privacy.sensitivity import Bounds, best_count_scale
from clfed.privacy.tiers import Secagg, Settings, Tier, check_sums

Where = Literal["node", "server"]


class Bounded(Tier):
    r"""What the tiers with noise share.

    Args:
        unit: Whose presence is hidden: one example's, or that of a node with all it has.
        epsilon: :math:`\varepsilon` of one release.
        delta: :math:`\delta`.
        clip_norm: :math:`A`, length that embeddings are shortened to: a number; or ``base``, where
            embeddings are first moved so that the mean of base images, which are public, is the
            origin, and :math:`A` is the median distance of base images from it.
        count_scale: :math:`\lambda` of counts in the unit of embeddings; None: the one with the
            least noise on class means.
        contribution: With ``unit="node"``: a message heavier than so many examples is scaled down
            to their weight.
        mistakes: Number of classes, on average, that nobody met and that the noise passes off as
            met.
        repeatable: Whether the noise comes from the run's seed, so that a simulation can be
            repeated; whoever knows the seed can take it off again. False: from the system.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(
        self,
        *,
        unit: str = "example",
        epsilon: float = 1.0,
        delta: float = 1e-5,
        clip_norm: float | str = "base",
        count_scale: float | None = None,
        contribution: int = 25,
        mistakes: float = 1.0,
        repeatable: bool = True,
    ) -> None:
        if unit not in get_args(Unit):
            raise ConfigError(f"privacy.unit must be example or node, got {unit!r}.")
        check_positive("privacy.epsilon", epsilon)
        check_delta(delta)
        if clip_norm != "base":
            if isinstance(clip_norm, str):
                raise ConfigError(f"privacy.clip_norm must be base or a number, got {clip_norm!r}.")
            check_positive("privacy.clip_norm", clip_norm)
        if count_scale is not None:
            check_positive("privacy.count_scale", count_scale)
        if type(contribution) is not int or contribution < 1:
            raise ConfigError(
                f"privacy.contribution must be a whole number of at least 1, got {contribution!r}."
            )
        check_positive("privacy.mistakes", mistakes)
        if not isinstance(repeatable, bool):
            raise ConfigError(f"privacy.repeatable must be true or false, got {repeatable!r}.")
        self.unit, self.delta = ("node" if unit == "node" else "example"), delta
        self.epsilon, self.clip_norm, self.count_scale = epsilon, clip_norm, count_scale
        self.contribution, self.mistakes, self.repeatable = contribution, mistakes, repeatable

    def mechanism(self, ground: Ground, base_norm: Callable[[], float]) -> Mechanism:
        """Return the noise for a federation.

        Raises:
            ConfigError: The tier does not fit the scenario.
        """
        if self.mistakes >= len(ground.classes):
            raise ConfigError(
                f"privacy.mistakes must be below the number of classes, {len(ground.classes)}, got "
                f"{self.mistakes!r}."
            )
        norm = base_norm() if isinstance(self.clip_norm, str) else self.clip_norm
        scale = self.count_scale or best_count_scale(norm, ground.empty.dim)
        if self.unit == "node":
            most = self.contribution * math.hypot(norm, scale)
            bounds = Bounds("client", norm, scale, message_norm=most)
        else:
            bounds = Bounds("example", norm, scale)
        assert self.delta is not None
        seed = ground.seed if self.repeatable else None
        return Mechanism(ground.classes, bounds, self.epsilon, self.delta, seed)


class Noise(Bounded):
    """Noise of each node on its own message, or of a trusted server on the sum of all.

    Args:
        where: ``node`` or ``server``.
        update_norm: Of methods that average networks: norm that the change of all weights of a
            node is clipped to.
        options: Of all tiers with noise.

    Raises:
        ConfigError: A setting is out of range.
    """

    name = "noise"

    def __init__(self, *, where: str = "node", update_norm: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        if where not in get_args(Where):
            raise ConfigError(f"privacy.where must be node or server, got {where!r}.")
        check_positive("privacy.update_norm", update_norm)
        self.where, self.update_norm = where, update_norm

    def check(self, strategy: type, *, moments: str, merge: str, bits: int | None) -> None:
        """Refuse what is neither a sum of counts and sums alone nor an average of networks."""
        from clfed.strategies import FedAvg

        if not issubclass(strategy, FedAvg):
            check_sums(self, strategy, moments, merge, bits)
        elif (self.unit, self.where) != ("node", "node"):
            raise ConfigError(
                f"{strategy.__name__} sends one network a node, so its noise is added by nodes and "
                f"hides nodes, got privacy.unit={self.unit} and privacy.where={self.where}.",
                remedy="Set privacy.unit=node and privacy.where=node.",
            )

    def channel(self, ground: Ground, base_norm: Callable[[], float]) -> Channel:
        """Return noised tables, or rows to a server that adds the noise."""
        kind = NoisedTables if self.where == "node" else TrustedNoise
        return kind(self.mechanism(ground, base_norm), ground, mistakes=self.mistakes)

    def local(self, settings: Settings, classes: tuple[str, ...]) -> dict[str, Any]:
        """Return a half that clips what the inner one has changed, and adds noise."""
        return {
            "_target_": "clfed.privacy.updates.NoisyUpdates",
            "inner": dict(settings),
            "classes": list(classes),
            "norm": self.update_norm,
            "sigma": self._sigma,
            "repeatable": self.repeatable,
        }

    def account(self, rounds: int) -> GaussianAccount:
        """Return what rounds of networks spend, as if every node took part in all of them."""
        return GaussianAccount.of(self.update_norm, self._sigma, rounds)

    @property
    def _sigma(self) -> float:
        assert self.delta is not None
        return gaussian_sigma(self.epsilon, self.delta, self.update_norm)


class SecaggNoise(Bounded):
    """Masked sums with noise that all nodes add together.

    Args:
        threshold: As in :class:`Secagg`.
        options: Of all tiers with noise.

    Raises:
        ConfigError: A setting is out of range.
    """

    name = "secagg_noise"

    def __init__(self, *, threshold: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._masks = Secagg(threshold=threshold)

    def check(self, strategy: type, *, moments: str, merge: str, bits: int | None) -> None:
        """Refuse what is not a sum of counts and sums alone."""
        check_sums(self, strategy, moments, merge, bits)

    def channel(self, ground: Ground, base_norm: Callable[[], float]) -> Channel:
        """Return masked sums with noise."""
        self._masks.channel(ground, base_norm)  # refuses too few nodes
        mechanism = self.mechanism(ground, base_norm)
        threshold = self._masks.threshold
        return NoisedSums(mechanism, ground, mistakes=self.mistakes, threshold=threshold)
