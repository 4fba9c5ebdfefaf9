r"""Shadow models: trained by the same recipe on known halves of the images.

For :func:`~clfed.evaluation.shadows.lira` they are left as they are. For
:func:`~clfed.evaluation.shadows.u_lira` each of them then unlearns those candidates that it was
trained on, by the method under test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clfed.data.benchmark import ImageSet
from clfed.errors import ConfigError
from clfed.evaluation.unlearning import margins
from clfed.learners.base import ContinualLearner
from clfed.seeding import derive_seed, generator

if TYPE_CHECKING:
    from clfed.unlearning.context import Train

#: Makes a model forget: model, positions that it was trained on and is to forget, and positions
#: that it was trained on and keeps.
Unlearn = Callable[[ContinualLearner, Tensor, Tensor], ContinualLearner]


@dataclass(frozen=True, eq=False)
class Shadows:
    """What shadow models say.

    Attributes:
        margins: ``(S, N)`` float64, log-odds of each model on each image.
        inside: ``(S, N)`` bool, whether a model was trained on an image.
    """

    margins: Tensor
    inside: Tensor


def balanced_halves(models: int, images: int, seed: int) -> Tensor:
    """Assign each image to exactly half of the models, at random.

    Returns:
        ``(models, images)`` bool; with an odd number of models one more is without the image.

    Raises:
        ConfigError: Fewer than two models.
    """
    if models < 2:
        raise ConfigError(f"Expected at least two shadow models, got {models}.")
    draws = torch.rand(models, images, generator=generator(seed, "shadow halves"))
    return draws.argsort(0).argsort(0) < models // 2


def shadow_margins(
    train: Train,
    images: ImageSet,
    models: int,
    seed: int,
    *,
    candidates: Tensor | None = None,
    unlearn: Unlearn | None = None,
    progress: Callable[[int], None] | None = None,
) -> Shadows:
    """Train shadow models and ask them about all images.

    Args:
        train: The recipe.
        images: What they are trained on halves of: the forget set, what stays, and images that the
            target was not trained on.
        models: :math:`S`.
        seed: Of the halves and of the models.
        candidates: ``(M,)`` int64 positions of images whose membership is asked. Only these are
            ever unlearned; None: all.
        unlearn: Given, each model forgets the candidates that it was trained on.
        progress: Told the number of models that are done.

    Raises:
        ConfigError: Fewer than two models.
    """
    inside = balanced_halves(models, len(images), seed)
    asked = torch.ones(len(images), dtype=torch.bool)
    if candidates is not None:
        asked = torch.zeros_like(asked).index_fill(0, candidates, True)
    found = torch.empty(models, len(images), dtype=torch.float64)
    for number, mask in enumerate(inside):
        model = train(images.subset(mask), derive_seed(seed, "shadow", number))
        if unlearn is not None:
            model = unlearn(model, _places(mask & asked), _places(mask & ~asked))
        labels = model.rows(images.classes)[images.labels]
        found[number] = margins(model.scores_of(images.images, closed=False), labels)
        if progress is not None:
            progress(number + 1)
    return Shadows(found, inside)


def _places(mask: Tensor) -> Tensor:
    return mask.nonzero().flatten()
