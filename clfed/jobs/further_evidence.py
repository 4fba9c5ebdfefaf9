"""Evidence that takes further trainings: relearning, likelihood-ratio attacks, KLOM."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clfed.data.benchmark import ImageSet
from clfed.evaluation.challenge import challenge_score
from clfed.evaluation.relearning import anamnesis_index, relearn_steps
from clfed.evaluation.shadow_models import shadow_margins
from clfed.evaluation.shadows import (
    attack_summary,
    klom,
    klom_floor,
    lira,
    summarised,
    u_lira,
)
from clfed.evaluation.unlearning import accuracy, margins
from clfed.jobs.unlearning import Outcome
from clfed.jobs.unlearning_exam import Examiner
from clfed.jobs.unlearning_stage import Stage
from clfed.learners.base import ContinualLearner
from clfed.seeding import derive_seed

if TYPE_CHECKING:
    from omegaconf import DictConfig

Found = dict[str, dict[str, float]]


def further_evidence(cfg: DictConfig, exam: Examiner, final: Outcome, number: int) -> Found:
    """Compute what the settings ask for.

    Args:
        cfg: The resolved configuration; ``job.relearn``, ``job.shadows`` and ``job.klom`` count.
        exam: Who asked the models.
        final: The outcome to be judged, of the first seeds.
        number: Of its request.

    Returns:
        For each measure its value of the ``method``, and of the ``oracle`` where it has one.
    """
    found: Found = {}
    stage = exam.stage
    if cfg.job.relearn and stage.unlearner_class.reads == "head":
        found |= _relearning(cfg.job.relearn, stage, final, number)
    if cfg.job.shadows is not None:
        found |= _likelihood_ratios(cfg.job.shadows, stage, final, number)
    if cfg.job.klom is not None:
        found |= _many_models(cfg.job.klom, exam, number)
    return found


def _relearning(most: int, stage: Stage, final: Outcome, number: int) -> Found:
    gone, stays = stage.part(final.gone), stage.staying(number)
    target = accuracy(final.before.forget)
    seed = derive_seed(stage.cfg.seed, "relearning")

    def steps(learner: ContinualLearner) -> int:
        return relearn_steps(learner, gone, stays, target=target, most=most, seed=seed)

    oracles = [steps(stage.oracle(number, one)[0]) for one in stage.seeds["oracle"]]
    mean = statistics.fmean(oracles)
    if not mean:  # they know the forget set well enough without having seen it
        return {}
    return {"ain": {"method": anamnesis_index(steps(final.after), mean), "oracle": 1.0}}


def _likelihood_ratios(models: int, stage: Stage, final: Outcome, number: int) -> Found:
    """Attack the first run with shadow models, left alone (LiRA) and after unlearning (U-LiRA)."""
    parts = stage.part(final.gone), stage.others(number), stage.staying(number)
    images = _joined(*parts)
    asked = len(parts[0]) + len(parts[1])
    members = np.arange(asked) < len(parts[0])
    seed = derive_seed(stage.cfg.seed, "shadows")
    target = _margins(final.after, images)[:asked]
    never = stage.reading(stage.oracle(number, stage.seeds["oracle"][0])[0])
    oracle = _margins(never, images)[:asked]
    found: Found = {}
    for name, attack, unlearns in (("lira", lira, False), ("u_lira", u_lira, True)):
        with stage.track.phase(f"shadow models, {name}", models) as bar:
            shadows = shadow_margins(
                stage.trained,
                images,
                models,
                seed,
                candidates=torch.arange(asked),
                unlearn=(lambda m, f, k: stage.unlearned(m, images, f, k, number))
                if unlearns
                else None,
                progress=bar.update,
            )
        said = shadows.margins[:, :asked].numpy(), shadows.inside[:, :asked].numpy()
        for key, side in (("method", target), ("oracle", oracle)):
            summary = attack_summary(attack(*said, side.numpy(), shared_variance=True), members)
            found.setdefault(f"{name}_auc", {})[key] = summary["auc"]
            found.setdefault(f"{name}_tpr", {})[key] = summary["tpr_at_1"]
    return found


def _many_models(models: int, exam: Examiner, number: int) -> Found:
    """Compare margins of many unlearned models with those of many retrained ones."""
    stage = exam.stage
    seeds = [derive_seed(stage.cfg.seed, "klom", index) for index in range(models)]
    ours, theirs = [], []
    with stage.track.phase("pairs of models", models) as bar:
        for index, seed in enumerate(seeds, 1):
            start = stage.start(derive_seed(seed, "original"))[0]
            ours.append(exam.sheet(stage.carried_out(start, number, seed), number))
            oracle = stage.oracle(number, derive_seed(seed, "oracle"))[0]
            theirs.append(exam.sheet(stage.reading(oracle), number))
            bar.update(index)
    found: Found = {}
    for part in ("forget", "retain", "validation"):
        a, b = (
            torch.stack([margins(said.logits, said.labels) for said in parts]).numpy()
            for parts in ([getattr(sheet, part) for sheet in side] for side in (ours, theirs))
        )
        found[f"klom_{part}"] = {
            "method": summarised(klom(a, b))["mean"],
            "oracle": summarised(klom_floor(b))["mean"],
        }
        if part == "forget":
            retain, test = (
                tuple(
                    statistics.fmean(accuracy(getattr(sheet, kind)) for sheet in side)
                    for side in (ours, theirs)
                )
                for kind in ("retain", "test")
            )
            found["challenge"] = {
                "method": challenge_score(
                    a, b, retain=(retain[0], retain[1]), test=(test[0], test[1])
                )
            }
    return found


def _margins(learner: ContinualLearner, images: ImageSet) -> Tensor:
    labels = learner.rows(images.classes)[images.labels]
    return margins(learner.scores_of(images.images, closed=False), labels)


def _joined(*parts: ImageSet) -> ImageSet:
    return ImageSet(
        torch.cat([part.images for part in parts]),
        torch.cat([part.labels for part in parts]),
        parts[0].classes,
    )
