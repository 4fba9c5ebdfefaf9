"""Stability during training: the numbers, and the callback that measures them."""

import copy
import json

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError, NotEnoughData
from clfed.evaluation.callback import ContinualEvaluation
from clfed.evaluation.stability import (
    learning_curve_area,
    min_accuracy,
    summary,
    windowed_forgetting,
    windowed_plasticity,
    worst_case_accuracy,
)

NAN = float("nan")
FALL = [0.9, 0.6, 0.4, 0.5, 0.7]


@st.composite
def trajectories(draw):
    """Accuracies of some tasks, nan before each is met, with the rows at which they ended."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    ends = list(np.cumsum(lengths) - 1)
    rows, tasks = sum(lengths), len(lengths)
    flat = draw(st.lists(st.floats(0, 1), min_size=rows * tasks, max_size=rows * tasks))
    values = np.array(flat).reshape(rows, tasks)
    begins = np.concatenate([[0], np.array(ends[:-1], dtype=int) + 1])
    values[np.arange(rows)[:, None] < begins] = NAN
    if draw(st.booleans()):
        ends = ends[:-1]  # the last task is still being learned
    return values, [int(end) for end in ends]


# --- slow oracles -----------------------------------------------------------------------------


def current(n, ends, tasks):
    return min(sum(end < n for end in ends), tasks - 1)


def slow_min(a, ends, n):
    old = range(current(n, ends, a.shape[1]))
    lowest = [min(a[m, i] for m in range(ends[i] + 1, n + 1)) for i in old]
    return sum(lowest) / len(lowest) if lowest else NAN


def slow_worst(a, ends, n):
    k = current(n, ends, a.shape[1])
    return a[n, k] / (k + 1) + (k and (1 - 1 / (k + 1)) * slow_min(a, ends, n))


def slow_window(a, window, n, sign):
    """Every pair in every window of every task, as the definition says."""
    largest = []
    for column in a[: n + 1].T:
        curve = [float(v) for v in column if not np.isnan(v)]
        if not curve:
            continue
        changes = [
            sign * (curve[first] - curve[second])
            for stop in range(1, len(curve) + 1)
            for first in range(max(0, stop - window), stop)
            for second in range(first + 1, stop)
        ]
        largest.append(max([0.0, *changes]))
    return sum(largest) / len(largest)


# --- numbers ----------------------------------------------------------------------------------


def test_golden_of_one_finished_task():
    curve = np.array(FALL)[:, None]
    assert windowed_forgetting(curve, 2)[-1] == pytest.approx(0.3)
    for window in (3, 5, 100):
        assert windowed_forgetting(curve, window)[-1] == pytest.approx(0.5)
        assert windowed_plasticity(curve, window)[-1] == pytest.approx(0.3)
    assert windowed_plasticity(curve, 2)[-1] == pytest.approx(0.2)


def test_golden_of_the_worst_case():
    # The first task ended before the curve begins; the second one is learned meanwhile.
    curves = [[0.95, NAN], *([old, 0.8] for old in FALL)]
    assert min_accuracy(curves, [0])[-1] == pytest.approx(0.4)
    assert worst_case_accuracy(curves, [0])[-1] == pytest.approx(0.6)
    assert worst_case_accuracy(curves, [0, 5])[-1] == pytest.approx(0.6)
    assert min_accuracy(curves, [0])[1:].tolist() == pytest.approx([0.9, 0.6, 0.4, 0.4, 0.4])


def test_the_end_of_a_task_is_not_yet_part_of_its_minimum():
    assert min_accuracy([[0.1, NAN], [0.9, 0.5]], [0, 1]).tolist() == pytest.approx(
        [NAN, 0.9], nan_ok=True
    )


@given(trajectories(), st.integers(2, 30))
@settings(max_examples=60)
def test_every_number_equals_its_slow_loop(trajectory, window):
    a, ends = trajectory
    rows = range(len(a))
    lowest = [slow_min(a, ends, n) for n in rows]
    assert min_accuracy(a, ends).tolist() == pytest.approx(lowest, nan_ok=True)
    assert worst_case_accuracy(a, ends).tolist() == pytest.approx(
        [slow_worst(a, ends, n) for n in rows]
    )
    for function, sign in ((windowed_forgetting, 1), (windowed_plasticity, -1)):
        expected = [slow_window(a, window, n, sign) for n in rows]
        assert function(a, window).tolist() == pytest.approx(expected)


@given(trajectories())
@settings(max_examples=60)
def test_relations(trajectory):
    a, ends = trajectory
    worst = worst_case_accuracy(a, ends)
    for task, end in enumerate(ends):
        assert worst[end] <= a[end, : task + 1].mean() + 1e-12  # ACC where the task ends
    for function in (windowed_forgetting, windowed_plasticity):
        by_window = np.array([function(a, window) for window in (2, 3, 5, 9, 50)])
        assert (np.diff(by_window, axis=0) >= -1e-12).all() and (by_window >= 0).all()
    met = (~np.isnan(a)).sum(axis=1)
    total = windowed_forgetting(a, 4) * met  # a sum over tasks only grows
    assert (np.diff(total) >= -1e-12).all()


def test_constant_accuracies_change_nothing():
    found = summary([[0.5], [0.5], [0.5]], [2], [0, 1, 2], windows=(2, 10))
    assert found == {"wc_acc": 0.5, "wf2": 0, "wp2": 0, "wf10": 0, "wp10": 0, "lca": 0.5}


def test_lca_takes_the_first_updates_of_each_task():
    curves = [[0.1, NAN], [0.4, NAN], [0.6, NAN], [0.8, NAN], [0.5, 0.2], [0.4, 0.3], [0.4, 0.9]]
    updates = [0, 5, 10, 15, 20, 25, 30]
    assert learning_curve_area(curves, [3, 6], updates) == pytest.approx((0.5 + 0.25) / 2)
    assert learning_curve_area(curves, [3, 6], updates, beta=5) == pytest.approx((0.4 + 0.2) / 2)
    assert learning_curve_area(curves, [3, 6], updates, beta=4) is None
    assert learning_curve_area(curves, [3], updates, beta=5) == pytest.approx((0.4 + 0.2) / 2)


@pytest.mark.parametrize(
    "accuracy, ends, named",
    [
        ([], [], "shape"),
        ([0.5], [0], "shape"),
        ([[]], [], "shape"),
        ([[50.0]], [0], "0 to 1"),
        ([[0.5], [NAN]], [1], "gap"),
        ([[0.5, NAN], [0.5, NAN]], [0, 1], "first evaluation on"),
        ([[NAN], [0.5]], [1], "first evaluation on"),
        ([[0.5]], [1], "rows below 1"),
        ([[0.5]], [-1], "rows below 1"),
        ([[0.5], [0.5]], [0.5], "rows below 2"),
        ([[0.5, NAN], [0.5, 0.5]], [], "2 tasks ended"),
        ([[0.5, 0.5], [0.5, 0.5]], [1, 1], "ascending"),
        ([[0.5]], [0, 0], "ascending"),
    ],
)
@pytest.mark.parametrize("metric", [min_accuracy, worst_case_accuracy])
def test_bad_trajectories_are_refused(metric, accuracy, ends, named):
    with pytest.raises(ConfigError, match=named):
        metric(accuracy, ends)


@pytest.mark.parametrize("window", [1, 0, -3, True, 2.0, None])
def test_a_window_without_a_pair_is_refused(window):
    with pytest.raises(ConfigError, match="at least 2"):
        windowed_forgetting([[0.5]], window)


@pytest.mark.parametrize("updates, beta", [([0], 10), ([1, 0], 10), ([0, 1], 0), ([0, 1], True)])
def test_bad_updates_are_refused(updates, beta):
    with pytest.raises(ConfigError):
        learning_curve_area([[0.5], [0.5]], [1], updates, beta)


def test_long_curves_need_no_loop():
    rng = np.random.default_rng(0)
    a = rng.random((20_000, 10))
    ends = [1999 + 2000 * i for i in range(10)]
    found = summary(a, ends, list(range(20_000)), windows=(10, 20_001))
    assert found["wf20001"] > found["wf10"] > 0.9


# --- the callback -----------------------------------------------------------------------------


class Table:
    """A learner whose answers are written down beforehand."""

    def __init__(self, classes, answers):
        self.classes, self.answers, self.asked = tuple(classes), answers, 0

    def scores_of(self, images):
        self.asked += 1
        torch.rand(3)  # a careless learner draws from the ambient state
        named = images[:, 0].long().tolist()
        columns = [self.classes.index(self.answers[number]) for number in named]
        return F.one_hot(torch.tensor(columns), len(self.classes)).float()


def numbered(first, labels, classes):
    """Features whose first value is the number of the image."""
    images = torch.arange(first, first + len(labels)).float()[:, None].repeat(1, 2)
    return ImageSet(images, torch.tensor(labels), classes)


def steps(callback, learner, count):
    for number in range(count):
        callback.on_train_batch_end(None, learner, None, None, number)


def test_a_plain_loop_measures_what_is_written_down():
    watch = ContinualEvaluation(every=2, samples=None, windows=(2,))
    tests = [numbered(0, [0, 0, 1, 1], ("a", "b")), numbered(4, [0, 1], ("c", "d"))]
    watch.begin_experience(0, tests[0])
    learner = Table("ab", dict.fromkeys(range(4), "a"))
    watch.on_train_start(None, learner)
    learner.answers |= {2: "b"}
    steps(watch, learner, 3)  # one evaluation, after update 2
    learner.answers |= {3: "b"}
    watch.end_experience(learner)
    watch.begin_experience(1, tests[1])
    watch.on_train_start(None, learner)  # not the start of the stream
    learner = Table("abc", {0: "c", 1: "c", 2: "b", 3: "b", 4: "c", 5: "c"})
    steps(watch, learner, 1)
    learner.answers |= {0: "a"}
    steps(watch, learner, 2)
    watch.end_experience(learner)
    result = watch.result()
    assert result["updates"] == [0, 2, 3, 4, 6] and result["ends"] == [2, 4]
    assert result["accuracy"] == [
        [0.5, None],
        [0.75, None],
        [1.0, None],
        [0.5, 0.5],  # d is not among the learner's classes, so its image is wrong
        [0.75, 0.5],
    ]
    assert result["min_acc"] == 0.5 and result["wc_acc"] == 0.5
    assert result["wf2"] == pytest.approx(0.25) and result["wp2"] == pytest.approx(0.125)
    assert json.loads(json.dumps(result)) == result


def test_where_questions_name_their_task_only_its_classes_compete():
    test = numbered(0, [0, 1], ("a", "b"))
    for task_classes, expected in ((False, 0.0), (True, 0.5)):
        watch = ContinualEvaluation(samples=None, task_classes=task_classes)
        watch.begin_experience(0, test)
        learner = Table("zyba", {0: "z", 1: "z"})  # among a and b, the first column wins: b
        watch.end_experience(learner)
        assert watch.result()["accuracy"] == [[expected]]


@pytest.mark.parametrize("task_classes", [False, True])
def test_who_knows_nothing_has_no_right_answer(task_classes):
    class Mute(Table):
        def scores_of(self, images):
            raise NotEnoughData("nothing yet")

    class Unready(Table):
        def scores_of(self, images):
            return torch.full((len(images), len(self.classes)), float(self.answers))

    unready = [Unready("ab", value) for value in ("-inf", "nan")]
    for learner in (Table("", {}), Mute("ab", {}), Table("z", {0: "z", 1: "z"}), *unready):
        watch = ContinualEvaluation(task_classes=task_classes)
        watch.begin_experience(0, numbered(0, [0, 1], ("a", "b")))
        watch.on_train_start(None, learner)
        assert watch.result()["accuracy"] == [[0.0]]


def test_an_end_that_changes_nothing_adds_no_row():
    watch = ContinualEvaluation(every=1, samples=None)
    learner = Table("ab", {0: "a", 1: "a"})
    watch.begin_experience(0, numbered(0, [0, 1], ("a", "b")))
    steps(watch, learner, 2)
    watch.end_experience(learner)
    assert watch.result()["updates"] == [1, 2] and watch.result()["ends"] == [1]


def test_an_end_that_changes_answers_adds_a_row_of_the_same_update():
    watch = ContinualEvaluation(every=1, samples=None)
    learner = Table("ab", {0: "b", 1: "a"})
    watch.begin_experience(0, numbered(0, [0, 1], ("a", "b")))
    steps(watch, learner, 1)
    learner.answers = {0: "a", 1: "b"}
    watch.end_experience(learner)
    assert watch.result()["updates"] == [1, 1] and watch.result()["accuracy"] == [[0.0], [1.0]]


def test_a_learner_without_updates_is_measured_where_experiences_end():
    watch = ContinualEvaluation()
    for number, names in enumerate([("a", "b"), ("c",)]):
        watch.begin_experience(number, numbered(2 * number, list(range(len(names))), names))
        watch.end_experience(Table("abc"[: 2 + number], {0: "a", 1: "b", 2: "c"}))
    assert watch.result()["ends"] == [0, 1] and watch.result()["wc_acc"] == 1.0


def test_samples_are_drawn_once_for_each_task_by_the_seed():
    test = numbered(0, [0, 1] * 50, ("a", "b"))

    def drawn(seed, number=0):
        watch = ContinualEvaluation(samples=7, seed=seed)
        for before in range(number):
            watch.begin_experience(before, test)
            watch.end_experience(Table("ab", dict.fromkeys(range(100), "a")))
        watch.begin_experience(number, test)
        return watch._tests[-1].images[:, 0].tolist()

    assert drawn(0) == drawn(0) and len(set(drawn(0))) == 7
    assert drawn(0) != drawn(1) and drawn(0) != drawn(0, number=1)


class Net(L.LightningModule):
    """A network with everything that an evaluation could disturb."""

    def __init__(self):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            for weights in self.parameters():
                weights.copy_(torch.randn(weights.shape, generator=rng) * 0.3)
        self.classes = ("a", "b")

    @torch.no_grad()
    def scores_of(self, images):
        training = self.training
        self.eval()
        scores = self.head(self.body(images))[:, : len(self.classes)]
        self.train(training)
        return scores

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.head(self.body(images)), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def world(number):
    rng = torch.Generator().manual_seed(number)
    labels = torch.arange(64) % 2
    images = torch.randn(64, 4, generator=rng) + labels[:, None] * 2.0 - number
    names = ("a", "b") if number == 0 else ("c", "d")
    return TensorDataset(images, labels + 2 * number), ImageSet(images, labels, names)


def stream(callback, plain=False):
    """Two experiences with ambient randomness (dropout, shuffling), and the weights at the end."""
    net = Net()
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(3)
        for number in range(2):
            train, test = world(number)
            net.classes = ("a", "b", "c", "d")[: 2 + 2 * number]
            if callback is not None:
                callback.begin_experience(number, test)
            hooks = [callback] if callback is not None else []
            loader = DataLoader(train, batch_size=16, shuffle=True, drop_last=True)
            if plain:
                optimiser = net.configure_optimizers()
                for hook in hooks:
                    hook.on_train_start(None, net)
                net.train()
                for index, batch in enumerate(loader):
                    optimiser.zero_grad()
                    net.training_step(batch, index).backward()
                    optimiser.step()
                    for hook in hooks:
                        hook.on_train_batch_end(None, net, None, batch, index)
            else:
                trainer = L.Trainer(
                    max_epochs=2,
                    accelerator="cpu",
                    callbacks=hooks,
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                )
                trainer.fit(net, loader)
            if callback is not None:
                callback.end_experience(net)
        ambient = torch.rand(4)
    return {**net.state_dict(), "ambient": ambient}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("plain", [True, False])
def test_watching_changes_no_bit_of_the_training(plain):
    watch = ContinualEvaluation(every=1, samples=16)
    alone, watched = stream(None, plain), stream(watch, plain)
    assert all(torch.equal(alone[name], watched[name]) for name in alone)
    result = watch.result()
    per_experience = 4 if plain else 8
    assert result["updates"] == list(range(2 * per_experience + 1))
    assert result["ends"] == [per_experience, 2 * per_experience]


def test_a_resumed_stream_continues_the_same_curve():
    whole = ContinualEvaluation(every=3, samples=16)
    stream(whole, plain=True)

    class Killed(ContinualEvaluation):
        """Its state goes through JSON and into a new object in the middle of experience 1."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if self.updates == 6:
                state, tests = json.loads(json.dumps(self.state())), copy.copy(self._tests)
                self.__init__(every=3, samples=16)
                self.restore(state)
                for number in range(len(tests)):
                    self.begin_experience(number, world(number)[1])

    killed = Killed(every=3, samples=16)
    stream(killed, plain=True)
    assert killed.result() == whole.result() and killed.state() == whole.state()


def test_a_careless_learner_does_not_move_the_ambient_random_state():
    watch, learner = ContinualEvaluation(every=1), Table("ab", {0: "a", 1: "b"})
    watch.begin_experience(0, numbered(0, [0, 1], ("a", "b")))
    before = torch.random.get_rng_state()
    steps(watch, learner, 2)
    watch.end_experience(learner)
    assert learner.asked == 3 and torch.equal(torch.random.get_rng_state(), before)


def test_out_of_turn_calls_are_refused():
    test, learner = numbered(0, [0, 1], ("a", "b")), Table("ab", {0: "a", 1: "b"})
    watch = ContinualEvaluation(every=1)
    with pytest.raises(ConfigError, match="has begun"):
        watch.end_experience(learner)
    with pytest.raises(ConfigError, match="begin_experience"):
        steps(watch, learner, 1)
    with pytest.raises(NotEnoughData, match="one evaluation"):
        watch.result()
    with pytest.raises(ConfigError, match="Expected experience 0 next"):
        watch.begin_experience(1, test)
    with pytest.raises(NotEnoughData, match="no test image"):
        watch.begin_experience(0, test.subset(torch.tensor([], dtype=torch.int64)))
    watch.begin_experience(0, test)
    with pytest.raises(ConfigError, match="the end of experience 0 next"):
        watch.begin_experience(1, test)
    watch.end_experience(learner)
    with pytest.raises(ConfigError, match="begin_experience"):
        steps(watch, learner, 1)
    again = ContinualEvaluation(every=1)
    again.restore(watch.state())
    with pytest.raises(ConfigError, match="Expected experience 0 next"):
        again.begin_experience(1, test)
    with pytest.raises(ConfigError, match="begin_experience"):
        steps(again, learner, 1)
    assert watch.updates == again.updates == 0


@pytest.mark.parametrize(
    "options",
    [
        {"every": 0},
        {"every": True},
        {"every": 2.0},
        {"every": None},
        {"samples": 0},
        {"samples": "all"},
        {"samples": True},
        {"windows": (1,)},
        {"windows": (True,)},
        {"task_classes": 1},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError):
        ContinualEvaluation(**options)
