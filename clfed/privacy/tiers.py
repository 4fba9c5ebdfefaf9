"""Privacy tiers: what a user chooses with ``privacy=``, and which strategies it goes together with.

=================  =================================================================================
plain              rows in the open: the server sees what each node sends
minimum_count      a class's row waits until it has changed by enough examples
noise              every release has an epsilon, for each example or for each node
secagg             the server learns the sum of all nodes, exactly, and no single message
secagg_noise       the same with noise that all nodes add together
=================  =================================================================================

Each is for strategies of class statistics; ``noise`` for networks that are averaged as well. The
tiers with noise are in :mod:`clfed.privacy.noise_tiers`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from clfed.errors import ConfigError
from clfed.federated.channels import Channel, Ground
from clfed.federated.masked_sums import MaskedSums
from clfed.privacy.accountant import GaussianAccount
from clfed.privacy.mechanism import Unit
from clfed.privacy.terms import LEAST
from clfed.prototypes.contribution import MAX_COUNT

Settings = Mapping[str, Any]


class Tier(ABC):
    """One choice of the group ``privacy``.

    Attributes:
        name: As on the command line.
        unit: Whose presence a bound hides; None: there is no bound.
        delta: Of the bound.
    """

    name: ClassVar[str]
    unit: Unit | None = None
    delta: float | None = None

    @abstractmethod
    def check(self, strategy: type, *, moments: str, merge: str, bits: int | None) -> None:
        """Refuse a strategy that this tier does not go together with.

        Args:
            strategy: Its class.
            moments: Second moments that are kept.
            merge: The merge rule.
            bits: Bits of an entry of a rounded message; None: whole ones.

        Raises:
            ConfigError: It does not.
        """

    @abstractmethod
    def channel(self, ground: Ground, base_norm: Callable[[], float]) -> Channel:
        """Return how class statistics get to the server.

        Args:
            ground: What is public.
            base_norm: Gives the median length of the embeddings of public images; embeddings are
                then moved as these are.

        Raises:
            ConfigError: The tier does not fit the scenario.
        """

    def local(self, settings: Settings, classes: tuple[str, ...]) -> dict[str, Any]:
        """Return the settings of the half of a method that trains at nodes.

        Args:
            settings: As the strategy has them.
            classes: The public list.
        """
        return dict(settings)

    def account(self, rounds: int) -> GaussianAccount | None:
        """Return what so many rounds of a method that trains spend; None: nothing bounds it."""
        return None


class Plain(Tier):
    """Rows, or weights, in the open."""

    name = "plain"

    def check(self, strategy: type, *, moments: str, merge: str, bits: int | None) -> None:
        """Go together with everything."""

    def channel(self, ground: Ground, base_norm: Callable[[], float]) -> Channel:
        """Return rows in the open."""
        return Channel()


class MinimumCount(Tier):
    """A row waits until its count has changed by a minimum.

    Args:
        least: By how many examples.

    Raises:
        ConfigError: ``least`` is below 2.
    """

    name = "minimum_count"

    def __init__(self, *, least: int = 5) -> None:
        if type(least) is not int or not 2 <= least <= MAX_COUNT:
            raise ConfigError(
                f"privacy.least must be a whole number of at least 2, got {least!r}.",
                remedy="privacy=plain sends every change.",
            )
        self.least = least

    def check(self, strategy: type, *, moments: str, merge: str, bits: int | None) -> None:
        """Refuse methods without rows, and second moments that cannot be held back by class."""
        check_statistics(self, strategy)
        if moments == "shared":
            raise ConfigError(
                f"privacy={self.name} holds rows back class by class, but {strategy.__name__} "
                "keeps one matrix of second moments of all classes.",
                remedy="Set memory.moments=class, or privacy=plain.",
            )

    def channel(self, ground: Ground, base_norm: Callable[[], float]) -> Channel:
        """Return rows that wait."""
        return Channel(least=self.least)


class Secagg(Tier):
    """Masked sums.

    Args:
        threshold: Fewest nodes in a sum; None: more than half of those that are there.

    Raises:
        ConfigError: ``threshold`` is below 3.
    """

    name = "secagg"

    def __init__(self, *, threshold: int | None = None) -> None:
        if threshold is not None and (type(threshold) is not int or threshold < LEAST):
            raise ConfigError(
                f"privacy.threshold must be null or a whole number of at least {LEAST}, got "
                f"{threshold!r}."
            )
        self.threshold = threshold

    def check(self, strategy: type, *, moments: str, merge: str, bits: int | None) -> None:
        """Refuse what is not a sum of counts and sums alone."""
        check_sums(self, strategy, moments, merge, bits)

    def channel(self, ground: Ground, base_norm: Callable[[], float]) -> Channel:
        """Return masked sums."""
        self._check_nodes(ground)
        return MaskedSums(ground, threshold=self.threshold)

    def _check_nodes(self, ground: Ground) -> None:
        if ground.nodes < max(LEAST, self.threshold or 0):
            raise ConfigError(
                f"privacy={self.name} needs at least {max(LEAST, self.threshold or 0)} nodes, got "
                f"{ground.nodes}.",
                remedy="Raise scenario.nodes, or lower privacy.threshold.",
            )


def check_statistics(tier: Tier, strategy: type) -> None:
    """Refuse a strategy that does not send class statistics.

    Raises:
        ConfigError: It does not.
    """
    from clfed.strategies import PrototypeAveraging

    if not issubclass(strategy, PrototypeAveraging):
        raise ConfigError(
            f"privacy={tier.name} is for class statistics, and {strategy.__name__} sends none.",
            remedy="Choose strategy=fedncm or another one of class statistics, or privacy=plain.",
        )


def check_sums(tier: Tier, strategy: type, moments: str, merge: str, bits: int | None) -> None:
    """Refuse a strategy that needs more than one exact sum of counts and sums.

    Raises:
        ConfigError: It does.
    """
    from clfed.strategies import FedCOF

    check_statistics(tier, strategy)
    remedy = "Choose strategy=fedncm or strategy=prototype_averaging, or privacy=minimum_count."
    if issubclass(strategy, FedCOF):
        raise ConfigError(
            f"{strategy.__name__} reads the class means of single messages, which privacy="
            f"{tier.name} hides.",
            remedy=remedy,
        )
    if moments != "none":
        raise ConfigError(
            f"privacy={tier.name} covers counts and sums, but {strategy.__name__} sends second "
            f"moments too (memory.moments={moments}).",
            remedy=remedy,
        )
    if merge != "pooled":
        raise ConfigError(f"privacy={tier.name} needs merge=pooled, got {merge}.")
    if bits is not None:
        raise ConfigError(
            f"privacy={tier.name} sends whole numbers, got strategy.message_bits={bits}.",
            remedy="Set strategy.message_bits=null.",
        )
