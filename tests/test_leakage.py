"""Attacks on messages: they succeed on the plain path and fail where a defence says they do."""

from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.nn import functional as F

from clfed.backbones.conv4 import Conv4
from clfed.data import digits
from clfed.errors import (
    ConfigError,
    EmbeddingMismatch,
    InvalidEmbedding,
    InvalidMessage,
    NotEnoughData,
    UnknownClass,
)
from clfed.evaluation.leakage import difference, differencing, label_recovery
from clfed.evaluation.leakage_gradients import (
    draw_masks,
    gradient_inversion,
    invert_gradient,
    linear_input,
    shared_gradient,
)
from clfed.evaluation.leakage_images import inversion, psnr, train_decoder
from clfed.federated.wire import decode_contribution, encode_contribution
from clfed.privacy.minimum_count import held_back
from clfed.privacy.noise import integer_gaussian
from clfed.prototypes import Contribution, PrototypeMemory
from clfed.prototypes.fixed_point import RESOLUTION, SCALE

DIM = 16


def random(*shape, seed=0, low=0.0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + low


def observed(embeddings, labels, moments="none"):
    zero = PrototypeMemory.empty(embeddings.shape[1], "demo", moments)
    return zero.observe(embeddings, labels)


def noised(sums, sigma, seed):
    return sums + integer_gaussian(sums.shape, sigma * SCALE, np.random.default_rng(seed).bytes)


# ---- differencing


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.integers(0, 20), st.sampled_from([1e-3, 1.0, 3e4]))
def test_two_plain_messages_of_a_node_give_its_new_example_away_exactly(seed, known, scale):
    rng = torch.Generator().manual_seed(seed)
    z = scale * (2 * torch.rand(known + 2, DIM, generator=rng) - 1)
    rows = {}
    for version, held in enumerate((z[:-1], z), 1):
        message = Contribution.of("node", version, observed(held, ["owl"] * len(held)))
        rows[version] = decode_contribution(encode_contribution(message))
    guess = difference(rows[1].sums, rows[2].sums, int(rows[2].counts - rows[1].counts))
    true = (z[-1].double() * 65536).round() / 65536
    assert torch.equal(guess, true[None])


def test_one_example_alone_is_its_own_prototype_and_a_deletion_tells_what_was_deleted():
    z = random(2, DIM)
    first, both = observed(z[:1], ["owl"]), observed(z, ["owl", "owl"])
    nothing = torch.zeros_like(first.sums)
    assert torch.equal(difference(nothing, first.sums)[0], first.means()[0])
    deleted = difference(both.sums, first.sums, -1)
    assert torch.equal(deleted[0], (z[1].double() * SCALE).round() * RESOLUTION)


def victims(number=40, known=6, seed=0):
    """Rows with ``known`` examples and with one more, this one, and 39 that it is not."""
    z = random(number, known + 40, 64, seed=seed)
    z, others = z[:, : known + 1], z[:, known + 1 :]
    sums = (z.double() * SCALE).round().long()
    return sums[:, :-1].sum(1), sums.sum(1), z[:, -1], others


def test_noise_hides_the_new_example_and_sending_often_brings_it_back():
    before, after, new, others = victims()
    plain = differencing(difference(before, after), new, others)
    assert plain.max_error == 0 and plain.cosine == pytest.approx(1) and plain.identified == 1
    assert plain.chance == 1 / 40
    hidden = differencing(difference(noised(before, 4, 1), noised(after, 4, 2)), new, others)
    assert hidden.max_error > 5 and hidden.cosine < 0.3 and hidden.identified < 0.2
    often = [
        torch.stack([noised(sums, 4, 1000 * side + release) for release in range(400)])
        for side, sums in enumerate((before, after))
    ]
    guess = difference(*often)
    found = differencing(guess, new, others)
    assert found.identified > 0.9 and found.cosine > 0.85
    # The difference of two noises of deviation 4, averaged over 400 releases.
    assert float((guess - new).std()) == pytest.approx(4 * 2**0.5 / 20, rel=0.1)


def test_a_minimum_count_leaves_the_mean_of_that_many():
    z = random(9, DIM)
    names = ["owl"] * 9
    sent = observed(z[:4], names[:4])
    for more in range(1, 5):
        assert held_back(sent, observed(z[: 4 + more], names[: 4 + more]), 5) == sent
    now = held_back(sent, observed(z, names), 5)
    assert now == observed(z, names)
    guess = difference(sent.sums, now.sums, 5)
    assert torch.allclose(guess[0], z[4:].double().mean(0), atol=RESOLUTION, rtol=0)
    errors = (guess - z[4:]).abs().amax(1)
    assert float(errors.min()) > 0.1


@given(st.data())
def test_what_is_held_back_never_differs_by_fewer_than_the_minimum(data):
    least = data.draw(st.integers(1, 6))
    number = data.draw(st.integers(0, 25))
    z = random(number, 3, seed=number)
    names = data.draw(st.lists(st.sampled_from("abc"), min_size=number, max_size=number))
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, number), max_size=5))), number]
    known = [PrototypeMemory.empty(3, "demo")]
    for cut in cuts:
        now = observed(z[:cut], names[:cut])
        known.append(held_back(known[-1], now, least))
        assert all(abs(count) < least for count in (now - known[-1]).counts.tolist())
    for before, after in pairwise(known):
        assert all(count >= least for count in (after - before).counts.tolist())


def test_an_aggregate_hides_an_example_among_others_but_not_the_only_newcomer():
    before, after, new, others = victims(10)
    change = difference(before.sum(0, keepdim=True), after.sum(0, keepdim=True), 10)
    together = differencing(change.expand(10, -1), new, others)
    assert together.max_error > 0.4 and together.cosine < 0.95
    guesses = torch.cat(
        [
            difference(before.sum(0, keepdim=True), before.sum(0, keepdim=True) + one - old)
            for old, one in zip(before[:, None], after[:, None], strict=True)
        ]
    )
    alone = differencing(guesses, new, others)
    assert alone.max_error == 0 and alone.identified == 1


def test_masks_modulo_two_to_the_64_hide_it_and_equal_masks_do_not():
    before, after, new, others = victims()
    rng = np.random.default_rng(0)
    masks = [
        torch.from_numpy(rng.integers(-(2**63), 2**63, size=before.shape, dtype=np.int64))
        for _ in range(2)
    ]
    hidden = differencing(difference(before + masks[0], after + masks[1]), new, others)
    assert hidden.identified < 0.2 and abs(hidden.cosine) < 0.2 and hidden.max_error > 1e12
    reused = differencing(difference(before + masks[0], after + masks[0]), new, others)
    assert reused.max_error == 0


def test_bad_releases_are_refused():
    sums = torch.zeros(2, 3, dtype=torch.int64)
    for before, after in ((sums, sums[:1]), (sums.double(), sums.double())):
        with pytest.raises(InvalidMessage, match="Expected int64 sums of one shape"):
            difference(before, after)
    with pytest.raises(InvalidMessage, match="at least one example"):
        difference(sums, sums, 0)
    z, others = torch.zeros(2, 3), torch.zeros(2, 4, 3)
    for wrong in ((z, z, others[0]), (z, z, others[:1]), (z, z[:1], others), (z, z, others[:, :0])):
        with pytest.raises(NotEnoughData, match="others for each of 2 guesses"):
            differencing(*wrong)
    with pytest.raises(NotEnoughData, match="each of 0 guesses"):
        differencing(z[:0], z[:0], others[:0])
    with pytest.raises(InvalidEmbedding):
        differencing(z, z[:, :2], others)
    with pytest.raises(InvalidEmbedding):
        differencing(z, z, torch.full_like(others, torch.inf))
    with pytest.raises(InvalidEmbedding):
        differencing(z, torch.full_like(z, torch.nan), others)
    memory = observed(random(2, 3), ["a", "b"])
    with pytest.raises(InvalidMessage, match="minimum count"):
        held_back(memory, memory, 0)


# ---- labels


@pytest.fixture(scope="module")
def halves():
    """Handwritten digits, 64 pixels as features: what the nodes hold, and what is public."""
    data = digits.load(as_features=True)
    return tuple(
        (part.images, [part.classes[label] for label in part.labels.tolist()])
        for part in (data.train, data.test)
    )


def few(part, shots, seed):
    """Some examples of each class."""
    z, names = part
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [
        row
        for name in sorted(set(names))
        for row in [row for row in order if names[row] == name][:shots]
    ]
    return observed(z[rows], [names[row] for row in rows])


def recovered(halves, shots, *, sigma=0.0, draws=10):
    public = observed(*halves[1])
    found = []
    for seed in range(draws):
        sent = few(halves[0], shots, seed)
        sums = noised(sent.sums, sigma, seed) if sigma else sent.sums
        sent = PrototypeMemory.of(sent.classes, sent.counts, sums, sent.embedding_id)
        found.append(label_recovery(sent, public))
    return [np.mean([getattr(f, key) for f in found]) for key in ("accuracy", "assigned")]


def test_rows_without_names_are_named_the_more_surely_the_more_examples_they_hold(halves):
    one, five, twenty = (recovered(halves, shots)[0] for shots in (1, 5, 20))
    assert 0.75 < one < five <= twenty and twenty == 1
    # The scale of noise at epsilon = 1 for features of norm 4: one example is hidden, 80 are not.
    drowned = recovered(halves, 1, sigma=15.0)[0]
    assert drowned < 0.3
    assert recovered(halves, 80, sigma=15.0)[0] > 0.9


def test_an_attacker_who_knows_that_rows_differ_in_class_is_right_more_often(halves):
    apart, together = recovered(halves, 1, draws=20)
    assert together > apart


def test_guesses_agree_with_numpy_and_with_all_permutations(halves):
    public = observed(*halves[1]).select("01234")
    sent = few(halves[0], 1, 3).select("01234")
    z, names = halves[1][0].numpy(), np.array(halves[1][1])
    middles = np.stack([z[names == name].mean(0) for name in "01234"])
    distance = np.square(sent.means().numpy()[:, None] - middles).sum(2)
    right = distance.argmin(1) == np.arange(5)
    best = min(permutations(range(5)), key=lambda p: distance[np.arange(5), p].sum())
    found = label_recovery(sent, public)
    assert found.accuracy == right.mean() and found.chance == 0.2
    assert found.assigned == np.mean(np.array(best) == np.arange(5))


def test_codes_in_place_of_names_change_nothing_and_rows_of_the_unknown_are_refused(halves):
    public, sent = observed(*halves[1]), few(halves[0], 1, 0)
    code = {name: f"code {(int(name) * 7 + 3) % 10}" for name in sent.classes}

    def renamed(memory):
        return PrototypeMemory.of(
            [code[name] for name in memory.classes], memory.counts, memory.sums, "demo"
        )

    assert label_recovery(renamed(sent), renamed(public)) == label_recovery(sent, public)
    with pytest.raises(UnknownClass):
        label_recovery(sent, public.without(["3"]))
    with pytest.raises(NotEnoughData, match="rows to name"):
        label_recovery(PrototypeMemory.empty(64, "demo"), public)
    with pytest.raises(EmbeddingMismatch):
        label_recovery(PrototypeMemory.of(sent.classes, sent.counts, sent.sums, "other"), public)
    with pytest.raises(InvalidMessage):
        label_recovery(-sent, public)


def test_a_classifier_with_second_moments_may_be_the_attacker(halves):
    public = observed(*halves[1], moments="shared")
    assert label_recovery(few(halves[0], 20, 0), public, "lda").accuracy == 1


# ---- images


def test_psnr_agrees_with_a_slow_loop_and_has_a_ceiling():
    a, b = random(3, 1, 4, 4), random(3, 1, 4, 4, seed=1)
    for one, x, y in zip(psnr(a, b), a.numpy(), b.numpy(), strict=True):
        error = sum((p - q) ** 2 for p, q in zip(x.ravel(), y.ravel(), strict=True)) / 16
        assert float(one) == pytest.approx(10 * np.log10(1 / error), rel=1e-5)
    assert psnr(a, a).tolist() == [100.0] * 3


def encoder_of(images, labels, seed):
    """A small Conv4 after three passes over its base classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Conv4(1, 16, (16, 16, 32, 64))
        head = nn.Linear(net.dim, int(labels.max()) + 1)
        optimiser = torch.optim.Adam([*net.parameters(), *head.parameters()], 3e-3)
        for _ in range(3):
            for rows in torch.randperm(len(images)).split(64):
                optimiser.zero_grad()
                F.cross_entropy(head(net(images[rows])), labels[rows]).backward()
                optimiser.step()
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def inverted():
    """What is left of five unknown digits, for three encoders and decoders of five others."""
    data = digits.load()

    def part(images, group):
        chosen = images.of_classes(data.groups[group])
        return F.interpolate(chosen.images.float() / 255, scale_factor=2), chosen.labels

    base, base_labels = part(data.train, "base")
    field, labels = part(data.train, "field")
    public, public_labels = part(data.test, "field")
    judge = KNeighborsClassifier(1).fit(public.flatten(1).numpy(), public_labels.numpy())
    rows = torch.cat([(labels == c).nonzero().flatten()[:15] for c in range(5)])
    images, own = field[rows], labels[rows]
    found = []
    for seed in range(3):
        encoder = encoder_of(base, base_labels, seed)
        decoder = train_decoder(encoder(base), base, epochs=40, seed=seed)
        z = encoder(images)
        weights = random(1, 5, seed=seed)
        prototypes = z.view(5, 15, -1).mean(1)
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
        sent = {
            "raw": (z, 1),
            "mean of 5": (z.view(15, 5, -1).mean(1), 5),
            "mean of 15": (prototypes, 15),
            "mixture": (weights / weights.sum() @ prototypes, 75),
            "noised": (z + 2 * z.std() * noise, 1),
        }
        found.append(
            {
                name: inversion(
                    decoder(message),
                    images,
                    torch.arange(75) // many,
                    public=base,
                    judge=lambda x: torch.from_numpy(judge.predict(x.flatten(1).numpy())),
                    labels=own,
                )
                for name, (message, many) in sent.items()
            }
        )
    return found


def test_the_more_images_a_message_mixes_the_less_of_each_comes_back(inverted):
    for found in inverted:
        raw, five, fifteen, mixture = (
            found[name].psnr for name in ("raw", "mean of 5", "mean of 15", "mixture")
        )
        assert raw > five + 0.2 and five > fifteen - 0.05 and fifteen > mixture + 0.5
        assert raw > found["raw"].floor + 0.8
        assert (
            mixture < found["mixture"].floor + 0.3 and found["noised"].psnr < found["noised"].floor
        )


def test_a_mean_shows_less_of_an_image_and_as_much_of_its_class(inverted):
    known = {name: np.mean([found[name].recognised for found in inverted]) for name in inverted[0]}
    assert known["raw"] > 0.5 and known["mean of 15"] > 0.6
    assert known["noised"] < known["raw"] - 0.1


def test_reconstructions_are_judged_against_each_image_of_their_message():
    images = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2), torch.ones(1, 2, 2)])
    guesses = torch.stack([torch.full((1, 2, 2), 0.5), torch.ones(1, 2, 2)])
    found = inversion(
        guesses,
        images,
        torch.tensor([0, 0, 1]),
        public=images[:1],
        judge=lambda x: x.flatten(1).mean(1).gt(0.4).long(),
        labels=torch.tensor([0, 1, 1]),
    )
    assert found.mse == pytest.approx(0.5 / 3) and found.recognised == pytest.approx(2 / 3)
    assert found.psnr == pytest.approx((2 * 10 * np.log10(4) + 100) / 3)
    assert found.floor == pytest.approx(100 / 3)


def test_a_decoder_is_the_same_for_the_same_seed_and_draws_nothing_from_elsewhere():
    z, x = random(20, 4), random(20, 1, 3, 3, seed=1)
    ambient = torch.random.get_rng_state()
    one, two, other = (train_decoder(z, x, epochs=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(ambient, torch.random.get_rng_state())
    assert torch.equal(one(z), two(z)) and not torch.equal(one(z), other(z))
    assert one(z).shape == x.shape and one(z).min() >= 0 and one(z).max() <= 1


def test_images_that_do_not_fit_are_refused():
    z, x = random(4, 3), random(4, 1, 2, 2)
    for embeddings, images in ((z, x[:3]), (z[:1], x[:1])):
        with pytest.raises(NotEnoughData, match="two or more embeddings"):
            train_decoder(embeddings, images, seed=0)
    owner = torch.arange(4)
    with pytest.raises(NotEnoughData):
        inversion(x, x[:0], owner[:0], public=x)
    with pytest.raises(NotEnoughData):
        inversion(x, x, owner, public=x[:0])
    for wrong in ({"labels": owner}, {"judge": len}, {"judge": len, "labels": owner[:2]}):
        with pytest.raises(InvalidEmbedding, match="judge"):
            inversion(x, x, owner, public=x, **wrong)
    with pytest.raises(InvalidEmbedding):
        inversion(x, x, owner[:3], public=x)


# ---- gradients


def network(kind, rate, seed):
    """A small network with dropout for 8 x 8 images of ten classes."""
    parts = {
        "convolutions": lambda: [
            *(nn.Conv2d(1, 16, 3, padding=1, stride=2), nn.GELU(), nn.Dropout(rate)),
            *(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.GELU(), nn.Dropout(rate)),
            *(nn.Flatten(), nn.Linear(128, 64), nn.GELU(), nn.Dropout(rate), nn.Linear(64, 10)),
        ],
        "layers": lambda: [
            *(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(rate)),
            *(nn.Linear(128, 64), nn.ReLU(), nn.Dropout(rate), nn.Linear(64, 10)),
        ],
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(*parts[kind]()).eval()


@pytest.fixture(scope="module")
def pictures():
    data = digits.load().train
    return data.images.float() / 255, data.labels


def attacked(pictures, kind, *, rate=0.0, size=1, find_masks=False, seed=0, **options):
    """PSNR of what comes back of a batch, above that of the mean image."""
    images, labels = pictures
    model = network(kind, rate, seed)
    rng = torch.Generator().manual_seed(seed)
    rows = slice(10 + seed * size, 10 + (seed + 1) * size)
    x, y = images[rows], labels[rows]
    masks = draw_masks(model, x, rng) if rate else ()
    gradient = shared_gradient(model, x, y, masks=masks, rng=rng, **options)
    guess = invert_gradient(
        model, gradient, y, (1, 8, 8), find_masks=find_masks, rng=rng, steps=150
    )
    found = gradient_inversion(guess, x, public=images)
    assert 10 < found.floor < 13
    return found.psnr - found.floor


@pytest.mark.parametrize(("kind", "seed"), [("convolutions", 1), ("layers", 0)])
def test_dropout_stops_plain_gradient_matching_and_not_a_search_for_the_masks(pictures, kind, seed):
    assert attacked(pictures, kind, seed=seed) > 8
    assert attacked(pictures, kind, rate=0.3, seed=seed) < 6
    assert attacked(pictures, kind, rate=0.3, seed=seed, find_masks=True) > 8


def test_clipping_alone_changes_nothing_and_noise_hides_the_example(pictures):
    assert attacked(pictures, "layers", clip=0.1) > 8
    assert attacked(pictures, "layers", clip=0.1, noise=0.1) < 0
    assert attacked(pictures, "layers", clip=0.1, noise=1.0) < 0


def test_a_batch_of_four_hides_nothing_and_one_of_64_much(pictures):
    assert attacked(pictures, "layers", size=4) > 8
    assert attacked(pictures, "layers", size=64) < 6


def manual(model, x, y, masks):
    """The gradients of the fully connected network, by hand."""
    w1, b1, w2, b2, w3, b3 = (p.detach().clone().requires_grad_() for p in model.parameters())
    a = F.relu(x.flatten(1) @ w1.T + b1) * masks[0] / 0.7
    b = F.relu(a @ w2.T + b2) * masks[1] / 0.7
    scores = b @ w3.T + b3
    loss = (scores.logsumexp(1) - scores.gather(1, y[:, None]).squeeze(1)).mean()
    return torch.autograd.grad(loss, (w1, b1, w2, b2, w3, b3))


def test_a_masked_gradient_agrees_with_one_written_by_hand(pictures):
    x, y = pictures[0][:6], pictures[1][:6]
    model = network("layers", 0.3, 0)
    masks = draw_masks(model, x, torch.Generator().manual_seed(0))
    assert [tuple(mask.shape) for mask in masks] == [(6, 128), (6, 64)]
    assert set(masks[0].unique().tolist()) == {0.0, 1.0}
    assert float(masks[0].mean()) == pytest.approx(0.7, abs=0.06)
    expected = manual(model, x, y, masks)
    for wide in (None, 1e6):  # clipping that clips nothing goes example by example
        found = shared_gradient(model, x, y, masks=masks, clip=wide)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    assert not model[3]._forward_hooks and not model[6]._forward_hooks
    kept = shared_gradient(model, x, y)
    ones = [torch.full_like(mask, 0.7) for mask in masks]
    undone = manual(model, x, y, ones)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(kept, undone, strict=True))


def test_each_example_is_clipped_and_the_noise_has_its_size(pictures):
    x, y = pictures[0][:4], pictures[1][:4]
    model = network("layers", 0.0, 0)

    def norm(parts):
        return float(torch.cat([part.flatten() for part in parts]).norm())

    single = [shared_gradient(model, x[i : i + 1], y[i : i + 1]) for i in range(4)]
    limit = sorted(map(norm, single))[1] * 1.01  # two are clipped, two are not
    expected = [
        sum(part * min(1, limit / norm(one)) for part, one in zip(parts, single, strict=True)) / 4
        for parts in zip(*single, strict=True)
    ]
    found = shared_gradient(model, x, y, clip=limit)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    rng = torch.Generator().manual_seed(0)
    loud = shared_gradient(model, x, y, clip=limit, noise=2.0, rng=rng)
    change = torch.cat([(a - b).flatten() for a, b in zip(loud, found, strict=True)])
    assert float(change.std()) == pytest.approx(2 * limit / 4, rel=0.05)
    assert float(change.mean()) == pytest.approx(0, abs=limit / 50)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_first_layer_with_bias_gives_its_input_away_whatever_is_dropped_behind_it(pictures, rate):
    images, labels = pictures
    model = network("layers", rate, 0)
    x, y = images[:1], labels[:1]
    masks = draw_masks(model, x, torch.Generator().manual_seed(0))
    weight, bias, *_ = shared_gradient(model, x, y, masks=masks)
    assert torch.allclose(linear_input(weight, bias), x.flatten(), atol=1e-4)
    weight, bias, *_ = shared_gradient(model, images[:8], labels[:8])
    mixed = linear_input(weight, bias)
    assert float((mixed - images[:8].flatten(1)).abs().amax(1).min()) > 0.2


def test_the_order_of_a_batch_does_not_count():
    images, public = random(5, 1, 3, 3), random(4, 1, 3, 3, seed=1)
    found = gradient_inversion(images.flip(0), images, public=public)
    assert found.mse == 0 and found.psnr == 100 and found.recognised is None
    slow = [-10 * np.log10(float((x - public.mean(0)).square().mean())) for x in images]
    assert found.floor == pytest.approx(np.mean(slow), rel=1e-5)


def test_a_search_is_the_same_for_the_same_generator(pictures):
    model = network("layers", 0.3, 0)
    x, y = pictures[0][:1], pictures[1][:1]
    gradient = shared_gradient(model, x, y)
    ambient = torch.random.get_rng_state()
    one, two, other = (
        invert_gradient(
            model,
            gradient,
            y,
            (1, 8, 8),
            find_masks=True,
            rng=torch.Generator().manual_seed(seed),
            steps=5,
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(ambient, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_networks_and_gradients_that_do_not_fit_are_refused(pictures):
    x, y = pictures[0][:2], pictures[1][:2]
    rng = torch.Generator()
    model = network("layers", 0.3, 0)
    with pytest.raises(ConfigError, match="eval mode"):
        draw_masks(network("layers", 0.3, 0).train(), x, rng)
    with pytest.raises(ConfigError, match="only dropout"):
        shared_gradient(nn.Sequential(nn.Flatten(), nn.AlphaDropout()).eval(), x, y)
    with pytest.raises(ConfigError, match="each of 2 layers, got 1"):
        shared_gradient(model, x, y, masks=draw_masks(model, x, rng)[:1])
    for clip, noise in ((0.0, 0.0), (-1.0, 0.0), (1.0, -1.0), (float("nan"), 0.0)):
        with pytest.raises(ConfigError, match="positive norm"):
            shared_gradient(model, x, y, clip=clip, noise=noise, rng=rng)
    for options in ({"rng": rng}, {"clip": 1.0}):
        with pytest.raises(ConfigError, match="clipping norm and a generator"):
            shared_gradient(model, x, y, noise=1.0, **options)
    right = shared_gradient(model, x, y)
    for wrong in (
        right[:-1],
        right[::-1],
        [torch.zeros_like(part) for part in right],
        [torch.full_like(part, torch.nan) for part in right],
    ):
        with pytest.raises(InvalidMessage, match="gradient"):
            invert_gradient(model, wrong, y, (1, 8, 8), find_masks=False, rng=rng)
    with pytest.raises(NotEnoughData, match="bias"):
        linear_input(torch.zeros(2, 3), torch.zeros(2))
