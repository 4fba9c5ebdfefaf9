"""Training loops side by side: bare torch, ours twice, Avalanche's; a small MLP, batches of 32.

    python tests/benchmarks/loops.py [--rounds 15] [--threads 1] [--width 64]

All four train the same network with the same optimiser on the same images, in turns within one
process; shown is the best of all rounds, which others on the machine disturb least. ``step`` is the slope between long and short experiences,
so it holds no start-up; ``experience`` is a whole one of 4 steps, begin and end included. Importing
Lightning makes torch ask the graphics driver before every step of an optimiser; programs without
Lightning do not pay for that, so it is taken back while the bare loop and Avalanche run.
"""

import argparse
import copy
import os
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from clfed.backbones import MLP
from clfed.backbones.encoder import Transform
from clfed.data.benchmark import Benchmark, ImageSet
from clfed.learners.fitting import learn
from clfed.learners.naive import Naive
from clfed.learners.options import TrainerOptions
from clfed.scenarios import Experience, Stream, split
from clfed.scenarios.avalanche_benchmarks import quiet
from clfed.seeding import generator

with quiet():
    from avalanche.training import Naive as TheirNaive
    from avalanche.training.plugins import EvaluationPlugin

BATCH, SIDE, SHORT, LONG = 32, 8, 4, 104
DRIVER = "PYTORCH_NVML_BASED_CUDA_CHECK"  # Lightning sets it
SCALE = Transform((0.5,), (0.25,))


def stream(steps: int) -> Stream:
    """One experience of two classes that lasts some steps."""
    rng = generator(0, "loops")
    labels = torch.arange(steps * BATCH) % 2
    pixels = torch.randint(256, (len(labels), 1, SIDE, SIDE), generator=rng).to(torch.uint8)
    images = ImageSet(pixels, labels, ("a", "b"))
    groups = {"base": ("a", "b"), "validation": (), "field": ()}
    made = Benchmark("noise", images, images, groups, SCALE.mean, SCALE.std, "made for timing")
    return split(made, 0, experiences=1)


class Network(nn.Module):
    def __init__(self, backbone: nn.Module, dim: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(dim, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(SCALE(images)))


def bare(backbone: nn.Module, dim: int, experience: Experience) -> None:
    network = Network(backbone, dim)
    optimiser = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.0)
    images, labels = experience.train.images, experience.train.labels
    order = torch.randperm(len(labels), generator=generator(0, "bare"))
    for chosen in order.split(BATCH):
        loss = F.cross_entropy(network(images[chosen]), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def ours(loop: str) -> Callable[[nn.Module, int, Experience], None]:
    options = TrainerOptions(precision="32", threads=torch.get_num_threads(), loop=loop)

    def run(backbone: nn.Module, dim: int, experience: Experience) -> None:
        learner = Naive(backbone, SCALE, dim=dim, epochs=1, batch_size=BATCH)
        learn(learner, experience, options)

    return run


def avalanche(backbone: nn.Module, dim: int, experience: object) -> None:
    network = Network(backbone, dim)
    strategy = TheirNaive(
        model=network,
        optimizer=torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.0),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=BATCH,
        evaluator=EvaluationPlugin(),
    )
    strategy.train(experience, eval_streams=[])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backbone = MLP(1, SIDE, (options.width, options.width))
    streams = {steps: stream(steps) for steps in (SHORT, LONG)}
    loops = {
        "bare torch": (bare, lambda s: s.experiences[0]),
        "clfed, fast": (ours("fast"), lambda s: s.experiences[0]),
        "clfed, Lightning": (ours("lightning"), lambda s: s.experiences[0]),
        "Avalanche Naive": (avalanche, lambda s: s.benchmark().train_stream[0]),
    }
    seconds: dict[tuple[str, int], list[float]] = {
        (name, steps): [] for name in loops for steps in streams
    }
    for number in range(options.rounds + 1):
        for name, (run, experience) in loops.items():
            for steps, path in streams.items():
                met, fresh = experience(path), copy.deepcopy(backbone)
                if not name.startswith("clfed"):
                    os.environ[DRIVER] = "0"
                start = time.perf_counter()
                with quiet():
                    run(fresh, options.width, met)
                if number:  # the first round pays for imports and caches
                    seconds[name, steps].append(time.perf_counter() - start)
                os.environ[DRIVER] = "1"
    best = {key: 1000 * min(values) for key, values in seconds.items()}
    table = {
        name: ((best[name, LONG] - best[name, SHORT]) / (LONG - SHORT), best[name, SHORT])
        for name in loops
    }
    print(f"{'loop':<20}{'ms a step':>11}{'x bare':>8}{'ms an experience':>19}{'x bare':>8}")
    base = table["bare torch"]
    for name, (step, whole) in table.items():
        print(f"{name:<20}{step:>11.3f}{step / base[0]:>8.2f}{whole:>19.2f}{whole / base[1]:>8.2f}")
    theirs, lightning = table["Avalanche Naive"], table["clfed, Lightning"]
    print(
        f"clfed, Lightning / Avalanche Naive: {lightning[0] / theirs[0]:.2f} a step, "
        f"{lightning[1] / theirs[1]:.2f} an experience of {SHORT} steps"
    )


if __name__ == "__main__":
    main()
