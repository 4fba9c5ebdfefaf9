"""How base training runs, and what it tells about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from clfed.errors import ConfigError

LOOPS = ("lightning", "fast")
PRECISIONS = ("auto", "32", "bf16-mixed")

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class TrainerOptions:
    """How base training runs, ``conf/trainer``.

    Args:
        precision: ``32``; ``bf16-mixed``; or ``auto``, which takes the latter where the processor
            multiplies bfloat16 matrices itself. It changes the trained weights and nothing else:
            an encoder always embeds in float32.
        threads: Processor threads; fixed, because their number changes last bits of the weights.
        validate_every: Steps between two looks at the validation classes.
        validation_shots: Images a validation class that make its prototype.
        resume_every: Steps between two checkpoints that a killed training goes on from; 0: none.
        accelerator: ``cpu``, or what Lightning offers: ``gpu``, ``auto``.
        loop: Who trains an experience of a stream: Lightning's ``Trainer`` (``lightning``), or a
            plain loop over the same hooks on the CPU (``fast``). Same numbers from both.

    Raises:
        ConfigError: A value is out of range.
    """

    precision: str = "auto"
    threads: int = 2
    validate_every: int = 100
    validation_shots: int = 15
    resume_every: int = 500
    accelerator: str = "cpu"
    loop: str = "lightning"

    def __post_init__(self) -> None:
        if self.loop not in LOOPS:
            raise ConfigError(f"Expected trainer.loop of {', '.join(LOOPS)}, got {self.loop!r}.")
        object.__setattr__(self, "precision", str(self.precision))  # YAML reads 32 as a number
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"Expected trainer.precision of {', '.join(PRECISIONS)}, got {self.precision}."
            )
        if min(self.threads, self.validate_every, self.validation_shots) < 1 or (
            self.resume_every < 0
        ):
            raise ConfigError(f"The trainer's numbers must be positive, got {asdict(self)}.")

    def resolved_precision(self) -> str:
        """Return ``32`` or ``bf16-mixed``: what ``auto`` means on this machine."""
        if self.precision != "auto":
            return self.precision
        native = self.accelerator == "cpu" and fast_bfloat16()
        return "bf16-mixed" if native else "32"


@dataclass(frozen=True)
class TrainingSummary:
    """What a base training did.

    Attributes:
        steps: Steps (episodes or batches) of the training, 0 without one.
        best_step: The step whose weights became the encoder.
        validation: ``[step, accuracy]`` pairs; accuracy over images of the nearest class mean
            among all validation classes (rotated
            ones included if the learner rotates). Empty without validation classes.
        precision: ``32`` or ``bf16-mixed``.
        seconds: Wall time, of all parts of a training that was killed and went on.
    """

    steps: int
    best_step: int
    validation: list[list[float]]
    precision: str
    seconds: float


def fast_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 matrices in hardware."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
