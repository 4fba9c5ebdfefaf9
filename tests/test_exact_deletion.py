"""Exact deletion: what is left is, to the byte, what never saw the rest."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clfed.backbones import MLP, Identity
from clfed.backbones.encoder import Transform
from clfed.data.benchmark import ImageSet
from clfed.errors import (
    ConfigError,
    EmbeddingMismatch,
    RequestError,
    UnknownClass,
    UnsupportedStatistics,
)
from clfed.learners import state
from clfed.learners.fitting import learn
from clfed.learners.naive import Naive
from clfed.learners.ncm import NearestClassMean
from clfed.learners.options import TrainerOptions
from clfed.learners.ranpac import RanPAC
from clfed.learners.slda import StreamingLDA
from clfed.prototypes import Contribution, ContributorLedger, PrototypeMemory
from clfed.scenarios.streams import Experience
from clfed.unlearning import Request, forget, make_context
from clfed.unlearning.exact import Exact
from clfed.unlearning.statistics import Statistics

OPTIONS = TrainerOptions(precision="32", threads=1, loop="fast")
MOMENTS = ("none", "shared", "class")
CLASSES = ("ant", "bee", "cat", "dog")
NODES = ("n1", "n2", "n3")
DIM = 3


def features(rng, count):
    """Random rows that are no multiples of the resolution, of all magnitudes."""
    torch_rng = torch.Generator().manual_seed(rng.randint(0, 2**31))
    scale = 10.0 ** torch.randint(-4, 3, (count, 1), generator=torch_rng)
    return torch.randn(count, DIM, generator=torch_rng) * scale


def learner_of(images, moments="none", learner=NearestClassMean, **options):
    found = learner(
        Identity(), Transform((), ()), dim=DIM, moments=moments, train="none", **options
    )
    learn(found, Experience(0, images, phase=0, upcoming=0), OPTIONS)
    return found.eval()


class World:
    """Samples with classes and owners, and the statistics of a learner that saw them all."""

    def __init__(self, rng, count, moments="none", **options):
        labels = torch.tensor([rng.randrange(4) for _ in range(count)])
        self.images = ImageSet(features(rng, count), labels, CLASSES)
        self.ids = torch.tensor(rng.sample(range(1000), count))
        self.owners = [rng.choice(NODES) for _ in range(count)]
        self.moments = moments
        self.learner = learner_of(self.images, moments, **options)
        self.statistics = Statistics.of(self.learner, self.images, self.ids, self.owners)

    def ids_of(self, request):
        names = [CLASSES[label] for label in self.images.labels.tolist()]
        rows = zip(self.ids.tolist(), names, self.owners, strict=True)
        return torch.tensor(
            [
                i
                for i, name, owner in rows
                if name in request.classes or i in request.samples or owner == request.contributor
            ],
            dtype=torch.int64,
        )

    def rebuilt(self, gone):
        """The memory of what stays, summed by hand in Python integers."""
        stays = [row for row, i in enumerate(self.ids.tolist()) if i not in gone]
        counts, sums, outers = {}, {}, {}
        for row in stays:
            name = CLASSES[int(self.images.labels[row])]
            q = [round(float(z) * 65536) for z in self.images.images[row].double()]
            counts[name] = counts.get(name, 0) + 1
            sums[name] = [a + b for a, b in zip(sums.get(name, [0] * DIM), q, strict=True)]
            old = outers.get(name, [[0] * DIM for _ in range(DIM)])
            outers[name] = [[old[i][j] + q[i] * q[j] for j in range(DIM)] for i in range(DIM)]
        names = sorted(counts)
        outer = None
        if self.moments != "none":
            outer = torch.tensor([outers[n] for n in names], dtype=torch.int64)
            outer = outer.reshape(-1, DIM, DIM)
            outer = outer.sum(0) if self.moments == "shared" else outer
        return PrototypeMemory.of(
            names,
            torch.tensor([counts[name] for name in names], dtype=torch.int64),
            torch.tensor([sums[name] for name in names], dtype=torch.int64).reshape(-1, DIM),
            self.learner.memory.embedding_id,
            moments=self.moments,
            outer=outer,
        )


def some_request(rng, name, world, alive):
    kind = rng.choice(["class", "sample", "sample", "sample", "contributor"])
    if kind == "class":
        return Request(name, kind, classes=(rng.choice(CLASSES),))
    if kind == "contributor":
        return Request(name, kind, contributor=rng.choice(NODES))
    return Request(name, kind, samples=tuple(rng.sample(alive, min(len(alive), 4))))


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(MOMENTS), st.randoms(use_true_random=False))
def test_any_sequence_of_requests_leaves_what_a_rebuild_has(moments, rng):
    world = World(rng, rng.randint(12, 40), moments)
    found, gone = world.statistics, set()
    assert found.total == world.rebuilt(gone) == world.learner.memory
    for number in range(rng.randint(1, 5)):
        alive = [i for i in world.ids.tolist() if i not in gone]
        if not alive:
            break
        request = some_request(rng, f"r{number}", world, alive)
        asked = world.ids_of(request)
        before = found
        found = before.forget(request, asked)
        went = set(asked.tolist()) - gone
        assert set(found.deletion.removed.tolist()) == went
        assert set(found.deletion.unknown.tolist()) == set(asked.tolist()) & gone
        assert found.deletion.delta == before.total - found.total
        gone |= went
        assert found.total.to_bytes() == world.rebuilt(gone).to_bytes()
        assert found.total.sha256() == world.rebuilt(gone).sha256()
        assert set(found.ids.tolist()) == set(world.ids.tolist()) - gone
        assert len(found) == len(found.embeddings) == len(found.labels) == len(found.owners)
        assert found.memory_of(found.ids >= 0) == found.total  # what is kept is what was summed
    assert world.statistics.total == world.learner.memory  # a value: nothing changed in place
    assert len(world.statistics) == len(world.ids)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(MOMENTS), st.randoms(use_true_random=False))
def test_the_order_of_requests_does_not_matter(moments, rng):
    world = World(rng, 30, moments)
    requests = [
        Request("a", "class", classes=("bee",)),
        Request("b", "contributor", contributor="n2"),
        Request("c", "sample", samples=tuple(rng.sample(world.ids.tolist(), 6))),
    ]
    ends = []
    for _ in range(3):
        rng.shuffle(requests)
        found = world.statistics
        for request in requests:
            left = world.ids_of(request)
            found = found.forget(request, left[torch.isin(left, found.ids)])
        ends.append((found.total.to_bytes(), found.ids.tolist(), found.kept.tolist()))
    assert ends[0] == ends[1] == ends[2]


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(MOMENTS), st.randoms(use_true_random=False))
def test_a_contributor_is_the_sum_of_its_samples(moments, rng):
    world = World(rng, 24, moments)
    whole = Request("w", "contributor", contributor=world.owners[0])
    ids = world.ids_of(whole).tolist()
    at_once = world.statistics.forget(whole, torch.tensor(ids))
    rng.shuffle(ids)
    one_by_one = world.statistics
    for i in ids:
        one_by_one = one_by_one.forget(Request("s", "sample", samples=(i,)), torch.tensor([i]))
    assert one_by_one.total.to_bytes() == at_once.total.to_bytes()
    assert torch.equal(one_by_one.kept, at_once.kept)
    assert torch.equal(one_by_one.ids, at_once.ids)
    assert one_by_one.ledger.share(world.owners[0]) == at_once.ledger.share(world.owners[0])


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(MOMENTS), st.randoms(use_true_random=False))
def test_deletion_undoes_addition(moments, rng):
    few = World(rng, 20, moments)
    more = World(rng, 8, moments)
    both = ImageSet(
        torch.cat([few.images.images, more.images.images]),
        torch.cat([few.images.labels, more.images.labels]),
        CLASSES,
    )
    ids = torch.arange(28)
    owners = few.owners + more.owners
    found = Statistics.of(learner_of(both, moments), both, ids, owners)
    back = found.forget(Request("r", "sample", samples=tuple(range(20, 28))), ids[20:])
    assert back.total.to_bytes() == few.learner.memory.to_bytes()
    assert torch.equal(back.kept, few.statistics.kept)
    for node in NODES:
        assert back.ledger.share(node) == few.statistics.ledger.share(node)


def server(moments, messages):
    ledger = ContributorLedger(DIM, "e", moments)
    for message in messages:
        ledger.receive(message)
    return ledger


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(MOMENTS), st.randoms(use_true_random=False))
def test_servers_that_exchange_messages_in_any_order_agree_with_a_rebuild(moments, rng):
    """Nodes add and delete; two servers hear of it late, twice and out of order."""
    zero = PrototypeMemory.empty(DIM, "e", moments)
    messages, final = [], []
    for node in NODES:
        held = []
        for version in range(1, rng.randint(2, 5)):
            had = {name for name, _ in held}
            if held and rng.random() < 0.5:
                held = rng.sample(held, rng.randint(0, len(held) - 1))
            else:
                held = [*held, *((rng.choice(CLASSES), features(rng, 1)) for _ in range(4))]
            rows = torch.cat([row for _, row in held]) if held else torch.empty(0, DIM)
            now = zero.observe(rows, [name for name, _ in held])
            gone = sorted(had - {name for name, _ in held})
            messages.append(Contribution.of(node, version, now, gone=gone))
        final += held
    ends = []
    for _ in range(2):
        heard = messages + rng.choices(messages, k=6)
        rng.shuffle(heard)
        half = len(heard) // 2
        first, second = server(moments, heard[:half]), server(moments, heard[half:])
        for mine, theirs in ((first, heard[half:]), (second, heard[:half])):
            rng.shuffle(theirs)
            for message in theirs:
                mine.receive(message)
        assert first.to_bytes() == second.to_bytes()
        ends.append(first)
    assert ends[0].to_bytes() == ends[1].to_bytes()
    rows = torch.cat([row for _, row in final]) if final else torch.empty(0, DIM)
    assert ends[0].total == zero.observe(rows, [name for name, _ in final])


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("kind", ["class", "sample", "contributor"])
def test_a_replayed_upload_of_what_was_deleted_is_refused(moments, kind):
    world = World(random.Random(0), 30, moments)
    samples = tuple(i for i, o in zip(world.ids.tolist(), world.owners, strict=True) if o == "n1")
    request = {
        "class": Request("r", "class", classes=("bee",)),
        "sample": Request("r", "sample", samples=samples[:3]),
        "contributor": Request("r", "contributor", contributor="n1"),
    }[kind]
    uploads = [Contribution.of(node, 1, world.statistics.ledger.share(node)) for node in NODES]
    after = world.statistics.forget(request, world.ids_of(request))
    held = after.ledger.to_bytes()
    receipts = [after.ledger.receive(upload) for upload in uploads]
    assert not any(receipt.delta or receipt.accepted for receipt in receipts)
    assert after.ledger.to_bytes() == held
    if kind == "contributor":
        newer = Contribution.of("n1", 2, world.statistics.ledger.share("n1"))
        assert after.ledger.receive(newer).refused and after.ledger.to_bytes() != held
        assert after.total == world.rebuilt(set(world.ids_of(request).tolist()))
    if kind == "class" and moments != "shared":
        newer = Contribution.of("n2", 2, world.statistics.ledger.share("n2"))
        assert after.ledger.receive(newer).refused == ("bee",)
        assert after.ledger.retired_classes == ("bee",)


def test_the_last_sample_takes_its_class_along():
    images = ImageSet(torch.eye(3)[[0, 0, 1]], torch.tensor([0, 0, 1]), ("ant", "bee"))
    found = Statistics.of(learner_of(images), images, torch.arange(3), ["n1", "n2", "n1"])
    after = found.forget(Request("r", "sample", samples=(2,)), torch.tensor([2]))
    assert after.total.classes == ("ant",)
    assert after.ledger.share("n1").classes == ("ant",)
    nothing = after.forget(Request("s", "class", classes=("ant",)), torch.tensor([0, 1]))
    assert nothing.total.classes == () and not nothing.total and len(nothing) == 0


def test_what_was_never_seen_is_a_no_op_that_says_so():
    world = World(random.Random(1), 20)
    before = world.statistics.ledger.to_bytes()
    for request, ids in (
        (Request("r7", "sample", samples=(5000, 5001)), [5000, 5001]),
        (Request("r7", "contributor", contributor="nobody"), [5000]),
        (Request("r7", "class", classes=("bee",)), []),
    ):
        after = world.statistics.forget(request, torch.tensor(ids, dtype=torch.int64))
        assert after.ledger.to_bytes() == before
        assert torch.equal(after.kept, world.statistics.kept)
        assert after.deletion.unknown.tolist() == ids and not len(after.deletion.removed)
        assert not after.deletion.delta
        assert "'r7' removed 0 samples" in str(after.deletion)
        assert (f"of {len(ids)} more nothing was known" in str(after.deletion)) == bool(ids)
    known = int(world.ids[0])
    after = world.statistics.forget(
        Request("r", "sample", samples=(known, 5000)), torch.tensor([known, 5000])
    )
    assert after.deletion.removed.tolist() == [known]
    assert after.deletion.unknown.tolist() == [5000]


def test_a_class_or_a_contributor_goes_as_a_whole_or_not_at_all():
    world = World(random.Random(2), 20)
    some = world.ids_of(Request("r", "class", classes=("bee",)))
    others = world.ids_of(Request("r", "class", classes=("ant",)))
    for request, ids in (
        (Request("r", "class", classes=("bee",)), some[1:]),
        (Request("r", "class", classes=("bee",)), torch.cat([some, others])),
        (Request("r", "contributor", contributor="n1"), some),
    ):
        with pytest.raises(RequestError, match="Expected all"):
            world.statistics.forget(request, ids)
    with pytest.raises(UnknownClass):
        world.statistics.forget(Request("r", "class", classes=("Bee",)), some)
    assert world.statistics.total == world.learner.memory


def test_kept_embeddings_lose_no_digit_and_are_those_that_were_summed():
    world = World(random.Random(3), 40)
    expected = [[round(z * 65536) / 65536 for z in row] for row in world.images.images.tolist()]
    assert world.statistics.embeddings.dtype == torch.float32
    assert world.statistics.embeddings.tolist() == expected
    assert world.statistics.labels.tolist() == world.images.labels.tolist()
    assert world.statistics.owners == tuple(world.owners)
    projected = World(
        random.Random(3),
        40,
        "none",
        feature_map={
            "_target_": "clfed.prototypes.features.RandomProjection",
            "dim_out": 7,
            "seed": 0,
        },
    )
    assert projected.statistics.kept.shape == (40, 7)
    assert projected.statistics.memory_of(projected.ids >= 0) == projected.learner.memory


def test_images_are_embedded_once():
    world = World(random.Random(4), 20)
    calls = []
    embed = world.learner.embed_all
    world.learner.embed_all = lambda images: (calls.append(len(images)), embed(images))[1]
    found = Statistics.of(world.learner, world.images, world.ids, world.owners)
    found.forget(Request("r", "sample", samples=(int(world.ids[0]),)), world.ids[:1])
    assert calls == [20]


def test_statistics_of_something_else_are_refused():
    world = World(random.Random(5), 20)
    part = world.images.subset(torch.arange(19))
    with pytest.raises(UnsupportedStatistics, match="sum over the training images"):
        Statistics.of(world.learner, part, world.ids[:19], world.owners[:19])
    with pytest.raises(ConfigError, match="19 and 20"):
        Statistics.of(world.learner, world.images, world.ids[:19], world.owners)
    moved = copy.deepcopy(world.learner)
    moved.backbone = MLP(DIM, 0, (DIM,))
    with pytest.raises(EmbeddingMismatch):
        Statistics.of(moved, world.images, world.ids, world.owners)
    moved.memory = None
    with pytest.raises(UnsupportedStatistics, match="without"):
        Statistics.of(moved, world.images, world.ids, world.owners)


def context_of(world, request, **changes):
    return make_context(
        request,
        changes.get("learner", world.learner),
        world.images,
        world.ids,
        gone=world.ids_of(request),
        statistics=changes.get("statistics", world.statistics),
    )


def unlearned(world, request, **changes):
    around = context_of(world, request, **changes)
    unlearner = Exact(around.learner, name="exact")
    model, report = forget(unlearner, around, OPTIONS)
    return model, report, unlearner


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_answers_for_other_classes_stay(metric):
    """No answer changes but those that named the class; a softmax only renormalises."""
    rng = random.Random(6)
    world = World(rng, 60, classifier={"name": "ncm", "metric": metric})
    model, report, _ = unlearned(world, Request("r", "class", classes=("bee",)))
    assert report.exact and "embedding keeps" in report.scope
    questions = features(rng, 300)
    before, after = world.learner.scores_of(questions), model.scores_of(questions)
    assert torch.equal(after[:, [0, 2, 3]], before[:, [0, 2, 3]])
    assert bool((after[:, 1] == -torch.inf).all())
    others = before.argmax(1) != 1
    assert 0 < int(others.sum()) < 300
    assert torch.equal(after.argmax(1)[others], before.argmax(1)[others])
    p, q = before.double().softmax(1), after.double().softmax(1)
    sure = p[:, 1] < 1 - 1e-6
    renormalised = p[:, [0, 2, 3]] / (1 - p[:, 1:2])
    assert torch.allclose(q[sure][:, [0, 2, 3]], renormalised[sure], atol=1e-8)


def test_a_mean_moves_as_the_algebra_says():
    """mu' = mu + m / (n - m) (mu - mu_F), and ||mu' - mu|| = ||mu - z|| / (n - 1) for one."""
    rng = random.Random(7)
    images = ImageSet(features(rng, 12), torch.zeros(12, dtype=torch.int64), ("ant",))
    ids = torch.arange(12)
    found = Statistics.of(learner_of(images), images, ids, ["n1"] * 12)
    z = found.embeddings.double()
    mu = z.mean(0)
    one = found.forget(Request("r", "sample", samples=(4,)), ids[4:5]).total.means()[0]
    assert torch.allclose(one, mu + (mu - z[4]) / 11, atol=1e-9)
    five = found.forget(Request("r", "sample", samples=(0, 1, 2, 3, 4)), ids[:5]).total.means()[0]
    assert torch.allclose(five, mu + 5 / 7 * (mu - z[:5].mean(0)), atol=1e-9)


@pytest.mark.parametrize("kind", ["class", "sample", "contributor"])
def test_covariances_are_those_of_what_stays(kind):
    """The discriminant that is read off afterwards is that of a learner which never saw the rest."""
    rng = random.Random(8)
    world = World(rng, 60, "shared", learner=StreamingLDA)
    request = {
        "class": Request("r", "class", classes=("cat",)),
        "sample": Request("r", "sample", samples=tuple(world.ids[::4].tolist())),
        "contributor": Request("r", "contributor", contributor="n3"),
    }[kind]
    model, _, unlearner = unlearned(world, request)
    stays = ~torch.isin(world.ids, world.ids_of(request))
    oracle = learner_of(world.images.subset(stays), "shared", learner=StreamingLDA)
    oracle.retire(request.classes)
    assert model.memory.to_bytes() == oracle.memory.to_bytes()
    assert state.sha256(model) == state.sha256(oracle)
    assert unlearner.statistics.total == model.memory
    questions = features(rng, 50)
    assert torch.equal(model.scores_of(questions), oracle.scores_of(questions))


def test_a_sequence_of_requests_goes_on_from_what_is_left():
    world = World(random.Random(9), 40)
    first, _, unlearner = unlearned(world, Request("a", "class", classes=("bee",)))
    left = unlearner.statistics
    second = Request("b", "contributor", contributor="n1")
    around = make_context(
        second,
        first,
        world.images,
        world.ids,
        gone=world.ids_of(second)[torch.isin(world.ids_of(second), left.ids)],
        statistics=left,
    )
    model, report = forget(Exact(first), around, OPTIONS)
    gone = {
        i
        for r in ("a", "b")
        for i in world.ids_of(
            {"a": Request("a", "class", classes=("bee",)), "b": second}[r]
        ).tolist()
    }
    assert model.memory.to_bytes() == world.rebuilt(gone).to_bytes()
    assert model.retired == ("bee",)
    assert report.lineage["statistics_from"] == left.total.sha256()
    assert report.lineage["statistics_to"] == model.memory.sha256()
    stale = context_of(world, second, learner=first)
    with pytest.raises(UnsupportedStatistics, match="those of another"):
        forget(Exact(first), stale, OPTIONS)


def test_a_head_gives_way_to_the_statistics_and_nothing_else_is_left():
    world = World(random.Random(10), 40)
    learner = Naive(Identity(), Transform((), ()), name="naive", dim=DIM, moments="none", epochs=3)
    learn(learner, Experience(0, world.images, phase=0, upcoming=0), OPTIONS)
    assert float(learner.head.column("weight").detach().abs().sum()) > 0
    learner.kept = {"importance": torch.ones(3)}
    learner.optimiser_state = {"weight": {"step": 3}}
    learner.reader()
    model, report, _ = unlearned(
        world,
        Request("r", "sample", samples=tuple(world.ids[:5].tolist())),
        learner=learner,
        statistics=Statistics.of(learner, world.images, world.ids, world.owners),
    )
    assert model.classifier == {"name": "ncm"} and learner.classifier is None
    assert not model.kept and not model.optimiser_state and not len(model.teacher)
    assert model._reader is None or model._reader[0] is model.memory
    assert float(model.head.column("weight").detach().abs().sum()) == 0
    assert model.head.classes == learner.head.classes
    assert report.touched == {"class statistics": 5} and not report.steps
    assert model.scores_of(world.images.images).isfinite().all()


def test_learners_whose_answers_come_from_more_are_refused():
    rng = random.Random(11)
    world = World(rng, 60)
    request = Request("r", "class", classes=("bee",))
    headless = Naive(Identity(), Transform((), ()), name="naive", dim=DIM)
    learn(headless, Experience(0, world.images, phase=0, upcoming=0), OPTIONS)
    paper = learner_of(world.images, "shared", learner=StreamingLDA, mode="paper", name="slda")
    ranpac = learner_of(world.images, "shared", learner=RanPAC, feature_map=None, name="ranpac")
    assert ranpac.kept
    for learner, words in (
        (headless, "learner=naive keeps none"),
        (paper, "learner=slda also uses scatter"),
        (ranpac, "learner=ranpac also uses held_out_errors"),
    ):
        with pytest.raises(ConfigError, match=words):
            forget(Exact(learner), context_of(world, request, learner=learner), OPTIONS)
    fixed = learner_of(world.images, "shared", learner=RanPAC, feature_map=None, penalty=1.0)
    found = Statistics.of(fixed, world.images, world.ids, world.owners)
    model, _, _ = unlearned(world, request, learner=fixed, statistics=found)
    assert "bee" not in model.memory
    with pytest.raises(UnsupportedStatistics, match="got none"):
        unlearned(world, request, statistics=None)
