"""Avalanche both ways: its strategies as learners, our learners as its strategies."""

import copy
import random

import numpy as np
import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark, task_incremental_benchmark
from avalanche.benchmarks.utils import (
    ConstantSequence,
    DataAttribute,
    TaskAwareSupervisedClassificationDataset,
    TaskLabels,
)
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics, loss_metrics
from avalanche.training import ICaRL, Naive
from avalanche.training.plugins import EvaluationPlugin
from torch import nn

from clfed.backbones import MLP
from clfed.backbones.encoder import Transform
from clfed.data import digits
from clfed.errors import ConfigError
from clfed.evaluation.exam import Exam
from clfed.learners import naive, ncm, state
from clfed.learners.avalanche import AvalancheLearner
from clfed.learners.avalanche_strategy import as_avalanche, to_pictures
from clfed.learners.fitting import learn
from clfed.learners.options import TrainerOptions
from clfed.learners.training import initialisation
from clfed.scenarios import few_shot, online, permuted, split
from clfed.scenarios.avalanche_benchmarks import Labelled
from clfed.seeding import derive_seed

DIGITS = digits.load()
OPTIONS = TrainerOptions(precision="32", threads=1, loop="fast")
WIDTH = 32


def backbone(seed=0):
    with initialisation(seed, "backbone"):
        return MLP(1, 8, (WIDTH,))


def make(kind, seed=0, **options):
    settings = {"epochs": 2, "batch_size": 32, "dim": WIDTH, "seed": seed} | options
    return kind(backbone(seed), Transform(DIGITS.mean, DIGITS.std), **settings)


def stream(seed=0, **options):
    return split(DIGITS, seed, **{"train_images": 20, "test_images": 20, **options})


def through(learner, path, part=slice(None)):
    for experience in path.experiences[part]:
        learn(learner, experience, OPTIONS)
    return learner


def accuracy(learner, path):
    return Exam(path.tests).take(learner, len(path.tests)).images


# Their strategies, our stream -------------------------------------------------------------------


class Spy(SupervisedPlugin):
    def __init__(self):
        super().__init__()
        self.met = []

    def before_training_exp(self, strategy, **_):
        e = strategy.experience
        samples = [e.dataset[i] for i in range(len(e.dataset))]
        images = torch.stack([x for x, _, _ in samples])
        lists = [y for _, y, _ in samples], e.current_experience
        timeline = e.classes_in_this_experience, e.previous_classes, e.classes_seen_so_far
        self.met.append((images, lists, [set(t) for t in (*timeline, e.future_classes)]))


@pytest.mark.parametrize("scenario", ["split", "domain", "permuted", "few_shot"])
def test_a_strategy_meets_the_benchmark_of_the_stream(scenario):
    path = {
        "split": lambda: stream(class_order="seeded"),
        "domain": lambda: stream(setting="domain"),
        "permuted": lambda: permuted(DIGITS, 0, experiences=2, train_images=5, test_images=5),
        "few_shot": lambda: few_shot(DIGITS, 0, base_classes=6, way=2, train_images=9),
    }[scenario]()
    spy = Spy()
    through(make(AvalancheLearner, options={"plugins": [spy]}), path)
    for theirs, expected in zip(spy.met, path.benchmark().train_stream, strict=True):
        samples = [expected.dataset[i] for i in range(len(expected.dataset))]
        assert torch.equal(theirs[0], torch.stack([x for x, _, _ in samples]))
        assert theirs[1] == ([y for _, y, _ in samples], expected.current_experience)
        assert theirs[2] == [
            expected.classes_in_this_experience,
            expected.previous_classes,
            expected.classes_seen_so_far,
            expected.future_classes,
        ]


class Seeded(SupervisedPlugin):
    """Draws as the learner does, so that a run by hand can be compared."""

    def before_training(self, strategy, **_):
        torch.manual_seed(derive_seed(0, "avalanche", "train", strategy.clock.train_exp_counter))


def test_a_learner_is_the_strategy_run_by_hand():
    path = stream()
    ours = through(make(AvalancheLearner, lr=0.01, options={"train_mb_size": 16}), path)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(0, "avalanche", "begin", 0))
        head = nn.Linear(WIDTH, 10)
        network = nn.Sequential(backbone(), head)
        scale = Transform(DIGITS.mean, DIGITS.std)
        network.forward = lambda images: head(network[0](scale(images)))
        optimiser = torch.optim.AdamW(network.parameters(), 0.01, weight_decay=0.0)
        plain = Naive(
            model=network,
            optimizer=optimiser,
            train_mb_size=16,
            train_epochs=2,
            plugins=[Seeded()],
            evaluator=EvaluationPlugin(),
        )
        for experience in path.benchmark().train_stream:
            plain.train(experience, eval_streams=[])
    expected = {f"backbone.{k}": v for k, v in network[0].state_dict().items()}
    expected |= {f"head.{k}": v for k, v in head.state_dict().items()}
    found = ours.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    images = torch.cat([t.images for t in path.tests])
    with torch.no_grad():
        torch.testing.assert_close(ours.scores_of(images), network(images))
        torch.testing.assert_close(ours(images[:7]), network(images[:7]))


STRATEGIES = {
    "Cumulative": ({}, 200, False),
    "EWC": ({"ewc_lambda": 1.0}, 0, True),
    "LwF": ({"alpha": 1.0, "temperature": 2.0}, 0, True),
    "SI": ({"si_lambda": 1.0}, 0, True),
    "MAS": ({}, 0, True),
    "Replay": ({"mem_size": 30}, 30, False),
    "GDumb": ({"mem_size": 30}, 30, True),
    "DER": ({"mem_size": 30}, 30, True),
    "ICaRL": ({"memory_size": 30, "buffer_transform": None, "fixed_memory": True}, 30, True),
    "AGEM": ({"patterns_per_exp": 6}, 30, True),
    "SLDA": ({}, 0, True),
    "NCM": ({}, 0, True),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_run_and_what_they_keep_is_counted(name):
    options, images, more = STRATEGIES[name]
    path = stream()
    learner = make(AvalancheLearner, strategy=name, options=options, epochs=1)
    first = copy.deepcopy(learner)
    first.begin_experience(path.experiences[0])
    assert first.scores_of(path.tests[0].images).shape == (40, 2)
    steps = [learn(learner, e, OPTIONS) for e in path.experiences]
    assert all(steps) and learner.classes == path.classes
    scores = learner.scores_of(torch.cat([t.images for t in path.tests]))
    assert scores.shape == (200, 10) and bool(scores.isfinite().all())
    assert accuracy(learner, path) > (0.8 if name == "SLDA" else 0.1)
    kept = state.stored(learner)
    assert learner.images_kept == images and kept["images"] == images * 64
    assert (kept["extra"] > 0) == more
    weights = sum(p.numel() for p in (*learner.backbone.parameters(), *learner.head.parameters()))
    assert kept["network"] == 4 * weights


def test_ewc_keeps_an_importance_and_an_anchor_for_each_experience():
    path = stream(experiences=2)
    learner = make(AvalancheLearner, strategy="EWC", options={"ewc_lambda": 1.0})
    weights = 4 * sum(p.numel() for p in backbone().parameters()) + 4 * 10 * (WIDTH + 1)
    for number, experience in enumerate(path.experiences, start=1):
        learn(learner, experience, OPTIONS)
        assert state.stored(learner)["extra"] == number * 2 * weights


def test_same_seed_same_bytes_and_ambient_generators_untouched():
    path = stream()

    def ambient():
        legacy = np.random.get_state()[1].tolist()  # noqa: NPY002
        return torch.get_rng_state().tolist(), random.getstate(), legacy

    options = {"strategy": "Replay", "options": {"mem_size": 20}}
    first = make(AvalancheLearner, **options)
    before = ambient()
    through(first, path)
    first.scores_of(path.tests[0].images)
    assert ambient() == before
    torch.rand(3)
    assert state.sha256(first) == state.sha256(through(make(AvalancheLearner, **options), path))
    other = through(make(AvalancheLearner, seed=1, **options), path)
    assert state.sha256(first) != state.sha256(other)


def test_asking_changes_nothing():
    path = stream()
    quiet, asked = make(AvalancheLearner), make(AvalancheLearner)
    for experience in path.experiences:
        learn(quiet, experience, OPTIONS)
        learn(asked, experience, OPTIONS)
        before = state.sha256(asked)
        asked.scores_of(path.tests[0].images)
        assert state.sha256(asked) == before
    assert state.sha256(quiet) == state.sha256(asked)


def test_where_nobody_knows_how_many_classes_come_the_head_grows():
    path = online(DIGITS, 0, size=50, train_images=20, test_images=10)
    learner = make(AvalancheLearner)
    for experience in path.experiences:
        learn(learner, experience, OPTIONS)
        scores = learner.scores_of(path.tests[0].images)
        assert scores.shape == (20, len(learner.classes))
    assert len(learner.classes) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "Nothing"}, "no strategy 'Nothing'"),
        ({"strategy": "nn"}, "no strategy"),
        ({"strategy": None}, "no strategy"),
        ({"strategy": "EWC"}, "ewc_lambda"),
        ({"strategy": "Naive", "options": {"magic": 1}}, "magic"),
        ({"strategy": "LFL", "options": {"lambda_e": "many"}}, "LFL failed"),
    ],
)
def test_what_does_not_fit_is_one_sentence(options, message):
    with pytest.raises(ConfigError, match=message):
        through(make(AvalancheLearner, **options), stream())


def test_a_strategy_that_needs_the_number_of_classes_says_so():
    path = online(DIGITS, 0, size=50, train_images=5)
    with pytest.raises(ConfigError, match="how many classes"):
        through(make(AvalancheLearner, strategy="SLDA"), path)
    told = make(AvalancheLearner, strategy="SLDA", options={"num_classes": 10}, epochs=1)
    assert accuracy(through(told, path), path) > 0.5


def test_a_stopped_run_is_not_continued_in_silence():
    learner = through(make(AvalancheLearner), stream(), slice(2))
    with pytest.raises(ConfigError, match="cannot go on"):
        state.restore(make(AvalancheLearner), state.state_of(learner))


# Our learners, their loops ------------------------------------------------------------------------


def scores_of_all(learner, path):
    return learner.scores_of(torch.cat([t.images for t in path.tests]))


@pytest.mark.parametrize("kind", [naive.Naive, ncm.NearestClassMean])
def test_their_loop_trains_to_the_same_bytes_as_ours(kind):
    path = stream()
    ours, theirs = make(kind), make(kind)
    strategy = as_avalanche(theirs, names=path.classes, evaluator=EvaluationPlugin())
    for mine, experience in zip(path.experiences, path.benchmark().train_stream, strict=True):
        learn(ours, mine, OPTIONS)
        strategy.train(experience)
        assert state.sha256(ours) == state.sha256(theirs)
    assert strategy.optimizer is None or kind is naive.Naive or theirs.train_on == "first"


def test_their_metrics_are_our_exam():
    path = stream()
    learner = make(naive.Naive, lr=0.01)
    evaluator = EvaluationPlugin(
        accuracy_metrics(minibatch=True, epoch=True, experience=True, stream=True),
        loss_metrics(minibatch=True, stream=True),
        forgetting_metrics(experience=True),
        strict_checks=True,
    )
    strategy = as_avalanche(learner, names=path.classes, evaluator=evaluator)
    made, marks = path.benchmark(), []
    for phase, experience in enumerate(made.train_stream):
        strategy.train(experience)
        found = strategy.eval(made.test_stream)
        marks.append(Exam(path.tests).take(learner, phase + 1).phases)
        for number, mark in enumerate(marks[-1]):
            key = f"Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp{number:03d}"
            assert found[key] == pytest.approx(mark or 0.0)
        met = [mark for mark in marks[-1] if mark is not None]
        assert found["Top1_Acc_Stream/eval_phase/test_stream/Task000"] == pytest.approx(
            sum(met) / 5
        )
        assert np.isfinite(found["Loss_Stream/eval_phase/test_stream/Task000"])
    for number in range(4):
        key = f"ExperienceForgetting/eval_phase/test_stream/Task000/Exp{number:03d}"
        assert found[key] == pytest.approx(marks[number][number] - marks[4][number])
    curves = evaluator.get_all_metrics()
    steps, losses = curves["Loss_MB/train_phase/train_stream/Task000"]
    assert len(steps) == 5 * 2 * 2 and losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert curves["Top1_Acc_MB/train_phase/train_stream/Task000"][1][3] > 0.9


class Watch(SupervisedPlugin):
    """Adds to the loss, and stops after some iterations."""

    def __init__(self, stop=None):
        super().__init__()
        self.stop, self.iterations, self.hooks = stop, 0, []

    def before_backward(self, strategy, **_):
        strategy.loss = strategy.loss + 0.5 * sum(
            p.square().sum() for p in strategy.model.parameters()
        )

    def after_update(self, strategy, **_):
        self.iterations += 1
        if self.iterations == self.stop:
            strategy.stop_training()


def test_their_plugins_act_on_the_training():
    path = stream(experiences=2)
    (experience, _), watch = path.benchmark().train_stream, Watch()
    free, held, stopped = (make(naive.Naive) for _ in range(3))
    as_avalanche(free, evaluator=EvaluationPlugin()).train(experience)
    as_avalanche(held, plugins=[watch], evaluator=EvaluationPlugin()).train(experience)
    assert watch.iterations == held.length == 2 * 4

    def norm(learner):
        return sum(float(p.detach().square().sum()) for p in learner.parameters())

    assert norm(held) < norm(free)
    watch = Watch(stop=3)
    as_avalanche(stopped, plugins=[watch], evaluator=EvaluationPlugin()).train(experience)
    assert watch.iterations == 3 == stopped.step_number


def foreign(tasks=False, scale=1.0):
    """A benchmark of Avalanche's own making: colours of 0..1, labels in its random order."""
    sets = {}
    images, labels = DIGITS.train.images.float() / 255 * scale, DIGITS.train.labels
    for name, part in (("train", slice(0, None, 2)), ("test", slice(1, None, 2))):
        y = labels[part][:200].tolist()
        attributes = [DataAttribute(y, "targets")]
        if not tasks:
            attributes.append(TaskLabels(ConstantSequence(0, len(y))))
        data = Labelled(images[part][:200], y)
        if tasks:
            from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset

            sets[name] = ClassificationDataset([data], data_attributes=attributes)
        else:
            sets[name] = TaskAwareSupervisedClassificationDataset(
                [data], data_attributes=attributes
            )
    made = class_incremental_benchmark(sets, num_experiences=5, seed=3)
    return task_incremental_benchmark(made) if tasks else made


def test_a_benchmark_of_their_own_is_learned():
    made = foreign()
    evaluator = EvaluationPlugin(accuracy_metrics(stream=True))
    learner = make(ncm.NearestClassMean, train="none")
    strategy = as_avalanche(learner, evaluator=evaluator)
    for experience in made.train_stream:
        strategy.train(experience)
    assert set(learner.classes) == set(map(str, range(10)))
    (found,) = strategy.eval(made.test_stream).values()
    assert found > 0.75
    # By hand: the same pixels, the same means.
    train, test = (
        [
            (x.mul(255).round(), y)
            for e in part
            for x, y, *_ in (e.dataset[i] for i in range(len(e.dataset)))
        ]
        for part in (made.train_stream, made.test_stream)
    )
    scale = Transform(DIGITS.mean, DIGITS.std)
    with torch.no_grad():
        h, q = (
            learner.backbone(scale(torch.stack([x for x, _ in part]))) for part in (train, test)
        )
    y, truth = (torch.tensor([y for _, y in part]) for part in (train, test))
    means = torch.stack([h[y == c].mean(0) for c in range(10)])
    right = torch.cdist(q, means).argmin(1) == truth
    expected = float(right.float().mean())
    assert found == pytest.approx(expected, abs=0.006)


def test_task_labels_restrict_the_answers():
    made = foreign(tasks=True)
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True))
    strategy = as_avalanche(make(ncm.NearestClassMean, train="none"), evaluator=evaluator)
    for experience in made.train_stream:
        strategy.train(experience)
    found = strategy.eval(made.test_stream)
    marks = [value for key, value in found.items() if key.startswith("Top1_Acc_Exp")]
    assert len(marks) == 5 and min(marks) > 0.85


def test_normalised_pictures_are_refused_until_somebody_undoes_it():
    made = foreign(scale=3.0)
    experience = made.train_stream[0]
    with pytest.raises(ConfigError, match=r"0\.\.1, got values of 0\.\.3"):
        as_avalanche(make(naive.Naive), evaluator=EvaluationPlugin()).train(experience)
    learner = make(naive.Naive)
    undone = as_avalanche(
        learner, pictures=lambda x: to_pictures(x / 3), evaluator=EvaluationPlugin()
    )
    undone.train(experience)
    assert learner.length > 0
    pictures = torch.tensor([[[[0, 128, 255]]]], dtype=torch.uint8)
    assert to_pictures(pictures) is pictures
    assert torch.equal(to_pictures(pictures / 255), pictures)
    assert to_pictures(torch.ones(2, 3).double()).dtype == torch.float32


def test_their_icarl_runs_on_our_benchmark():
    path = stream()
    features = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
    features.forward = lambda x: features[2](features[1](features[0](x.float() / 255)))
    head = nn.Linear(16, 10)
    optimiser = torch.optim.SGD([*features.parameters(), *head.parameters()], 0.1)
    strategy = ICaRL(
        feature_extractor=features,
        classifier=head,
        optimizer=optimiser,
        memory_size=50,
        buffer_transform=None,
        fixed_memory=True,
        train_mb_size=32,
        eval_mb_size=64,
        evaluator=EvaluationPlugin(accuracy_metrics(stream=True)),
    )
    for experience in path.benchmark().train_stream:
        strategy.train(experience)
    found = strategy.eval(path.benchmark().test_stream)
    assert found["Top1_Acc_Stream/eval_phase/test_stream/Task000"] > 0.3
