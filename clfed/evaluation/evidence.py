"""Evidence of one act of unlearning: every measure of a model against retrained ones.

``docs/unlearning_metrics.md`` lists the measures with formula, populations and ideal value. A
measure that is not defined for a request (a class accuracy where no class went, an attack on a
handful of images) is left out, so no value is ever ``nan``.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from clfed.errors import ConfigError, InvalidEmbedding, NotEnoughData
from clfed.evaluation import membership
from clfed.evaluation.matrix import Array
from clfed.evaluation.measures import MEASURES, Measure
from clfed.evaluation.membership import attack_scores
from clfed.evaluation.relearning import prototypical_relearning
from clfed.evaluation.unlearning import (
    Answers,
    Sheet,
    accuracy,
    activation_distance,
    adaptive_unlearning,
    answers,
    jensen_shannon,
    linear_cka,
    losses,
    tug_of_war,
    zero_retrain_forgetting,
)
from clfed.seeding import derive_seed

__all__ = [
    "MEASURES",
    "Answers",
    "Measure",
    "Sheet",
    "answers",
    "attack_scores",
    "evidence",
    "floor",
]

KINDS = ("class", "sample", "contributor")
#: Whose gaps to the oracles make the average gap.
GAPS = ("ua", "ra", "ta", "mia_confidence")


def evidence(
    subject: Sheet,
    *,
    original: Sheet,
    oracles: Sequence[Sheet],
    untrained: Sheet,
    kind: str,
    seed: int,
    forgotten_rows: Tensor,
) -> dict[str, float]:
    """Compute every measure of one model.

    Args:
        subject: Of the model that has forgotten.
        original: Of the model before.
        oracles: Of models retrained without the forget set, on the same images.
        untrained: Of a network that was never trained.
        kind: Of the request: ``class``, ``sample`` or ``contributor``.
        seed: Of every draw and split.
        forgotten_rows: ``(M,)`` int64, classes that went as a whole; empty for other requests.

    Raises:
        ConfigError: No such kind.
        NotEnoughData: No oracle, or no image to forget, to keep or to test.
        InvalidEmbedding: The models were not asked about the same images.
    """
    if kind not in KINDS:
        raise ConfigError(f"Expected a kind of request of {KINDS}, got {kind!r}.")
    if not oracles:
        raise NotEnoughData("Expected at least one retrained model to compare with, got none.")
    _check_alike(subject, original, untrained, *oracles)
    return {
        **_alone(subject, original, untrained, kind, seed, forgotten_rows),
        **_compared(subject, oracles, seed),
    }


def floor(
    oracles: Sequence[Sheet],
    *,
    original: Sheet,
    untrained: Sheet,
    kind: str,
    seed: int,
    forgotten_rows: Tensor,
) -> tuple[dict[str, float], dict[str, float]]:
    """Judge each oracle against the others: what no unlearner can be better than.

    A single oracle has only the measures that compare it with nobody, and no spread.

    Args:
        oracles: As in :func:`evidence`.
        original: As in :func:`evidence`.
        untrained: As in :func:`evidence`.
        kind: As in :func:`evidence`.
        seed: As in :func:`evidence`.
        forgotten_rows: As in :func:`evidence`.

    Returns:
        Means and sample standard deviations over the oracles, by name of the measure.
    """
    if len(oracles) == 1:
        _check_alike(original, untrained, *oracles)
        return _alone(oracles[0], original, untrained, kind, seed, forgotten_rows), {}
    found = [
        evidence(
            oracle,
            original=original,
            oracles=[other for other in oracles if other is not oracle],
            untrained=untrained,
            kind=kind,
            seed=seed,
            forgotten_rows=forgotten_rows,
        )
        for oracle in oracles
    ]
    names = [name for name in found[0] if all(name in one for one in found)]
    values = {name: [one[name] for one in found] for name in names}
    return (
        {name: statistics.fmean(parts) for name, parts in values.items()},
        {name: statistics.stdev(parts) for name, parts in values.items()},
    )


def _alone(
    subject: Sheet, original: Sheet, untrained: Sheet, kind: str, seed: int, rows: Tensor
) -> dict[str, float]:
    """Measures that compare a model with no oracle."""
    found = {**_marks(subject, seed)}
    before = accuracy(original.test)
    known = accuracy(subject.forget)
    homogeneous = adaptive_unlearning(before, found["ta"], known - found["ta"])
    if kind == "class":
        found["ta_forget"] = accuracy(subject.test_forget)
        found["aus"] = adaptive_unlearning(before, found["ta"], found["ta_forget"])
        found["aus_homogeneous"] = homogeneous
    else:
        found["aus"] = homogeneous
    if len(subject.validation):
        found["va"] = accuracy(subject.validation)
    found["zrf"] = zero_retrain_forgetting(
        subject.forget.probabilities, untrained.forget.probabilities
    )
    with suppress(NotEnoughData):
        found.update(_attacks(subject, kind, derive_seed(seed, "attacks")))
    if kind == "class":
        optional: dict[str, Callable[[], float]] = {
            "probe": lambda: _probe(subject, derive_seed(seed, "probe")),
            "pra": lambda: prototypical_relearning(
                subject.forget, subject.retain, rows, seed=derive_seed(seed, "shots")
            ),
        }
        for name, measure in optional.items():
            with suppress(NotEnoughData):
                found[name] = measure()
    return found


@functools.lru_cache(maxsize=16)
def _marks(sheet: Sheet, seed: int) -> Mapping[str, float]:
    """What the average gap is made of; every model is compared with the same oracles."""
    found = {
        "ua": 1 - accuracy(sheet.forget),
        "ra": accuracy(sheet.retain),
        "ta": accuracy(sheet.test),
    }
    with suppress(NotEnoughData):
        found["mia_confidence"] = _called(sheet, membership.confidences, seed)
    return found


def _called(sheet: Sheet, score: Callable[[Answers], Array], seed: int) -> float:
    inside, outside = ((score(side), side.labels.numpy()) for side in (sheet.retain, sheet.test))
    draws = derive_seed(seed, "called")
    return membership.called_non_members(inside, outside, score(sheet.forget), seed=draws)


def _attacks(sheet: Sheet, kind: str, seed: int) -> dict[str, float]:
    """Attacks on the forget set; for a class request against test images of the same class."""
    others = sheet.test_forget if kind == "class" else sheet.test
    labels = [side.labels.numpy() for side in (sheet.forget, others)]
    features = [
        np.column_stack([membership.scores(side), losses(side).numpy()])
        for side in (sheet.forget, others)
    ]
    inside, outside = membership.matched(features[0], labels[0], features[1], labels[1], seed=seed)
    by_loss = membership.loss_attack(inside[:, -1:], outside[:, -1:], seed=seed)
    by_threshold, area = membership.threshold_attack(inside[:, :-1], outside[:, :-1])
    return {
        "mia_loss": by_loss,
        "mia_loss_gap": abs(by_loss - 0.5),
        "mia_threshold": by_threshold,
        "mia_threshold_auc": area,
        "mia_entropy": 1 - _called(sheet, membership.entropies, seed),
    }


def _probe(sheet: Sheet, seed: int) -> float:
    """Balanced accuracy of a linear probe: learned on training images, judged on test images."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    learned, judged = (
        _one_against_rest(went, stays, derive_seed(seed, part))
        for part, went, stays in (
            ("learned", sheet.forget, sheet.retain),
            ("judged", sheet.test_forget, sheet.test),
        )
    )
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(*learned)
    return float(probe.score(*judged))


def _one_against_rest(went: Answers, stays: Answers, seed: int) -> tuple[Array, Array]:
    same = [np.zeros(len(side), dtype=np.int64) for side in (went, stays)]
    sides = [side.embeddings.numpy() for side in (went, stays)]
    inside, outside = membership.matched(sides[0], same[0], sides[1], same[1], seed=seed)
    return np.concatenate([inside, outside]), np.repeat([1, 0], len(inside))


def _compared(subject: Sheet, oracles: Sequence[Sheet], seed: int) -> dict[str, float]:
    """Measures of the distance to the oracles."""
    ours, theirs = _marks(subject, seed), [_marks(oracle, seed) for oracle in oracles]
    means = {name: statistics.fmean(one[name] for one in theirs) for name in ours}
    found = {"tow": tug_of_war((ours[name], means[name]) for name in ("ua", "ra", "ta"))}
    if "mia_confidence" in ours:
        found["avg_gap"] = statistics.fmean(abs(ours[name] - means[name]) for name in GAPS)
        found["tow_mia"] = tug_of_war(
            (ours[name], means[name]) for name in ("mia_confidence", "ra", "ta")
        )
    distances: dict[str, Callable[[Sheet], float]] = {
        "js_forget": lambda oracle: _divergence(subject.forget, oracle.forget),
        "js_retain": lambda oracle: _divergence(subject.retain, oracle.retain),
        "js_test": lambda oracle: _divergence(subject.test, oracle.test),
        "activation_distance": lambda oracle: float(
            activation_distance(subject.forget.probabilities, oracle.forget.probabilities).mean()
        ),
        "cka": lambda oracle: linear_cka(subject.forget.embeddings, oracle.forget.embeddings),
        "cka_test": lambda oracle: linear_cka(subject.test.embeddings, oracle.test.embeddings),
    }
    for name, distance in distances.items():
        found[name] = statistics.fmean(map(distance, oracles))
    return found


def _divergence(subject: Answers, oracle: Answers) -> float:
    return float(jensen_shannon(subject.probabilities, oracle.probabilities).mean())


def _check_alike(subject: Sheet, *others: Sheet) -> None:
    for part in ("forget", "retain", "validation", "test", "test_forget"):
        ours: Answers = getattr(subject, part)
        for other in others:
            theirs: Answers = getattr(other, part)
            if ours.logits.shape != theirs.logits.shape or not torch.equal(
                ours.labels, theirs.labels
            ):
                raise InvalidEmbedding(
                    f"Expected answers about the same {part} images and classes, got logits "
                    f"{tuple(ours.logits.shape)} and {tuple(theirs.logits.shape)}, or other labels."
                )
