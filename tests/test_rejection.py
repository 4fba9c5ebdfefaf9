"""The score of the nearest class and its threshold: against numpy loops, and on made-up clouds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clfed.backbones import Encoder, Identity
from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError, InvalidEmbedding, NotEnoughData
from clfed.evaluation.rejection import BLOCK, FEWEST_IMAGES, calibrate, rank_classes
from clfed.evaluation.unknown import auroc, fpr_at_tpr
from clfed.prototypes import PrototypeMemory, read_off

IDENTITY = {"_target_": "clfed.backbones.Identity"}


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def feature_encoder(dim: int) -> Encoder:
    return Encoder(Identity(dim), IDENTITY, input_shape=(dim,))


def clouds(classes: int, images: int, *, dim: int = 12, far: float = 3.0, seed: int = 0):
    """Features ``(classes, images, dim)`` of variance 1 around centres of variance ``far**2``."""
    g = rng(seed)
    centres = far * torch.randn(classes, 1, dim, generator=g)
    return centres + torch.randn(classes, images, dim, generator=g)


def image_set(features: torch.Tensor) -> ImageSet:
    classes, images, _ = features.shape
    labels = torch.arange(classes).repeat_interleave(images)
    return ImageSet(features.flatten(0, 1), labels, tuple(f"class {i:03d}" for i in range(classes)))


def memory_of(features: torch.Tensor, counts: list[int] | None = None) -> PrototypeMemory:
    memory = PrototypeMemory.empty(features.shape[2], "demo")
    for number, cloud in enumerate(features):
        part = cloud if counts is None else cloud[: counts[number]]
        memory += memory.observe(part, [f"class {number:03d}"] * len(part))
    return memory


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 6).flatmap(lambda c: st.lists(st.integers(1, 9), min_size=c, max_size=c)),
    st.integers(1, 8),
    st.integers(0, 10**6),
)
def test_ranks_and_scores_are_those_of_a_loop(counts, top, seed):
    features = clouds(len(counts), 9, dim=4, seed=seed)
    memory = memory_of(features, counts)
    queries = clouds(1, 5, dim=4, seed=seed + 1)[0]
    rows, scores = rank_classes(memory, queries, top)
    assert rows.shape == scores.shape == (5, min(top, len(counts)))
    means = [features[c, :n].double().numpy().mean(0) for c, n in enumerate(counts)]
    for query, found, said in zip(queries.double().numpy(), rows.tolist(), scores, strict=True):
        distance = [float(((query - mean) ** 2).sum()) for mean in means]
        # Sums are rounded to 2**-16, which could swap only what is nearly a tie.
        assert [distance[c] for c in found] == pytest.approx(sorted(distance)[: len(found)], 1e-3)
        expected = [-distance[c] / (1 + 1 / counts[c]) for c in found]
        assert said.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_the_first_is_the_nearest_mean():
    features = clouds(30, 5, far=0.5)
    memory = memory_of(features)
    queries = clouds(1, 300, far=0.5, seed=7)[0]
    assert torch.equal(
        rank_classes(memory, queries)[0][:, 0], read_off("ncm", memory).predict(queries)
    )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2 * BLOCK + 9), min_size=1, max_size=BLOCK + 9))
def test_an_embedding_has_the_same_bits_in_any_company(places):
    # Halfway between two means the last bits decide which is nearer.
    memory = memory_of(clouds(7, 3, dim=33))
    pairs = torch.randint(0, 7, (2 * BLOCK + 10, 2), generator=rng(1))
    queries = memory.means()[pairs].mean(dim=1)
    whole = rank_classes(memory, queries, 7)
    part = rank_classes(memory, queries[places], 7)
    assert torch.equal(part[0], whole[0][places]) and torch.equal(part[1], whole[1][places])


def test_classes_of_the_same_images_tie_in_order():
    features = clouds(1, 4).repeat(40, 1, 1)
    queries = clouds(1, 70, seed=3)[0]
    rows, scores = rank_classes(memory_of(features), queries, 40)
    assert rows.tolist() == [[*range(40)]] * 70
    assert torch.equal(scores, scores[:, :1].expand(70, 40))


@pytest.mark.parametrize("known", [3, 40])
def test_the_score_of_known_images_does_not_depend_on_shots_or_classes(known):
    features = clouds(known, 220)
    for shots in (1, 3, 20):
        counts = [shots] * known
        scores = rank_classes(memory_of(features, counts), features[:, 20:].flatten(0, 1))[1]
        # Each of 12 coordinates of the difference has variance 1 + 1/n: the mean of -score is 12.
        assert float(-scores.mean()) == pytest.approx(12, rel=0.12)


@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 12)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(InvalidEmbedding, match=r"\(B, 12\)"):
        rank_classes(memory_of(clouds(2, 3)), torch.zeros(shape))


def test_bad_values_are_refused():
    memory = memory_of(clouds(2, 3))
    with pytest.raises(InvalidEmbedding, match="finite"):
        rank_classes(memory, torch.full((1, 12), float("nan")))
    with pytest.raises(ConfigError, match="at least one class"):
        rank_classes(memory, torch.zeros(1, 12), 0)
    with pytest.raises(NotEnoughData, match="at least one class"):
        rank_classes(PrototypeMemory.empty(12, "demo"), torch.zeros(1, 12))
    assert rank_classes(memory, torch.zeros(0, 12))[0].shape == (0, 1)


def calibrated(features: torch.Tensor, seed: int = 0, **options) -> float | None:
    return calibrate(
        feature_encoder(features.shape[2]), image_set(features), generator=rng(seed), **options
    )


@pytest.mark.parametrize("tpr", [0.5, 0.8, 0.95])
@pytest.mark.parametrize(("known", "shots"), [(3, 5), (60, 5), (10, 1), (10, 30)])
def test_the_promised_share_of_new_known_images_passes(tpr, known, shots):
    threshold = calibrated(clouds(40, 30, seed=1), tpr=tpr)
    field = clouds(known + 20, 130, seed=2)
    memory = memory_of(field[:known], [shots] * known)
    scores = rank_classes(memory, field[:known, 30:].flatten(0, 1))[1][:, 0]
    assert float((scores >= threshold).double().mean()) == pytest.approx(tpr, abs=0.07)
    unknown = rank_classes(memory, field[known:].flatten(0, 1))[1][:, 0]
    assert auroc(scores, unknown) > 0.95
    if tpr == 0.8:
        assert float((unknown >= threshold).double().mean()) == pytest.approx(
            fpr_at_tpr(scores, unknown, tpr), abs=0.1
        )


def test_one_draw_by_hand():
    # The images of each class are equal, so every distance is 0 whatever is drawn.
    features = torch.zeros(4, 11, 1)
    features += 100 * torch.arange(4.0)[:, None, None]
    assert calibrated(features, shots=1, draws=1) == 0
    features[:, :, 0] += torch.arange(11.0)
    one = calibrated(features, shots=1, draws=1, tpr=1)
    # The farthest image is 5 to 10 away from the one that was learned.
    assert one is not None and 25 / 2 <= -one <= 100 / 2


def test_half_of_the_classes_are_known():
    # Classes that all lie on one another: the score is the nearer the more of them are known.
    features = torch.randn(40, 30, 1, generator=rng(0))
    found = calibrated(features, shots=1, tpr=0.5, draws=50)
    g = np.random.default_rng(0)
    means, queries = g.normal(size=(2000, 20)), g.normal(size=(2000, 1))
    expected = np.median(np.abs(queries - means).min(1) ** 2) / 2
    assert found == pytest.approx(-expected, rel=0.4)


def test_images_that_were_learned_are_not_scored():
    # One of 6 images is left; the learned ones would be a third nearer, (1 - 1/5) to (1 + 1/5).
    found = calibrated(clouds(20, 6, dim=400), tpr=0.5)
    assert found == pytest.approx(-400, rel=0.1)


def test_more_must_pass_below_a_lower_threshold():
    features = clouds(8, 12)
    found = [calibrated(features, tpr=tpr) for tpr in (0.1, 0.5, 0.9, 1.0)]
    assert found == sorted(found, reverse=True) and len(set(found)) == 4


def test_the_generator_alone_decides_the_draw():
    features = clouds(8, 12)
    assert calibrated(features, seed=1) == calibrated(features, seed=1)
    assert calibrated(features, seed=1) != calibrated(features, seed=2)


@pytest.mark.parametrize(
    ("classes", "images", "enough"),
    [
        (0, 30, False),
        (3, 30, False),  # too few classes
        (4, 30, True),
        (9, 5, False),  # shots alone
        (FEWEST_IMAGES - 1, 6, False),
        (FEWEST_IMAGES, 6, True),
    ],
)
def test_no_threshold_is_guessed(classes, images, enough):
    features = clouds(classes, images)
    assert (calibrated(features) is not None) == enough


def test_classes_without_spare_images_are_left_out():
    plenty = image_set(clouds(4, 30))
    poor = torch.full((5, 12), 500.0)
    images = ImageSet(
        torch.cat([plenty.images, poor]),
        torch.cat([plenty.labels, torch.full((5,), 4)]),
        (*plenty.classes, "poor"),
    )
    encoder = feature_encoder(12)
    with_poor = calibrate(encoder, images, generator=rng(0))
    assert with_poor == calibrate(encoder, plenty, generator=rng(0))


@pytest.mark.parametrize(
    "options", [{"shots": 0}, {"draws": 0}, {"tpr": 0}, {"tpr": 1.1}, {"tpr": np.nan}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError, match="at least 1 shot"):
        calibrated(clouds(5, 10), **options)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(InvalidEmbedding):
        calibrate(feature_encoder(3), image_set(clouds(5, 10)), generator=rng(0))
