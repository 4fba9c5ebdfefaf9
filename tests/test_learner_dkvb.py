"""Key-value bottleneck: only what is fetched learns, keys by running means, merging cell by cell."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clfed.backbones import MLP, Identity
from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError, EmbeddingMismatch, UnknownClass
from clfed.learners import state
from clfed.learners.codebooks import lay_keys, merged, nearest_keys, project, update_keys, voted
from clfed.learners.dkvb import KeyValueBottleneck
from clfed.learners.fitting import learn
from clfed.learners.options import TrainerOptions
from clfed.scenarios.streams import Experience

FAST = TrainerOptions(precision="32", threads=1, loop="fast")
LIGHTNING = TrainerOptions(precision="32", threads=1, loop="lightning")
SMALL = {"codebooks": 6, "keys": 16, "key_dim": 2, "batch_size": 8, "epochs": 3}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bottleneck(dim: int = 4, **options) -> KeyValueBottleneck:
    return KeyValueBottleneck(Identity(), Transform((), ()), dim=dim, **(SMALL | options))


def around(centres: dict[str, float], number: int = 0, per_class: int = 12) -> Experience:
    """Narrow clusters on the diagonal, one a class."""
    labels = torch.arange(len(centres)).repeat_interleave(per_class)
    points = torch.tensor([*centres.values()])[labels, None] * torch.ones(4)
    points = points + 0.05 * normal(len(labels), 4, seed=number)
    return Experience(number, ImageSet(points, labels, tuple(centres)), phase=number)


def laid_over(*experiences: Experience, **options) -> KeyValueBottleneck:
    """A learner whose keys lie over all these images, without having learned a value."""
    learner = bottleneck(**options)
    learner._images = torch.cat([e.train.images for e in experiences])
    learner._freeze()
    return learner


def values(learner: KeyValueBottleneck) -> torch.Tensor:
    return learner.cells.column("values").detach()


def fetches(learner: KeyValueBottleneck) -> torch.Tensor:
    return learner.cells.column("fetches")


# Fetching


def test_projections_are_columns_of_length_one_from_the_seed():
    learner = bottleneck()
    assert learner.projections.shape == (6, 4, 2)
    torch.testing.assert_close(learner.projections.norm(dim=1), torch.ones(6, 2))
    assert torch.equal(bottleneck().projections, learner.projections)
    assert not torch.equal(bottleneck(seed=1).projections, learner.projections)


@given(st.integers(0, 999), st.booleans())
def test_codes_and_votes_agree_with_loops(seed, masked):
    h, projections = normal(5, 4, seed=seed), normal(3, 4, 2, seed=seed + 1)
    keys, table = normal(3, 7, 2, seed=seed + 2), normal(6, 3, 7, seed=seed + 3)
    allowed = normal(3, 7, seed=seed + 4) > 0 if masked else torch.ones(3, 7, dtype=torch.bool)
    codes = nearest_keys(project(h, projections), keys, allowed if masked else None)
    votes = voted(table, codes)
    for i in range(5):
        total = torch.zeros(6)
        for c in range(3):
            point = h[i] @ projections[c]
            usable = allowed[c].nonzero().flatten().tolist() or range(7)
            best = min(usable, key=lambda j, c=c, point=point: float((point - keys[c, j]).norm()))
            assert codes[i, c] == best
            total += table[:, c, best] / 3
        torch.testing.assert_close(votes[i], total)


def test_large_tables_are_searched_in_parts(monkeypatch):
    points, keys = normal(3, 50, 2), normal(3, 9, 2, seed=1)
    whole = nearest_keys(points, keys)
    monkeypatch.setattr("clfed.learners.codebooks._CHUNK", 60)
    assert torch.equal(nearest_keys(points, keys), whole)


def test_permuting_keys_with_their_values_changes_no_logit():
    learner = bottleneck()
    learn(learner, around({"a": 0.0, "b": 1.0}), FAST)
    asked = normal(20, 4)
    before = learner.scores_of(asked)
    order = torch.argsort(normal(6, 16, seed=3), dim=1)
    learner.keys = learner.keys.gather(1, order[:, :, None].expand(-1, -1, 2))
    for column in (values(learner), fetches(learner)):
        column.copy_(column.gather(2, order.expand(2, -1, -1)))
    assert torch.equal(learner.scores_of(asked), before)


# Keys


def test_without_memory_of_the_past_an_update_is_a_step_of_k_means():
    points, keys = normal(2, 40, 3), normal(2, 5, 3, seed=1)
    moved, counts, _ = update_keys(keys, torch.zeros(2, 5), torch.zeros(2, 5, 3), points, 0.0)
    for c in range(2):
        owner = torch.cdist(points[c], keys[c]).argmin(1)
        for j in range(5):
            own = points[c][owner == j]
            assert counts[c, j] == len(own)
            if len(own):
                torch.testing.assert_close(moved[c, j], own.mean(0), atol=1e-4, rtol=1e-4)


def test_running_means_keep_their_share_of_the_past():
    keys, points = torch.tensor([[[0.0], [10.0]]]), torch.tensor([[[1.0], [3.0]]])
    _, counts, sums = update_keys(
        keys, torch.tensor([[4.0, 2.0]]), torch.tensor([[[8.0], [20.0]]]), points, 0.75
    )
    assert counts.tolist() == [[3.5, 1.5]]  # .75 * 4 + .25 * 2, .75 * 2
    assert sums.tolist() == [[[7.0], [15.0]]]  # .75 * 8 + .25 * 4, .75 * 20
    moved = update_keys(
        keys, torch.tensor([[4.0, 2.0]]), torch.tensor([[[8.0], [20.0]]]), points, 0.75
    )[0]
    torch.testing.assert_close(moved, torch.tensor([[[2.0], [10.0]]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("number", [1, 2, 7, 100])
def test_keys_lie_among_the_points(number):
    points = normal(3, number, 2)
    keys = lay_keys(
        points, 12, decay=0.9, epochs=4, batch_size=16, rng=torch.Generator().manual_seed(0)
    )
    # Smoothing of the counts shrinks a key a little towards the origin.
    low, high = points.amin(1, keepdim=True) - 0.05, points.amax(1, keepdim=True) + 0.05
    assert keys.isfinite().all() and (keys >= low).all() and (keys <= high).all()


def test_keys_divide_the_points_better_than_drawn_ones():
    points = normal(4, 300, 2)
    options = {"decay": 0.9, "batch_size": 50}
    laid = [
        lay_keys(points, 20, epochs=e, rng=torch.Generator().manual_seed(0), **options)
        for e in (0, 20)
    ]
    errors = [float(torch.cdist(points, keys).amin(2).square().mean()) for keys in laid]
    assert errors[1] < 0.8 * errors[0]


def test_keys_never_move_again():
    learner = bottleneck()
    learn(learner, around({"a": 0.0, "b": 1.0}), FAST)
    keys = learner.keys.clone()
    learn(learner, around({"c": 5.0, "d": 6.0}, 1), FAST)
    assert torch.equal(learner.keys, keys)


# Learning


def test_cells_that_were_not_fetched_keep_their_bits():
    stream = [around({"a": 0.0, "b": 1.0}), around({"c": 0.5, "d": 3.0}, 1)]
    learner = laid_over(*stream, logits="seen")
    learn(learner, stream[0], FAST)
    learner.begin_experience(stream[1])
    before, counted = values(learner).clone(), fetches(learner).clone()
    options = learner.configure_optimizers()["optimizer"]
    for batch in learner.batches(learner.training_data(stream[1]), seed=0):
        options.zero_grad()
        learner.training_step(batch, 0).backward()
        learner.on_before_optimizer_step(options)
        options.step()
        learner.on_train_batch_end(None, batch, 0)
    codes = learner.codes(stream[1].train.images)
    touched = torch.zeros(6, 16, dtype=torch.bool)
    for c in range(6):
        touched[c, codes[:, c]] = True
    assert torch.equal(values(learner)[:, ~touched], before[:, ~touched])
    assert not torch.equal(values(learner)[:, touched], before[:, touched])
    assert torch.equal(fetches(learner)[:, ~touched], counted[:, ~touched])
    assert float(fetches(learner).sum() - counted.sum()) == 3 * 24 * 6  # epochs, images, codebooks


def test_a_first_step_is_the_gradient_by_hand():
    stream = [around({"a": 0.0, "b": 1.0}, per_class=4)]
    learner = bottleneck(epochs=1, smoothing=0.1, lr=0.3, clip=None)
    learn(learner, stream[0], FAST)
    # At zero values every class has probability 1/2; smoothing aims at .95 and .05.
    codes, expected = learner.codes(stream[0].train.images), torch.zeros(2, 6, 16)
    for i in range(8):
        for c in range(6):
            for k in range(2):
                target = 0.95 if k == stream[0].train.labels[i] else 0.05
                expected[k, c, codes[i, c]] -= 0.3 * (0.5 - target) / 8 / 6
    torch.testing.assert_close(values(learner), expected)


@pytest.mark.parametrize("logits", ["current", "seen"])
def test_classes_with_keys_of_their_own_do_not_disturb_each_other(logits):
    one, two = around({"a": 0.0, "b": 1.0}), around({"c": 5.0, "d": 6.0}, 1)
    learner = laid_over(one, two, logits=logits, keys=32)
    learn(learner, one, FAST)
    codes = [learner.codes(e.train.images) for e in (one, two)]
    assert not any(set(codes[0][:, c].tolist()) & set(codes[1][:, c].tolist()) for c in range(6))
    before = learner.scores_of(one.train.images)
    learn(learner, two, FAST)
    assert torch.equal(learner.scores_of(one.train.images)[:, :2], before)


def test_order_does_not_matter_where_keys_are_disjoint():
    one, two = around({"a": 0.0, "b": 1.0}), around({"c": 5.0, "d": 6.0}, 1)
    there, back = laid_over(one, two, keys=32), laid_over(one, two, keys=32)
    for learner, stream in ((there, (one, two)), (back, (two, one))):
        for experience in stream:
            learn(learner, experience, FAST)
    assert back.classes == tuple("cdab")
    assert torch.equal(values(back)[torch.tensor([2, 3, 0, 1])], values(there))
    assert torch.equal(fetches(back)[torch.tensor([2, 3, 0, 1])], fetches(there))


def test_keys_that_never_learned_are_passed_over():
    one, two = around({"a": 0.0, "b": 1.0}), around({"c": 5.0, "d": 6.0}, 1)
    learner = laid_over(one, two, keys=32)
    learn(learner, one, FAST)
    # Images of the unknown classes fall back to the used keys next to them: class b.
    assert (learner.scores_of(two.train.images).argmax(1) == 1).all()
    assert (learner.scores_of(two.train.images).abs().sum(1) > 0).all()


def test_nothing_is_known_at_the_start():
    assert bottleneck().scores_of(normal(3, 4)).shape == (3, 0)


@pytest.mark.parametrize("loop", [FAST, LIGHTNING], ids=["fast", "lightning"])
def test_training_the_network_first_freezes_it_before_the_keys_are_laid(loop):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
    before = network[0].weight.detach().clone()
    learner = KeyValueBottleneck(network, Transform((), ()), dim=8, train="first", **SMALL)
    one, two = around({"a": 0.0, "b": 1.0}), around({"c": 5.0, "d": 6.0}, 1)
    assert learn(learner, one, loop) == 18
    assert not torch.equal(network[0].weight, before)
    assert fetches(learner).sum() == 3 * 24 * 6
    frozen = {name: t.clone() for name, t in network.state_dict().items()}
    assert (learner.scores_of(one.train.images).argmax(1) == one.train.labels).all()
    assert learn(learner, two, loop) == 9
    assert all(torch.equal(t, frozen[name]) for name, t in network.state_dict().items())


@pytest.mark.parametrize("counts", [{"a": 0.0}, {"a": 0.0, "b": 1.0}], ids=len)
@pytest.mark.parametrize("size", [1, 8])
def test_the_smallest_experiences_are_learned_from(counts, size):
    learner = bottleneck(batch_size=size)
    learn(learner, around(counts, per_class=1), FAST)
    learn(learner, around({"c": 3.0}, 1, per_class=1), FAST)
    learn(learner, around(counts, 2, per_class=1), FAST)
    assert learner.scores_of(normal(5, 4)).isfinite().all()
    assert learner.classes == (*counts, "c")


@pytest.mark.parametrize("train", ["none", "first"])
def test_a_restored_learner_goes_on_to_the_same_bytes(train):
    stream = [around({"a": 0.0, "b": 1.0}), around({"c": 5.0, "a": 0.3}, 1)]

    def fresh():
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return KeyValueBottleneck(
                MLP(4, 0, (5,)), Transform((), ()), dim=5, train=train, **SMALL
            )

    whole, first, rest = fresh(), fresh(), fresh()
    for experience in stream:
        learn(whole, experience, FAST)
    learn(first, stream[0], FAST)
    state.restore(rest, state.state_of(first))
    learn(rest, stream[1], LIGHTNING)
    assert state.sha256(rest) == state.sha256(whole)


def test_digits():
    from clfed.data.digits import load

    data = load(as_features=True)
    learner = KeyValueBottleneck(Identity(), Transform(data.mean, data.std), dim=64, keys=128)
    for number in range(5):
        names = [str(2 * number), str(2 * number + 1)]
        learn(learner, Experience(number, data.train.of_classes(names), phase=number), FAST)
    right = learner.scores_of(data.test.images).argmax(1) == data.test.labels
    assert right.double().mean() > 0.75
    assert learner.images_kept == 0


# Merging and forgetting


def test_merging_weighs_by_the_fetches_of_a_cell():
    # One codebook of three keys; the first owner knows a and b, the second b and c.
    one = {
        "values": torch.tensor([[[1.0, 5.0, 0.0]], [[2.0, 6.0, 0.0]]]),
        "fetches": torch.tensor([[[3.0, 1.0, 0.0]], [[0.0, 2.0, 0.0]]]),
    }
    two = {
        "values": torch.tensor([[[8.0, 0.0, 4.0]], [[9.0, 0.0, 7.0]]]),
        "fetches": torch.tensor([[[1.0, 0.0, 1.0]], [[0.0, 0.0, 1.0]]]),
    }
    table, counts = merged([(("a", "b"), one), (("b", "c"), two)], ("a", "b", "c"))
    # Cell 0 was fetched 3 times by the first owner and once by the second.
    assert table[:, 0].tolist() == [[1.0, 5.0, 0.0], [3.5, 6.0, 4.0], [9.0, 0.0, 7.0]]
    assert counts[:, 0].tolist() == [[3.0, 1.0, 0.0], [1.0, 2.0, 1.0], [0.0, 0.0, 1.0]]


@given(st.integers(0, 99))
def test_merging_does_not_depend_on_the_order_of_owners(seed):
    owners = [
        (
            tuple("abc"[o : o + 2]),
            {
                "values": normal(2, 2, 4, seed=seed + o),
                "fetches": normal(2, 2, 4, seed=seed - o - 1).abs().mul(3).floor(),
            },
        )
        for o in range(2)
    ]
    there, back = merged(owners, "abc"), merged(owners[::-1], "abc")
    torch.testing.assert_close(there[0], back[0])
    assert torch.equal(there[1], back[1])
    alone = merged([(tuple("abc"), dict(zip(("values", "fetches"), there, strict=True)))], "abc")
    assert torch.equal(alone[1], there[1])


def test_owners_of_disjoint_cells_merge_to_what_one_would_have_learned():
    one, two = around({"a": 0.0, "b": 1.0}), around({"c": 5.0, "d": 6.0}, 1)
    whole, left, right = (laid_over(one, two, keys=32) for _ in range(3))
    learn(whole, one, FAST)
    learn(whole, two, FAST)
    learn(left, one, FAST)
    learn(right, two, FAST)
    server = laid_over(one, two, keys=32)
    server.merge([right, left])
    assert server.classes == tuple("cdab")
    columns = server.rows(whole.classes)
    assert torch.equal(fetches(server)[columns], fetches(whole))
    torch.testing.assert_close(values(server)[columns], values(whole))
    asked = torch.cat([one.train.images, two.train.images])
    torch.testing.assert_close(server.scores_of(asked)[:, columns], whole.scores_of(asked))


def test_other_keys_are_not_merged():
    one, two = around({"a": 0.0, "b": 1.0}), around({"c": 5.0, "d": 6.0}, 1)
    left, right = bottleneck(), bottleneck()
    learn(left, one, FAST)
    learn(right, two, FAST)
    before = state.sha256(left)
    with pytest.raises(EmbeddingMismatch, match="keys"):
        left.merge([left, right])
    assert state.sha256(left) == before


def test_cells_of_a_class_are_disabled():
    one = around({"a": 0.0, "b": 1.0, "c": 6.0})
    learner = laid_over(one, keys=32)
    learn(learner, one, FAST)
    assert (learner.scores_of(one.train.images).argmax(1) == one.train.labels).all()
    own = fetches(learner)[2] > 0
    assert learner.disable(["c"]) == int(own.sum())
    assert not values(learner)[:, own].any() and not fetches(learner)[2].any()
    answers = learner.scores_of(one.train.images).argmax(1)
    assert (answers[:24] == one.train.labels[:24]).all() and (answers[24:] != 2).all()
    assert learner.disable(["c"]) == 0
    with pytest.raises(UnknownClass):
        learner.disable(["zebra"])


@pytest.mark.parametrize(
    "options",
    [
        {"codebooks": 0},
        {"keys": 0},
        {"key_dim": 0},
        {"key_epochs": 0},
        {"decay": 1.0},
        {"smoothing": 1.0},
        {"encoder_lr": 0.0},
        {"train": "all"},
        {"logits": "all"},
        {"optimizer": "adam"},
        {"classifier": {"name": "ncm"}},
        {"weight_decay": 0.1},
    ],
    ids=str,
)
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError):
        bottleneck(**options)
