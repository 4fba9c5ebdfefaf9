"""Exact unlearning by construction: places of samples, states of shards, orders of slices."""

import copy
import itertools

import numpy as np
import pytest
import torch

from clfed.backbones import MLP
from clfed.backbones.conv4 import Conv4
from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError, NotEnoughData
from clfed.learners import state
from clfed.learners.fitting import learn
from clfed.learners.naive import Naive
from clfed.learners.options import TrainerOptions
from clfed.scenarios.streams import Experience
from clfed.seeding import derive_seed, generator
from clfed.unlearning import History, Request, forget, make_context
from clfed.unlearning.s3t import S3T
from clfed.unlearning.sequences import (
    choose_orders,
    depths,
    expected_deletions,
    matched,
    sampled,
    survival,
)
from clfed.unlearning.shards import Partition, combined
from clfed.unlearning.sisa import Sisa
from clfed.unlearning.stages import Plan, Stages

OPTIONS = TrainerOptions(precision="32", threads=1, loop="fast")
CLASSES = ("ant", "bee", "cat", "dog")
SISA = {"shards": 2, "slices": 3, "combine": "mean"}
STAGES = {"slices": 3, "budget": 3, "epochs": 4, "batch_size": 16, "lr": 0.02, "optimizer": "adam"}


def points(seed=0, per_class=24):
    labels = torch.arange(4).repeat_interleave(per_class)
    centres = torch.tensor([[2.0, 2.0], [-2.0, 2.0], [2.0, -2.0], [-2.0, -2.0]])
    noise = 0.5 * torch.randn(len(labels), 2, generator=generator(seed, "points"))
    return ImageSet(centres[labels] + noise, labels, CLASSES)


def blank(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = MLP(2, 0, (16, 12, 8))
    options = {"epochs": 6, "batch_size": 16, "lr": 0.02, "moments": "none", **options}
    return Naive(backbone, Transform((), ()), name="naive", seed=seed, dim=8, **options)


def train(images, seed, *, start=None, **options):
    learner = blank(seed, **options) if start is None else copy.deepcopy(start)
    learner.seed = seed
    learn(learner, Experience(learner.number + 1, images, phase=0, upcoming=0), OPTIONS)
    return learner.eval()


def history(keep=None, recipe=train, images=None, seed=5):
    images, ids = images or points(), torch.arange(96)
    keep = torch.ones(96, dtype=torch.bool) if keep is None else keep
    return History(recipe, images.subset(keep), ids[keep], seed)


def without(gone):
    return ~torch.isin(torch.arange(96), torch.as_tensor(gone))


def run(kind, learner, gone, settings, there=None, **options):
    there = torch.ones(96, dtype=torch.bool) if there is None else there
    around = make_context(
        Request("r", "sample", samples=tuple(gone)),
        learner,
        points().subset(there),
        torch.arange(96)[there],
        gone=torch.as_tensor(gone),
        train=train,
        learner_seed=5,
        seed=1,
    )
    return forget(kind(learner, seed=1, **settings, **options), around, OPTIONS)


@pytest.fixture(scope="module")
def sisa():
    return Sisa.original(history(), SISA)


@pytest.fixture(scope="module")
def s3t():
    return S3T.original(history(), STAGES)


# Places -------------------------------------------------------------------------------------------


def test_a_place_depends_on_the_sample_and_the_seed_alone():
    partition = Partition(3, 4, seed=7)
    ids = torch.arange(1000)
    some = ids[torch.randperm(1000, generator=generator(0))[:100]]
    for whole, part in zip(partition.places(ids), partition.places(some), strict=True):
        assert torch.equal(whole[some], part)
    other = Partition(3, 4, seed=8).places(ids)
    assert not torch.equal(partition.places(ids)[0], other[0])


def test_every_run_of_samples_fills_all_cells_from_a_drawn_start():
    shards, slices = Partition(3, 4, seed=7).places(torch.arange(12_000))
    cells = (shards * 4 + slices).view(1000, 12)
    assert bool((cells.sort(1).values == torch.arange(12)).all())
    starts = torch.bincount(cells[:, 0], minlength=12).double()
    assert float((starts - 1000 / 12).abs().max()) < 4 * np.sqrt(1000 / 12)


@pytest.mark.parametrize("shape", [(0, 1), (1, 0)])
def test_a_partition_has_cells(shape):
    with pytest.raises(ConfigError, match="shards"):
        Partition(*shape, seed=0)


# Answers ------------------------------------------------------------------------------------------


def test_the_ensemble_answers_by_the_mean_probability_or_by_votes():
    logits = 3 * torch.randn(5, 40, 4, generator=generator(0))
    exp = np.exp(logits.double().numpy())
    shares = exp / exp.sum(2, keepdims=True)
    mean = combined(logits, "mean")
    np.testing.assert_allclose(mean.exp(), shares.mean(0), rtol=1e-4)
    votes = np.eye(4)[shares.argmax(2)].sum(0)
    voted = combined(logits, "vote").exp().double().numpy()
    np.testing.assert_allclose(voted.sum(1), 1, rtol=1e-5)
    for found, count, share in zip(voted, votes, shares.mean(0), strict=True):
        first = max(range(4), key=lambda k: (count[k], share[k]))
        assert int(found.argmax()) == first


def test_the_served_model_is_its_shards(sisa):
    inner = sisa.backbone
    scores = [np.exp(inner.of_shard(s)[-1].scores_of(points().images).numpy()) for s in range(2)]
    shares = np.mean([s / s.sum(1, keepdims=True) for s in scores], axis=0)
    np.testing.assert_allclose(sisa.scores_of(points().images).exp(), shares, rtol=1e-4)
    again = copy.deepcopy(sisa)
    assert state.sha256(again) == state.sha256(sisa)
    with torch.no_grad():
        next(again.backbone.of_shard(0)[0].parameters()).add_(1)  # a state that does not answer
    assert state.sha256(again) != state.sha256(sisa)


# SISA ---------------------------------------------------------------------------------------------


def test_a_shard_is_trained_slice_by_slice(sisa):
    shards, slices = Partition(2, 3, 5).places(torch.arange(96))
    for shard in range(2):
        model = blank(derive_seed(5, "shard", shard), epochs=3)  # 2 * 6 / (3 + 1)
        model.grow(CLASSES)
        for number in range(3):
            mine = (shards == shard) & (slices <= number)
            model.memory = None
            model = train(points().subset(mine), model.seed, start=model)
            kept = sisa.backbone.of_shard(shard)[number]
            for name, value in model.backbone.state_dict().items():
                assert torch.equal(value, kept.backbone.state_dict()[name])


def test_one_sample_costs_its_shard_from_its_slice_on(sisa):
    partition, ids = sisa.backbone.partition, torch.arange(96)
    shards, slices = partition.places(ids)
    gone = ids[(shards == 1) & (slices == 2)][:1]
    model, report = run(Sisa, sisa, gone.tolist(), SISA)
    kept, made = sisa.backbone, model.backbone
    for shard, number in itertools.product(range(2), range(3)):
        pair = [state.sha256(m.of_shard(shard)[number]) for m in (kept, made)]
        assert (pair[0] == pair[1]) == ((shard, number) != (1, 2))
    assert report.lineage["shards"] == [1] and report.lineage["slices"] == 1
    passes = [16, 32, 48, 16, 32, 47]  # images of each slice with all before it
    assert report.lineage["share of the training"] == pytest.approx(47 / sum(passes))
    assert report.touched["retain images"] == 47
    assert report.steps == 3 * 3  # epochs of three batches


@pytest.mark.parametrize("gone", [[0], [1, 2, 50], [*range(24)], [*range(0, 96, 10)]])
def test_sisa_forgets_to_the_bit(sisa, gone):
    model, _ = run(Sisa, sisa, gone, SISA)
    assert not set(model.backbone.ids.tolist()) & set(gone)
    fresh = Sisa.original(history(without(gone)), SISA)
    assert state.sha256(model) == state.sha256(fresh)


def test_two_requests_are_as_one(sisa):
    first, _ = run(Sisa, sisa, [3, 40], SISA)
    second, _ = run(Sisa, first, [7], SISA, there=without([3, 40]))
    both, _ = run(Sisa, sisa, [3, 7, 40], SISA)
    assert state.sha256(second) == state.sha256(both)


def test_ten_percent_at_random_cost_nearly_everything(sisa):
    gone = torch.randperm(96, generator=generator(0))[:10].tolist()
    _, report = run(Sisa, sisa, gone, SISA)
    assert report.lineage["share of the training"] > 0.6


def test_a_shard_without_images_abstains():
    partition = Partition(2, 3, 5)
    shards, _ = partition.places(torch.arange(96))
    model = Sisa.original(history(shards == 0), SISA)
    alone = model.backbone.of_shard(0)[-1].scores_of(points().images).log_softmax(1)
    torch.testing.assert_close(model.scores_of(points().images), alone)


def test_a_record_of_what_went_is_noticed(sisa):
    with pytest.raises(AssertionError, match="1 forgotten"):
        sisa.backbone.check_without(torch.tensor([3, 1000]))


def test_a_recipe_with_steps_is_divided_too():
    def short(images, seed, *, start=None):
        return train(images, seed, start=start, steps=30)

    model = Sisa.original(history(recipe=short), SISA)
    assert {m.length for shard in range(2) for m in model.backbone.of_shard(shard)} == {5}


def test_sisa_takes_its_own_models_and_recipes_with_a_head(s3t):
    for other in (train(points(), 0), s3t):
        with pytest.raises(ConfigError, match="own original"):
            run(Sisa, other, [0], SISA)

    def reads_memory(images, seed, *, start=None):
        return train(images, seed, start=start, classifier={"name": "ncm"})

    with pytest.raises(ConfigError, match="head"):
        Sisa.original(history(recipe=reads_memory), SISA)
    with pytest.raises(ConfigError, match="combine"):
        Sisa(train(points(), 0), combine="median")


# Orders -------------------------------------------------------------------------------------------


def test_depths_agree_with_a_slow_loop():
    rng = generator(0)
    orders = torch.stack([torch.stack([torch.randperm(5, generator=rng) for _ in range(4)])] * 3)
    for _ in range(20):
        intact = torch.rand(3, 5, generator=rng) < 0.7
        for shard, order in itertools.product(range(3), range(4)):
            depth = 0
            while depth < 5 and intact[shard, orders[shard, order, depth]]:
                depth += 1
            assert int(depths(orders, intact)[shard, order]) == depth


@pytest.mark.parametrize(("budget", "mean"), [(1, 68.5), (2, 87.9), (4, 107.9), (6, 119.8)])
def test_expected_deletions_of_five_shards_of_six_slices(budget, mean):
    assert expected_deletions(5, 6, budget) == pytest.approx(mean, abs=0.05)
    assert expected_deletions(5, 6, 6) == expected_deletions(5, 6, 9)


@pytest.mark.parametrize(("shards", "slices", "budget"), [(1, 4, 4), (2, 3, 2), (3, 4, 1)])
def test_simulated_deletions_agree_with_the_closed_form(shards, slices, budget):
    trials = 5000  # side by side, as if each had shards of its own
    orders = choose_orders(slices, budget, "cyclic", None, 0).expand(trials * shards, -1, -1)
    intact, counts = torch.ones(trials, shards * slices, dtype=torch.bool), torch.zeros(trials)
    rng = generator(0, "deletions")
    while True:
        alive = depths(orders, intact.view(-1, slices)).view(trials, -1).any(1)
        if not bool(alive.any()):
            break
        counts += alive
        hit = torch.randint(shards * slices, (trials, 1), generator=rng)
        intact.scatter_(1, hit, torch.zeros_like(hit, dtype=torch.bool))
    error = float(counts.std()) / trials**0.5
    assert abs(float(counts.mean()) - expected_deletions(shards, slices, budget)) < 3 * error


def test_survival_by_hand():
    risks = torch.tensor([0.5, 0.3, 0.2])
    expected = 1 * 0.8**2 + 2 * 0.5**2 + 3 * 0.0
    assert float(survival(torch.tensor([2, 1, 0]), risks, 2)) == pytest.approx(expected)


def test_cyclic_orders_begin_differently():
    assert choose_orders(3, 2, "cyclic", None, 0).tolist() == [[0, 1, 2], [1, 2, 0]]


@pytest.mark.parametrize("slices", [2, 4, 5])
def test_matched_orders_have_a_slice_in_each_place_once(slices):
    risks = torch.rand(slices, generator=generator(1)).softmax(0)
    orders = matched(slices, slices, risks, 0)
    numbers = torch.arange(slices)
    assert bool((orders.sort(1).values == numbers).all())
    assert bool((orders.sort(0).values == numbers[:, None]).all())


def test_matching_is_the_best_of_all_assignments():
    risks = torch.tensor([0.02, 0.005, 0.95, 0.025])
    orders = matched(4, 4, risks, 0)

    def gain(added):
        pairs = torch.tensor([[start, slice_] for start, slice_ in enumerate(added)])
        return float(survival(pairs, risks).sum())

    choices = [p for p in itertools.permutations(range(4)) if all(i != k for i, k in enumerate(p))]
    second = {int(order[0]): int(order[1]) for order in orders}
    assert gain([second[k] for k in range(4)]) == pytest.approx(max(map(gain, choices)))


def test_the_least_likely_slices_come_first():
    risks = torch.tensor([0.7, 0.2, 0.1])
    assert matched(3, 1, risks, 0).tolist()[0][0] == 2
    orders = sampled(3, 4000, risks, 0)
    assert bool((orders.sort(1).values == torch.arange(3)).all())
    share = torch.bincount(orders[:, 0], minlength=3) / 4000
    expected = torch.tensor([0.15, 0.4, 0.45])
    assert bool(((share - expected).abs() < 4 * (expected * (1 - expected) / 4000).sqrt()).all())


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 0},
        {"budget": 5},
        {"selection": "random"},
        {"risks": [1.0]},
        {"risks": [1.0, -1.0, 1.0, 1.0]},
        {"risks": [0.0, 0.0, 0.0, 0.0]},
        {"rank": 0},
        {"alpha": 0.0},
        {"combine": "median"},
        {"shards": 0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_plans_out_of_range_are_refused(options):
    with pytest.raises(ConfigError):
        S3T(train(points(), 0), **options)


# S3T ----------------------------------------------------------------------------------------------


def scores(learner):
    return learner.scores_of(points(3).images)


def test_s3t_learns(s3t):
    assert float((scores(s3t).argmax(1) == points(3).labels).double().mean()) > 0.9


def test_one_sample_switches_off_what_saw_its_slice_without_a_look_at_data(s3t):
    _, slices = s3t.backbone.partition.places(torch.arange(96))
    gone = torch.arange(96)[slices == 1][:1]
    model, report = run(S3T, s3t, gone.tolist(), STAGES)
    # The orders are 012, 120, 201.
    assert report.lineage["stages left"] == [[1, 0, 2]]
    assert not report.lineage["trained again"] and not report.steps and not report.touched
    assert sorted(set(slices[model.backbone.ids].tolist())) == [0, 2]
    assert not set(model.backbone.ids.tolist()) & set(gone.tolist())
    fresh = S3T.original(history(slices != 1), STAGES)
    assert state.sha256(model) == state.sha256(fresh)


def test_the_result_depends_on_the_live_prefix_alone(s3t):
    """Whatever the images of the slices were that went, the result is the same."""
    _, slices = s3t.backbone.partition.places(torch.arange(96))
    noise = points()
    noise.images[slices == 2] = 100 * torch.randn(int((slices == 2).sum()), 2)
    other = S3T.original(history(images=noise), STAGES)
    assert not torch.equal(scores(other), scores(s3t))
    gone = torch.arange(96)[slices == 2][-1:].tolist()
    before = run(S3T, s3t, gone, STAGES)[0]
    after = run(S3T, other, gone, STAGES)[0]
    assert state.sha256(before) == state.sha256(after)
    assert float((scores(before).argmax(1) == points(3).labels).double().mean()) > 0.8


def test_a_stage_trains_its_own_blocks_from_the_output_down(s3t):
    stages = s3t.backbone
    assert stages.groups == [["layers.5"], ["layers.3"], ["layers.1"]]
    plain = {**STAGES, "budget": 1}
    _, slices = stages.partition.places(torch.arange(96))
    whole = S3T.original(history(), plain).backbone
    short = S3T.original(history(slices != 1), plain).backbone
    assert short.depths.tolist() == [[1]] and whole.depths.tolist() == [[3]]
    first, *later = [stages.groups[k][0] for k in range(3)]
    assert torch.equal(short.adapter(0, 0, first).b, whole.adapter(0, 0, first).b)
    assert torch.equal(short.weights[0], whole.weights[0])
    for layer in later:
        assert bool(whole.adapter(0, 0, layer).b.any())
        assert not any(bool(p.any()) for p in short.adapter(0, 0, layer).parameters())
    assert not bool(short.weights[1:].any() or short.biases[1:].any())


def test_the_network_below_is_the_untrained_one(s3t):
    fresh = blank(5).backbone
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, s3t.backbone.network.state_dict()[name])


def test_when_nothing_is_left_everything_is_trained_again(s3t):
    gone = [*range(0, 96, 5)]
    model, report = run(S3T, s3t, gone, STAGES)
    assert report.lineage["trained again"] and report.steps > 0
    assert report.touched["retain images"] == 96 - len(gone)
    fresh = S3T.original(history(without(gone)), STAGES)
    assert state.sha256(model) == state.sha256(fresh)


def test_requests_one_after_another_leave_fewer_stages(s3t):
    _, slices = s3t.backbone.partition.places(torch.arange(96))
    model, there = s3t, torch.ones(96, dtype=torch.bool)
    for number, left in ((2, [[2, 1, 0]]), (1, [[1, 0, 0]])):
        gone = torch.arange(96)[slices == number][:1].tolist()
        model, report = run(S3T, model, gone, STAGES, there=there)
        there = there & without(gone)
        assert report.lineage["stages left"] == left
    assert set(slices[model.backbone.ids].tolist()) == {0}


def test_shards_answer_together_and_drop_out_alone():
    settings = {**STAGES, "shards": 2, "budget": 1}
    model = S3T.original(history(), settings)
    shards, slices = model.backbone.partition.places(torch.arange(96))
    hit = torch.arange(96)[(shards == 0) & (slices == 0)][:1].tolist()
    after, report = run(S3T, model, hit, settings)
    assert report.lineage["stages left"] == [[0], [3]]
    alone = model.backbone.logits(points().images)[1].log_softmax(1)
    torch.testing.assert_close(after.scores_of(points().images), alone.detach())


def test_convolutions_are_adapted_and_batch_norm_learns_nothing():
    images = torch.randint(0, 256, (24, 1, 16, 16), generator=generator(0)).to(torch.uint8)
    data = ImageSet(images, torch.arange(24) % 2, ("a", "b"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learner = Naive(Conv4(1, 16, (2, 2, 2, 2)), Transform((0.5,), (0.2,)), dim=2)
    before = {k: v.clone() for k, v in learner.backbone.state_dict().items()}
    stages = Stages(Plan(epochs=1, batch_size=8), 0, learner.backbone, 2, 2)
    stages.train()
    assert stages.learn(learner, data, torch.arange(24)) == 4 * (1 + 2 + 3 + 3)
    assert stages.depths.tolist() == [[4, 4, 4, 4]]
    assert bool(stages.adapter(0, 0, "layers.0").b.any())
    for name, value in before.items():
        assert torch.equal(value, stages.network.state_dict()[name])


def test_s3t_needs_a_block_for_each_slice_and_images_to_begin_with(sisa):
    with pytest.raises(ConfigError, match="3 and there are 4"):
        S3T.original(history(), {**STAGES, "slices": 4})
    _, slices = Partition(1, 3, 5).places(torch.arange(96))
    with pytest.raises(NotEnoughData, match="first slice"):
        S3T.original(history(slices == 1), {**STAGES, "budget": 1})
    with pytest.raises(ConfigError, match="own original"):
        run(S3T, sisa, [0], STAGES)
