"""DUCK, SCAR and LAF: what they compute, checked by hand, numpy and slow loops."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clfed.backbones import MLP
from clfed.backbones.encoder import Transform
from clfed.config import build, compose
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError, InvalidEmbedding
from clfed.learners.fitting import learn
from clfed.learners.naive import Naive
from clfed.learners.options import TrainerOptions
from clfed.scenarios.streams import Experience
from clfed.unlearning import Request, forget, make_context
from clfed.unlearning.alignment import nearest_other
from clfed.unlearning.duck import Duck, centroids
from clfed.unlearning.laf import Laf, LafRepair, alignment_loss, away, bounded
from clfed.unlearning.pools import ById
from clfed.unlearning.scar import Scar, distributions, evenly, lowered
from clfed.unlearning.scar_self import ScarSelf
from clfed.unlearning.statistics import Statistics
from clfed.unlearning.vae import VAE

OPTIONS = TrainerOptions(precision="32", threads=1, loop="fast")
CLASSES = ("ant", "bee", "cat", "dog")
IDS = torch.arange(80) + 1000


def points(seed=0):
    labels = torch.arange(4).repeat_interleave(20)
    centres = torch.tensor([[2.0, 2.0], [-2.0, 2.0], [2.0, -2.0], [-2.0, -2.0]])
    rng = torch.Generator().manual_seed(seed)
    return ImageSet(centres[labels] + 0.5 * torch.randn(80, 2, generator=rng), labels, CLASSES)


@pytest.fixture(scope="module")
def original():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = MLP(2, 0, (16, 8))
    learner = Naive(
        backbone, Transform((), ()), dim=8, epochs=20, batch_size=16, lr=0.01, moments="none"
    )
    learn(learner, Experience(0, points(), phase=0, upcoming=0), OPTIONS)
    return learner.eval()


def context(learner, kind="class", *, gone=None, ood=None, statistics=True, validation=True):
    request = {
        "class": Request("r", "class", classes=("bee",)),
        "sample": Request("r", "sample", samples=(1,)),
    }[kind]
    if gone is None:
        gone = IDS[points().labels == 1] if kind == "class" else IDS[::5]
    if ood is None:
        ood = 3 * torch.randn(90, 2, generator=torch.Generator().manual_seed(5))
    known = Statistics.of(learner, points(), IDS, ["me"] * 80) if statistics else None
    return make_context(
        request,
        learner,
        points(),
        IDS,
        gone=gone,
        ood=ood,
        validation=points(9) if validation else None,
        statistics=known,
        seed=1,
    )


def bound(unlearner, around):
    unlearner.bind(around)
    unlearner.prepare(around)
    return unlearner


# Goals ------------------------------------------------------------------------------------------


def test_goals_are_found_by_class_and_not_by_place_in_a_list():
    # Classes 0, 2, 3 stay. A confusion of places and labels would forbid place 1 to label 1.
    distances = torch.tensor([[0.9, 0.1, 0.5], [0.1, 0.9, 0.5]])
    rows = torch.tensor([0, 2, 3])
    assert nearest_other(distances, rows, torch.tensor([1, 1])).tolist() == [1, 0]
    assert nearest_other(distances, rows, torch.tensor([2, 0])).tolist() == [2, 2]


def test_goals_agree_with_a_slow_loop():
    rng = torch.Generator().manual_seed(0)
    distances, rows = torch.rand(50, 6, generator=rng), torch.tensor([7, 1, 4, 0, 2, 9])
    labels = torch.randint(0, 10, (50,), generator=rng)
    slow = []
    for line, label in zip(distances.tolist(), labels.tolist(), strict=True):
        allowed = [(d, place) for place, d in enumerate(line) if rows[place] != label]
        slow.append(min(allowed)[1])
    assert nearest_other(distances, rows, labels).tolist() == slow


def test_a_goal_needs_another_class():
    with pytest.raises(ConfigError, match="at least one other class"):
        nearest_other(torch.zeros(1, 1), torch.tensor([3]), torch.tensor([3]))


def test_values_are_found_by_id_in_any_order():
    ids = torch.tensor([900, 3, 41, 7])
    table = ById(ids, ids * 10)
    assert table[torch.tensor([7, 900, 7])].tolist() == [70, 9000, 70]


@pytest.mark.parametrize("method", [Duck, Scar])
def test_goals_do_not_depend_on_the_batches(method, original):
    around = context(original, "sample")
    small = bound(method(original, seed=1, batch_size=3), around)
    large = bound(method(original, seed=8, batch_size=500), around)
    flipped = around.forget.ids.flip(0)
    assert torch.equal(small.goals[flipped], large.goals[flipped])
    goal_rows = small.rows[small.goals[around.forget.ids]]
    assert bool((goal_rows != around.forget.labels).all())


# DUCK -------------------------------------------------------------------------------------------


def test_centroids_are_means_and_absent_classes_have_none():
    rng = np.random.default_rng(0)
    embeddings, labels = rng.normal(size=(40, 5)), rng.choice([0, 2, 5], size=40)
    rows, means = centroids(torch.tensor(embeddings), torch.tensor(labels))
    assert rows.tolist() == [0, 2, 5]
    for row, mean in zip(rows.tolist(), means.numpy(), strict=True):
        np.testing.assert_allclose(mean, embeddings[labels == row].mean(0))


def test_centroids_are_those_of_the_classes_that_stay(original):
    around = context(original)
    duck = bound(Duck(original), around)
    assert duck.rows.tolist() == [0, 2, 3]
    mean = original.embed_all(points().images[points().labels == 2]).mean(0)
    torch.testing.assert_close(duck.centroids[1], mean)


@pytest.mark.parametrize("number", range(5))
def test_one_step_comes_nearer_to_the_goal(number):
    # Identity embedding, three unit centroids, plain gradient of the cosine distance.
    rng = torch.Generator().manual_seed(number)
    points_ = torch.randn(9, 3, generator=rng).requires_grad_()
    labels = torch.arange(3).repeat(3)
    similarity = F.normalize(points_) @ torch.eye(3)
    goals = nearest_other((1 - similarity).detach(), torch.arange(3), labels)
    assert bool((goals != labels).all())
    chosen = (1 - similarity).gather(1, goals[:, None])
    chosen.sum().backward()
    moved = points_.detach() - 0.01 * points_.grad
    after = (1 - F.normalize(moved) @ torch.eye(3)).gather(1, goals[:, None])
    assert bool((after < chosen.detach()).all())


def test_duck_loss_is_the_formula(original):
    around = context(original)
    duck = bound(Duck(original, forget_weight=0.7, retain_weight=1.3, temperature=2.5), around)
    batch = {
        "forget": around.forget.batch(torch.arange(6)),
        "retain": around.retain.batch(torch.arange(11)),
    }
    loss = float(duck.loss(batch).detach())
    e = original.embed_all(batch["forget"].images).double().numpy()
    kept = original.embed_all(around.retain.images).double().numpy()
    labels = around.retain.labels.numpy()
    mu = np.stack([kept[labels == c].mean(0) for c in (0, 2, 3)])
    cosine = (e @ mu.T) / np.linalg.norm(e, axis=1)[:, None] / np.linalg.norm(mu, axis=1)
    pull = (1 - cosine).min(1).mean()
    logits = original.scores_of(batch["retain"].images).double().numpy() / 2.5
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ce = -log_p[np.arange(11), batch["retain"].labels.numpy()].mean()
    assert loss == pytest.approx(0.7 * pull + 1.3 * ce, rel=1e-5)


def test_without_its_forget_loss_duck_is_fine_tuning(original):
    around = context(original)
    duck = bound(Duck(original, forget_weight=0.0, retain_weight=1.0, temperature=2.0), around)
    batch = {
        "forget": around.forget.batch(torch.arange(6)),
        "retain": around.retain.batch(torch.arange(11)),
    }
    weights = [*duck.learner.backbone.parameters()]
    found = torch.autograd.grad(duck.loss(batch), weights)
    plain = F.cross_entropy(duck.logits(batch["retain"].images) / 2, batch["retain"].labels)
    for one, other in zip(found, torch.autograd.grad(plain, weights), strict=True):
        torch.testing.assert_close(one, other)


def test_the_rule_stops_at_the_first_pass_below_the_threshold(original, monkeypatch):
    around = context(original)
    duck = Duck(original, epochs=9, batch_size=20, lr=1e-6, class_stop=0.5, seed=1)
    told = iter([0.9, 0.5, 0.49, 0.1])
    monkeypatch.setattr(duck, "recognised", lambda: next(told))
    _, report = forget(duck, around, OPTIONS)
    assert report.stopped
    assert report.steps == 3  # one forget batch, ratio 0: a step a pass
    assert next(told) == 0.1


# Five forget batches of four images make a pass.
@pytest.mark.parametrize(("earliest", "steps"), [(0, 1), (1, 6), (2, 11)])
def test_the_rule_may_be_asked_after_every_step_but_not_too_early(
    earliest, steps, original, monkeypatch
):
    duck = Duck(original, epochs=9, batch_size=4, lr=1e-6, check="step", earliest=earliest)
    monkeypatch.setattr(duck, "recognised", lambda: 0.0)
    _, report = forget(duck, context(original), OPTIONS)
    assert report.stopped
    assert report.steps == steps


def test_samples_stop_at_the_accuracy_on_held_out_images(original):
    around = context(original, "sample")
    held = points(9)
    accuracy = float((original.scores_of(held.images).argmax(1) == held.labels).double().mean())
    assert bound(Duck(original, margin=0.02), around).threshold == pytest.approx(accuracy - 0.02)
    assert bound(Duck(original), context(original)).threshold == 0.01
    with pytest.raises(ConfigError, match="held-out images, got none"):
        bound(Duck(original), context(original, "sample", validation=False))


def test_images_that_go_do_not_shift_batch_norm():
    backbone = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
    learner = Naive(backbone, Transform((), ()), dim=8, moments="none")
    learner.grow(CLASSES)
    around = context(learner, statistics=False)
    states = []
    for shift in (0.0, 50.0):
        duck = bound(Duck(copy.deepcopy(learner)), around)
        batch = {
            "forget": around.forget.batch(torch.arange(6)),
            "retain": around.retain.batch(torch.arange(11)),
        }
        batch["forget"] = batch["forget"]._replace(images=batch["forget"].images + shift)
        duck.training_step(batch, 0).backward()  # eval after train: gradients must still exist
        states.append(duck.learner.backbone[1].running_mean.clone())
    assert torch.equal(*states)
    assert not torch.equal(states[0], torch.zeros(8))


@pytest.mark.parametrize(
    "options",
    [
        {"check": "never"},
        {"forget_weight": -1.0},
        {"class_stop": 1.5},
        {"margin": -0.1},
        {"earliest": -1},
        {"retain_weight": -1.0},
        {"temperature": 0.0},
        {"label_smoothing": 2.0},
    ],
)
def test_duck_refuses_bad_options(options, original):
    with pytest.raises(ConfigError, match="got"):
        Duck(original, **options)


# SCAR -------------------------------------------------------------------------------------------


def test_distributions_agree_with_numpy():
    rng = np.random.default_rng(1)
    embeddings, labels = rng.normal(size=(60, 4)), rng.choice([0, 3, 4], size=60)
    labels[0] = 9  # a single example
    rows, means, covariances = distributions(torch.tensor(embeddings), torch.tensor(labels))
    assert rows.tolist() == [0, 3, 4, 9]
    for place, row in enumerate([0, 3, 4]):
        own = embeddings[labels == row]
        np.testing.assert_allclose(means[place], own.mean(0), atol=1e-12)
        np.testing.assert_allclose(covariances[place], np.cov(own.T), atol=1e-12)
    np.testing.assert_allclose(means[3], embeddings[0])
    assert not covariances[3].any()


def shrunk(covariance, gamma1, gamma2, rounds):
    """FeCAM's shrinkage and correlation, in numpy."""
    dim = len(covariance)
    for _ in range(rounds):
        spread = np.diag(covariance).mean()
        across = covariance[~np.eye(dim, dtype=bool)].mean()
        covariance = covariance + gamma1 * spread * np.eye(dim)
        covariance = covariance + gamma2 * across * (1 - np.eye(dim))
    root = np.sqrt(np.diag(covariance))
    return covariance / np.outer(root, root)


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("delta", [0.5, 1.0])
def test_scar_distance_agrees_with_numpy(root, rounds, delta, original):
    around = context(original)
    scar = bound(Scar(original, root=root, rounds=rounds, delta=delta), around)
    assert scar.rows.tolist() == [0, 2, 3]
    known = around.statistics.embeddings.double().numpy() ** delta
    query = original.embed_all(points(3).images[:7])
    t = query.clamp(min=1e-8).double().numpy() ** delta
    expected = np.empty((7, 3))
    for place, row in enumerate((0, 2, 3)):
        own = known[around.statistics.labels.numpy() == row]
        inverse = np.linalg.pinv(shrunk(np.cov(own.T), 3.0, 3.0, rounds), hermitian=True)
        mean = own.mean(0) / np.linalg.norm(own.mean(0))
        for line in range(7):
            q = t[line] / np.linalg.norm(t[line]) - mean
            expected[line, place] = q @ inverse @ q
    found = scar.distances(query).double().numpy()
    np.testing.assert_allclose(found, np.sqrt(expected) if root else expected, rtol=1e-3)


def test_precisions_are_symmetric_and_not_negative(original):
    precisions = bound(Scar(original), context(original)).precisions
    torch.testing.assert_close(precisions, precisions.mT)
    assert float(torch.linalg.eigvalsh(precisions.double()).min()) > -1e-5


def test_a_unit_correlation_leaves_the_euclidean_order(original):
    scar = bound(Scar(original), context(original))
    scar.precisions = torch.eye(8).repeat(3, 1, 1)
    query = original.embed_all(points(3).images)
    scaled = F.normalize(query.clamp(min=1e-8) ** 0.5)
    expected = torch.cdist(scaled, scar.means)
    torch.testing.assert_close(scar.distances(query), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(scar.distances(query).argsort(1), expected.argsort(1))


def test_the_gradient_points_to_the_other_mean(original):
    scar = Scar(original, delta=1.0)
    scar.rows, scar.means = torch.tensor([0, 1]), torch.eye(2)
    scar.precisions = torch.eye(2).repeat(2, 1, 1)
    point = torch.tensor([[0.9, 0.3]], requires_grad=True)
    distances = scar.distances(point)
    goal = nearest_other(distances.detach(), scar.rows, torch.tensor([0]))
    assert goal.tolist() == [1]
    distances[0, 1].backward()
    moved = point.detach() - 0.05 * point.grad
    assert float(F.normalize(moved)[0, 1]) > float(F.normalize(point.detach())[0, 1])
    assert point.grad.isfinite().all()


def test_the_slope_at_zero_is_finite(original):
    scar = bound(Scar(original), context(original))
    point = torch.zeros(1, 8, requires_grad=True)
    (scar.distances(point).sum() + scar.distances(point[:, [0] * 8] + 1.0).sum()).backward()
    assert point.grad.isfinite().all()


def test_scar_leaves_forgotten_samples_out_of_its_statistics(original):
    around = context(original, "sample")
    scar = bound(Scar(original), around)
    stays = ~torch.isin(IDS, around.forget.ids)
    own = original.embed_all(points().images[stays & (points().labels == 2)]) ** 0.5
    torch.testing.assert_close(scar.means[2], F.normalize(own.mean(0), dim=0), rtol=1e-3, atol=1e-4)


def test_the_teacher_gives_a_class_that_goes_the_least(original):
    around = context(original)
    scar = bound(Scar(original), around)
    plain = original.scores_of(around.ood.images)
    assert torch.equal(scar.answers[:, 1], plain.amin(1))
    others = [0, 2, 3]
    assert torch.equal(scar.answers[:, others], plain[:, others])
    drawn = scar.batches.pools["ood"]
    assert 0 < len(drawn) < 90
    assert not (plain[drawn.ids].argmax(1) == 1).any()
    assert torch.equal(lowered(plain, torch.tensor([], dtype=torch.int64)), plain)


def test_other_images_are_drawn_evenly_for_samples():
    classes = torch.tensor([0] * 60 + [1] * 12 + [2] * 2)
    weights = evenly(classes)
    assert weights[:60].sum() == pytest.approx(1.0)
    assert weights[60:72].sum() == pytest.approx(1.0)
    assert weights[72:].tolist() == [0.2, 0.2]


def test_the_two_divergences_are_those_of_the_paper_and_of_its_code(original):
    around = context(original)
    batch = {"ood": around.ood.batch(torch.arange(10))}
    found = {}
    for kind in ("symmetric", "forward"):
        scar = bound(Scar(original, divergence=kind, keep_weight=2.0, temperature=3.0), around)
        with torch.no_grad():
            scar.learner.head.column("weight").mul_(0.5)
        p = (scar.answers[:10]).double().softmax(1).numpy()
        q = scar.learner.scores_of(batch["ood"].images).double().softmax(1).numpy()
        forward = (p * np.log(p / q)).sum(1).mean()
        backward = (q * np.log(q / p)).sum(1).mean()
        expected = forward if kind == "forward" else (forward + backward) / 2
        found[kind] = scar.keeping(batch).item()
        assert found[kind] == pytest.approx(2 * expected, rel=1e-4)
    assert found["symmetric"] != pytest.approx(found["forward"], rel=1e-3)


def test_only_the_teacher_is_softened(original):
    scar = bound(Scar(original, temperature=4.0), context(original, "sample"))
    torch.testing.assert_close(scar.answers, original.scores_of(scar.context.ood.images) / 4)


def test_classes_that_are_forgotten_enough_are_no_longer_pushed(original):
    around = context(original, "sample", gone=IDS[::2])
    scar = bound(Scar(original, gate=0.8), around)
    scores = F.one_hot(around.forget.labels, 4).double()
    three = (around.forget.labels == 2).nonzero()[:3]
    scores[three] = 0.0  # taken for class 0: 7 of 10 right, below the gate
    one = (around.forget.labels == 3).nonzero()[0]
    scores[one] = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)  # 9 of 10 right
    scar.learner.scores_of = lambda images, closed: scores
    assert scar.recognised() == pytest.approx((10 + 10 + 7 + 9) / 40)
    assert scar.pace.tolist() == pytest.approx([1.0, 1.0, 0.0, 0.9])
    assert scar.shares(around.forget.batch(torch.arange(40))).tolist() == pytest.approx(
        scar.pace[around.forget.labels].tolist()
    )


def test_scar_sees_no_image_that_stays(original):
    for kind in ("class", "sample"):
        scar = Scar(original, lr=0.01, epochs=2, batch_size=32, ratio=1)
        _, report = forget(scar, context(original, kind), OPTIONS)
        assert "class statistics" in report.touched
        assert not {"retain images", "retain labels"} & set(report.touched)


def test_scar_needs_statistics_and_other_images(original):
    with pytest.raises(ConfigError, match="needs class statistics"):
        Scar(original).bind(context(original, statistics=False))
    around = context(original)
    bees = points().images[points().labels == 1]
    with pytest.raises(ConfigError, match="got only such"):
        Scar(original).bind(context(original, ood=bees))
    rest = points().images[points().labels == 2]
    with pytest.raises(ConfigError, match="takes for bee, got none"):
        ScarSelf(original).bind(context(original, ood=rest))
    with pytest.raises(ConfigError, match="got a request to forget a sample"):
        ScarSelf(original).bind(context(original, "sample"))
    assert len(around.ood)


def test_scar_refuses_negative_embeddings_unless_the_power_is_one(original):
    around = context(original)
    around._statistics = copy.copy(around._statistics)
    object.__setattr__(around._statistics, "kept", around._statistics.kept - 5)
    with pytest.raises(InvalidEmbedding, match="negative"):
        bound(Scar(original), around)
    assert bound(Scar(original, delta=1.0), around).means.isfinite().all()


def test_self_forget_moves_what_looks_like_the_class(original):
    around = context(original)
    scar = bound(ScarSelf(original), around)
    plain = original.scores_of(around.ood.images).argmax(1)
    going, staying = scar.batches.pools["forget"], scar.batches.pools["ood"]
    assert bool((plain[going.ids] == 1).all())
    assert bool((plain[staying.ids] != 1).all())
    assert len(going) + len(staying) == 90
    assert scar.recognised() == 1.0
    scar = ScarSelf(original, lr=0.01, epochs=8, batch_size=32, ratio=3, seed=1)
    model, report = forget(scar, context(original), OPTIONS)
    assert set(report.touched) == {"other images", "class statistics"}
    bees = points().images[points().labels == 1]
    assert float((model.scores_of(bees, closed=False).argmax(1) == 1).double().mean()) < 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "js"},
        {"delta": 0.0},
        {"gammas": (1.0, 3.0)},
        {"gammas": (3.0,)},
        {"rounds": -1},
        {"keep_weight": -1.0},
        {"temperature": 0.0},
        {"gate": 1.1},
    ],
)
def test_scar_refuses_bad_options(options, original):
    with pytest.raises(ConfigError, match="got"):
        Scar(original, **options)


# LAF --------------------------------------------------------------------------------------------


def test_alignment_agrees_with_the_definition():
    rng = np.random.default_rng(2)
    retain, going, tau = rng.uniform(0, 2, 5), rng.uniform(0, 2, 7), 3.0
    slow = sum(np.log(np.exp(d) / np.exp(going / tau).sum()) for d in retain)
    assert float(alignment_loss(torch.tensor(retain), torch.tensor(going), tau)) == pytest.approx(
        slow
    )


def test_alignment_falls_when_what_goes_turns_away():
    same, turned = torch.eye(4)[:2], torch.eye(4)[2:]
    still = torch.zeros(3)
    before = alignment_loss(still, away(same, same), 5.0)
    assert float(alignment_loss(still, away(turned, same), 5.0)) < float(before)
    assert away(turned, same).tolist() == [1.0, 1.0]


def test_extraction_is_bounded(original):
    around = context(original)
    laf = bound(Laf(original, fit_epochs=1), around)
    batch = {
        "forget": around.forget.batch(torch.arange(6)),
        "retain": around.retain.batch(torch.arange(11)),
    }
    for factor in (0.0, 1.0, 1e4):
        with torch.no_grad():
            laf.learner.backbone.layers[-2].weight.mul_(factor)
        value = laf.extraction(batch).item()
        assert 11 - np.e * 6 - 1e-4 <= value <= np.e * 11 - 6 + 1e-4
    errors = torch.tensor([0.0, 1.0, 3.0])
    assert bounded(errors).tolist() == pytest.approx([1.0, np.exp(0.5), np.exp(0.75)])


def test_laf_looks_at_no_label_and_its_repair_at_those_that_stay(original):
    for method, more in ((Laf, set()), (LafRepair, {"retain labels"})):
        _, report = forget(method(original, epochs=1, fit_epochs=1), context(original), OPTIONS)
        assert set(report.touched) == {"forget images", "retain images"} | more


def test_laf_moves_the_encoder_alone_and_its_repair_the_head(original):
    around = context(original)
    model, _ = forget(Laf(original, epochs=2, lr=0.01, fit_epochs=1), around, OPTIONS)
    for key, value in original.head.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, model.head.state_dict()[key])
    repaired, _ = forget(LafRepair(original, epochs=2, lr=0.01, fit_epochs=1), around, OPTIONS)
    assert not torch.equal(repaired.head.column("weight"), model.head.column("weight"))
    for one, other in zip(model.backbone.parameters(), repaired.backbone.parameters(), strict=True):
        assert torch.equal(one, other)


def test_laf_takes_one_step_for_each_loss(original):
    around = context(original)
    laf = Laf(original, epochs=1, batch_size=200, lr=0.3, align_lr=0.2, fit_epochs=1, seed=1)
    seen = []
    for name in ("extraction", "alignment"):
        plain = getattr(laf, name)

        def watched(batch, plain=plain):
            seen.append(next(laf.learner.backbone.parameters()).detach().clone())
            return plain(batch)

        setattr(laf, name, watched)
    model, report = forget(laf, around, OPTIONS)
    assert report.steps == 1
    start, between, end = *seen, next(model.backbone.parameters()).detach()
    # The first step of Adam has the size of the learning rate wherever there is a gradient.
    first, second = (between - start).abs(), (end - between).abs()
    assert float(first.max()) == pytest.approx(0.3, rel=1e-2)
    assert float(second.max()) == pytest.approx(0.2, rel=1e-2)


def test_a_linear_decoder_reaches_what_a_sigmoid_cannot():
    rng = torch.Generator().manual_seed(0)
    embeddings = 5 + torch.randn(200, 6, generator=rng)
    errors = {}
    for decoder in ("linear", "sigmoid"):
        vae = VAE(6, (32,), 4, decoder=decoder, seed=1)
        vae.fit(embeddings, epochs=20, lr=0.01, batch_size=32, weight=0.025, seed=1)
        errors[decoder] = float((vae(embeddings) - embeddings).square().sum(1).mean())
    assert errors["linear"] < 6.0 < 96.0 < errors["sigmoid"]  # (5 - 1)^2 * 6 = 96


def test_an_autoencoder_answers_from_the_mean_and_repeats_itself():
    embeddings = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    made = []
    for _ in range(2):
        torch.rand(2)  # the ambient state must not matter
        vae = VAE(6, (16,), 2, decoder="linear", seed=3)
        vae.fit(embeddings, epochs=2, lr=0.01, batch_size=16, weight=0.1, seed=4)
        made.append(vae(embeddings))
    assert torch.equal(*made)
    assert not any(weight.requires_grad for weight in vae.parameters())
    mean = vae.encoder(embeddings)[:, :2]
    assert torch.equal(vae.decoder(mean), vae(embeddings))


def test_the_autoencoders_loss_agrees_with_numpy():
    vae = VAE(3, (4,), 2, decoder="linear", seed=0).double()
    embeddings = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = vae.loss(embeddings, 0.3, torch.Generator().manual_seed(7)).item()
    mean, log_variance = vae.encoder(embeddings).detach().chunk(2, dim=1)
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(7))
    code = mean + noise * torch.exp(0.5 * log_variance)
    error = ((vae.decoder(code) - embeddings) ** 2).sum(1)
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, torch.exp(0.5 * log_variance)),
        torch.distributions.Normal(0.0, 1.0),
    ).sum(1)
    assert found == pytest.approx(float((error + 0.3 * divergence).mean()))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Laf, {"decoder": "relu"}),
        (Laf, {"tau": 0.0}),
        (Laf, {"align_lr": -1.0}),
        (Laf, {"fit_epochs": -1}),
        (Laf, {"hidden": [0]}),
        (Laf, {"latent": 0}),
        (LafRepair, {"repair_lr": 0.0}),
        (LafRepair, {"repair_epochs": -1}),
    ],
)
def test_laf_refuses_bad_options(method, options, original):
    with pytest.raises(ConfigError, match="got"):
        method(original, **options)


@pytest.mark.parametrize("name", ["duck", "scar", "scar_self", "laf", "laf_repair"])
def test_the_settings_make_the_method(name, original):
    made = build(compose(["job=continual", f"unlearner={name}"]).unlearner, learner=original)
    assert made.method == name
