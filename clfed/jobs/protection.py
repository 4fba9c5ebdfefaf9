"""A privacy tier at work in one federation: what is public there, and what the messages spend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clfed.errors import ConfigError
from clfed.federated.channels import Channel, Ground
from clfed.federated.field import Field
from clfed.jobs.settings import statistics_alone, tier
from clfed.privacy.mechanism import Exposure
from clfed.privacy.sensitivity import clip
from clfed.privacy.updates import LEAVES
from clfed.prototypes import PrototypeMemory
from clfed.scenarios import MissionPlan

if TYPE_CHECKING:
    from omegaconf import DictConfig

BASE_IMAGES = 2000


class Protection:
    """What nodes are told to tell, and what that reveals at most.

    Args:
        cfg: The configuration.
        opened: The field.
        empty: The empty memory of the embedding.
        session: Text that tells this federation from every other one.
        public: Gives embeddings of public images, ``(N, D)``; asked where a tier needs them.

    Attributes:
        tier: What was chosen.
        channel: How class statistics get to the server; rows in the open for other methods.

    Raises:
        ConfigError: Tier, strategy and scenario do not go together.
    """

    def __init__(
        self,
        cfg: DictConfig,
        opened: Field,
        empty: PrototypeMemory,
        *,
        session: str,
        public: Callable[[], Tensor],
    ) -> None:
        self.tier = tier(cfg)
        self._public = public
        self._centre: Tensor | None = None
        self._classes = tuple(sorted(opened.plan.test.classes))
        self._statistics = statistics_alone(cfg.strategy)
        self.channel = Channel()
        if self._statistics:
            ground = Ground(
                empty,
                self._classes,
                opened.plan.nodes,
                exposure(opened.plan),
                session,
                cfg.seed,
                cfg.job.timeout,
            )
            self.channel = self.tier.channel(ground, self._base_norm)

    def node_settings(self) -> dict[str, Any]:
        """Return what a briefing holds for it."""
        found = self.channel.settings()
        if self._centre is not None:
            found = {**found, "centre": self._centre.tolist()}
        return {"privacy": found} if found else {}

    def local(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of the half of a method that trains at nodes."""
        return self.tier.local(settings, self._classes)

    def seen(self, embeddings: Tensor) -> Tensor:
        """Return embeddings as those that the statistics are of: clipped where these are."""
        norm = self.channel.settings().get("clip_norm")
        return embeddings if norm is None else clip(embeddings, norm, self._centre).float()

    def _base_norm(self) -> float:
        """Take the mean of public embeddings as the origin; return the median distance from it.

        What all embeddings have in common says nothing of anybody, but noise is scaled to it too.
        """
        embeddings = self._public()
        self._centre = embeddings.mean(dim=0)
        return float((embeddings - self._centre).norm(dim=1).median())

    def leaves(self, plainly: str) -> str:
        """Return what leaves a node, in a few words.

        Args:
            plainly: What leaves it without a tier.
        """
        if self._statistics:
            return self.channel.leaves or plainly
        return plainly if self.tier.unit is None else LEAVES

    def epsilon(self, rounds: int) -> float | None:
        """Return what so many rounds have spent; None: nothing bounds it."""
        spent = (self.channel if self._statistics else self.tier).account(rounds)
        if spent is None or self.tier.delta is None:
            return None
        return spent.epsilon(self.tier.delta)


def rehearse(cfg: DictConfig, opened: Field) -> None:
    """Refuse, before anything is trained, a tier that does not fit the scenario.

    Raises:
        ConfigError: It does not.
    """
    empty = PrototypeMemory.empty(2, "rehearsal", cfg.memory.moments)
    Protection(
        cfg,
        opened,
        empty,
        session="rehearsal",
        public=lambda: torch.eye(2).expand(len(public_images(opened)), 2, 2).flatten(0, 1),
    )


def exposure(plan: MissionPlan) -> Exposure:
    """Return how often one image can be met: at one node, and at how many of them."""
    held = [plan.met(plan.rounds, node) for node in range(plan.nodes)]
    once = [torch.unique(indices) for indices in held]
    again = sum(map(len, held)) > sum(map(len, once))
    shared = sum(map(len, once)) > len(torch.unique(torch.cat(once)))
    return Exposure(again=again, holders=plan.nodes if shared else 1)


def public_images(opened: Field) -> Tensor:
    """Return images of base classes, evenly over all of them, at least one.

    Raises:
        ConfigError: There are none, or nodes meet their classes too.
    """
    source = opened.benchmark
    base = source.groups.get("base", ())
    if not base or set(base) & set(opened.plan.support.classes):
        raise ConfigError(
            f"privacy.clip_norm=base needs base classes that no node meets, got {len(base)} base "
            "classes" + (" that nodes meet too." if base else "."),
            remedy="Set privacy.clip_norm to a number that was chosen without looking at the data.",
        )
    images = source.train.of_classes(base).images
    # Images come class by class.
    return images[torch.linspace(0, len(images) - 1, min(len(images), BASE_IMAGES)).long()]
