"""SCAR self-forget (Bonato et al. 2024, arXiv 2404.12922): a class goes, none of it is seen.

Of images of another data set, those that the original takes for the class play the part of what
goes, and all others protect what stays. Training stops when they are taken for the class no more;
public code asks the true forget images instead, which is not to forget without them.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from clfed.errors import ConfigError
from clfed.unlearning.context import Context
from clfed.unlearning.needs import Need
from clfed.unlearning.pools import Pool
from clfed.unlearning.scar import Scar


class ScarSelf(Scar):
    """SCAR with other images that look like the class to the original; classes only."""

    needs: ClassVar[Need] = Need.OOD_X | Need.CLASS_STATS

    def check_request(self, context: Context) -> None:
        """Refuse anything but a request of classes.

        Raises:
            ConfigError: Something else is to be forgotten.
        """
        if context.request.kind != "class":
            raise ConfigError(
                f"unlearner={self.method or type(self).__name__} forgets classes, got a request "
                f"to forget a {context.request.kind}.",
                remedy="Choose unlearner=scar, which looks at the samples themselves.",
            )
        super().check_request(context)

    def going(self, context: Context, seen: Tensor) -> Pool:
        """Return the other images that the original takes for the class, with that as label."""
        rows = torch.isin(seen, context.forgotten_rows).nonzero().flatten()
        if not len(rows):
            raise ConfigError(
                "Expected other images (job.ood) that the original takes for "
                f"{', '.join(context.request.classes)}, got none."
            )
        self.taken_for = seen[rows]
        return context.ood.part(rows)

    def labels(self, context: Context) -> Tensor:
        """What the original takes these images for."""
        return self.taken_for

    def recognised(self) -> float:
        """Share of these images that are still taken for the class."""
        assert self.batches is not None
        images = self.batches.pools["forget"].images
        answers = self.learner.scores_of(images, closed=False).argmax(1)
        return float(torch.isin(answers, self.context.forgotten_rows).double().mean())
