r"""Bad Teacher (Chundawat et al. 2023, arXiv 2205.08096): one teacher each for what goes and stays.

.. math:: L = \mathrm{KL}\big(t(x) \,\|\, p(x)\big), \qquad
          t(x) = p_{random}(x) \text{ on } D_f, \quad p_o(x) \text{ on a share of } D_r

Both teachers say what they think of an image, so no label is looked at. A random teacher answers
nearly alike for all images: afterwards the images that go get nearly even outputs, which a class
that goes wants, and which single samples of a class that stays do not look like.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from clfed.learners.losses import soft_divergence
from clfed.unlearning.base import Unlearner
from clfed.unlearning.context import Context
from clfed.unlearning.distillation import stranger
from clfed.unlearning.needs import Need
from clfed.unlearning.pools import ById
from clfed.unlearning.schedules import Batches


class BadTeacher(Unlearner):
    """Distil a random network on what goes and the original on what stays."""

    needs: ClassVar[Need] = Need.FORGET_X | Need.RETAIN_X
    schedule = "concat"

    def prepare(self, context: Context) -> None:
        """Ask both teachers once about all images that will be shown."""
        assert self.batches is not None
        retain = self.batches.pools["retain"]
        noise = stranger(self.teacher, self.seed).scores_of(context.forget.images)
        known = self.teacher.scores_of(retain.images)
        self.targets = ById(torch.cat([context.forget.ids, retain.ids]), torch.cat([noise, known]))

    def loss(self, batch: Batches) -> Tensor:
        """Divergence from each image's teacher, over all images of the batch."""
        images = torch.cat([part.images for part in batch.values()])
        ids = torch.cat([part.ids for part in batch.values()])
        return soft_divergence(self.targets[ids], self.logits(images))
