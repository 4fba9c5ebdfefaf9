"""Streaming LDA and nearest class mean beside Avalanche's, on the same stream of ready features.

    python tests/benchmarks/avalanche_statistics.py [--mnist ../shared/data] [--threads 1]

Both sides meet the same images in the same order in the same process. Timed are the training of
all experiences and the exam about all test images, from the caller's side: with Avalanche its
``train`` and ``eval``, without metrics and loggers. Agreement counts the test images on which the
two give the same answer.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from clfed.backbones import Identity
from clfed.backbones.encoder import Transform
from clfed.data import digits
from clfed.data.benchmark import Benchmark, ImageSet
from clfed.learners.fitting import learn
from clfed.learners.ncm import NearestClassMean
from clfed.learners.options import TrainerOptions
from clfed.learners.slda import StreamingLDA
from clfed.scenarios import Stream, split
from clfed.scenarios.avalanche_benchmarks import quiet
from clfed.seeding import generator

with quiet():
    from avalanche.core import SupervisedPlugin
    from avalanche.models import NCMClassifier, TrainEvalModel
    from avalanche.training import Naive
    from avalanche.training import StreamingLDA as TheirLDA
    from avalanche.training.plugins import CurrentDataNCMUpdate, EvaluationPlugin

Result = tuple[float, float, Tensor]


def features(name: str, train: ImageSet, test: ImageSet | None) -> Benchmark:
    def flat(images: ImageSet) -> ImageSet:
        return ImageSet(images.images.flatten(1).float() / 255, images.labels, images.classes)

    groups = {"base": train.classes, "validation": (), "field": ()}
    tests = None if test is None else flat(test)
    return Benchmark(name, flat(train), tests, groups, (), (), "pixels as features")


def gaussians(dim: int, classes: int = 20, images: int = 250) -> Benchmark:
    """Features with a shared covariance, as a pre-trained network's might be."""
    rng = generator(0, "gaussians", dim)
    means = torch.randn(classes, dim, generator=rng)
    mixing = torch.randn(dim, dim, generator=rng) / dim**0.5
    names = tuple(f"class {c:02d}" for c in range(classes))

    def draw(count: int) -> ImageSet:
        labels = torch.arange(classes).repeat_interleave(count)
        noise = torch.randn(len(labels), dim, generator=rng) @ mixing
        return ImageSet(means[labels] + 8 * noise, labels, names)

    groups = {"base": names, "validation": (), "field": ()}
    return Benchmark(f"{dim} numbers", draw(images), draw(100), groups, (), (), "made")


def ours(make: Callable[..., nn.Module], stream: Stream, dim: int, **options: object) -> Result:
    learner = make(Identity(), Transform((), ()), dim=dim, train="none", **options)
    start = time.perf_counter()
    for experience in stream.experiences:
        learn(learner, experience, TrainerOptions(threads=torch.get_num_threads(), loop="fast"))
    middle = time.perf_counter()
    scores = learner.scores_of(torch.cat([test.images for test in stream.tests]))
    return middle - start, time.perf_counter() - middle, scores.argmax(1)


class Answers(SupervisedPlugin):
    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []

    def after_eval_forward(self, strategy: object, **_: object) -> None:
        self.given.append(strategy.mb_output.argmax(1))


def theirs(name: str, stream: Stream, dim: int) -> Result:
    answers = Answers()
    common = {
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": 128,
        "eval_mb_size": 256,
        "evaluator": EvaluationPlugin(),
    }
    if name == "slda":
        strategy = TheirLDA(
            slda_model=nn.Identity(),
            input_size=dim,
            num_classes=len(stream.classes),
            plugins=[answers],
            **common,
        )
    else:
        head = nn.Linear(dim, len(stream.classes))
        strategy = Naive(
            model=TrainEvalModel(nn.Identity(), head, NCMClassifier(normalize=False)),
            optimizer=torch.optim.SGD(head.parameters(), 0.1),
            train_epochs=0,
            plugins=[CurrentDataNCMUpdate(), answers],
            **common,
        )
    benchmark = stream.benchmark()
    start = time.perf_counter()
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[], shuffle=False)
    middle = time.perf_counter()
    strategy.eval(benchmark.test_stream)
    return middle - start, time.perf_counter() - middle, torch.cat(answers.given)


def compare(benchmark: Benchmark, experiences: int, train_images: int | None) -> None:
    dim = benchmark.train.images.shape[1]
    stream = split(benchmark, 0, experiences=experiences, train_images=train_images)
    train = sum(len(e.train) for e in stream.experiences)
    place = {name: row for row, name in enumerate(stream.classes)}
    truth = torch.cat(
        [torch.tensor([place[name] for name in t.classes])[t.labels] for t in stream.tests]
    )
    print(f"\n{benchmark.name}: {train} training and {len(truth)} test images, {dim} numbers each")
    print(f"  {'method':<22}{'accuracy':>9}{'agree':>12}{'learned/s':>12}{'asked/s':>11}  ratio")
    for name, make, modes in (
        ("slda", StreamingLDA, ("paper", "exact")),
        ("ncm", NearestClassMean, (None,)),
    ):
        with quiet():
            base = theirs(name, stream, dim)
        row(f"Avalanche {name}", base, base, train, truth)
        for mode in modes:
            options = {} if mode is None else {"mode": mode}
            found = ours(make, stream, dim, **options)
            row(f"clfed {name} {mode or ''}".rstrip(), found, base, train, truth)


def row(name: str, found: Result, base: Result, train: int, truth: Tensor) -> None:
    learning, asking, answers = found
    accuracy = float((answers == truth).double().mean())
    same = int((answers == base[2]).sum())
    ratios = f"{base[0] / learning:.1f}x learned, {base[1] / asking:.1f}x asked"
    print(
        f"  {name:<22}{accuracy:>9.4f}{same:>6}/{len(truth):<5}{train / learning:>12,.0f}"
        f"{len(truth) / asking:>11,.0f}  {ratios}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mnist", help="folder that holds mnist")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    made = digits.load()
    # A first run pays for imports and caches, which is not what is compared.
    small = split(features("digits", made.train, made.test), 0, train_images=5)
    ours(StreamingLDA, small, 64)
    with quiet():
        theirs("slda", small, 64)
    compare(features("digits", made.train, made.test), 5, None)
    compare(gaussians(64), 10, None)
    compare(gaussians(512), 10, None)
    if options.mnist:
        from clfed.data import mnist

        data = mnist.load(options.mnist)
        compare(features("MNIST pixels", data.train, data.test), 5, 300)


if __name__ == "__main__":
    main()
