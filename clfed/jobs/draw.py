"""One draw of missions: what it runs on, and what it showed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid

from clfed.backbones import Encoder
from clfed.evaluation.judge import Judge
from clfed.federated.field import Field
from clfed.jobs.run import Run
from clfed.prototypes import PrototypeMemory
from clfed.scenarios import MissionPlan

if TYPE_CHECKING:
    from omegaconf import DictConfig

Briefing = dict[str, ArrayRecord | ConfigRecord]


@dataclass(frozen=True)
class Setting:
    """What every alternative of one draw runs on.

    Attributes:
        cfg: The resolved configuration.
        run: Run folder, metrics and progress.
        grid: What reaches the nodes.
        field: Missions, images and embeddings.
        encoder: The frozen embedding.
        judge: Scores answers on the test images of the field.
        number: Number of the draw, from 0.
        session: Text that tells nodes this draw from every other one.
        briefing: Records that a node needs once.
    """

    cfg: DictConfig
    run: Run
    grid: Grid
    field: Field
    encoder: Encoder
    judge: Judge
    number: int
    session: str
    briefing: Briefing

    @property
    def plan(self) -> MissionPlan:
        """Who meets what when."""
        return self.field.plan

    def log(self, round_: int, values: dict[str, float]) -> None:
        """Log metrics of a round; draws after the first get a folder of their own."""
        place = "fed" if self.number == 0 else f"fed/draw{self.number}"
        named = {f"{place}/{name}": value for name, value in values.items()}
        self.run.metrics.log(round_, named)


@dataclass
class Step:
    """What one round of one draw showed."""

    classes: int
    up: int
    down: int
    seconds: float
    accuracy: dict[str, float]


@dataclass
class Cost:
    """What one alternative took: bytes over all nodes and rounds, and seconds."""

    up: int = 0
    down: int = 0
    seconds: float = 0.0


@dataclass
class Draw:
    """What one draw of missions showed.

    Attributes:
        steps: One entry a round.
        accuracy: Final accuracy of every alternative and classifier.
        stages: Eval-0, Eval-1 and Eval-2 of the reconnaissance paper.
        memory: The merged memory at the end.
        exact: Whether the merged memory equalled the pooled one after every round.
        holders: Number of nodes that hold the final memory, byte for byte.
        seen_by: Contributors of each class.
        costs: Cost of each alternative that sends messages.
    """

    steps: list[Step] = field(default_factory=list)
    accuracy: dict[str, float] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)
    memory: PrototypeMemory | None = None
    exact: bool = True
    holders: int = 0
    seen_by: dict[str, list[str]] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
