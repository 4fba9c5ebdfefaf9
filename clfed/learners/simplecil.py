r"""SimpleCIL: cosines with class means, pre-trained (Zhou et al. 2024, arXiv 2303.07338).

.. math:: \hat y = \arg\max_k \cos(f(x), \mu_k)

The claim of the paper is that with a good pre-trained network nothing else is needed. A network
that is first trained on the classes of the first experience (``train=first``) is the adapted half
of the paper's second method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from clfed.backbones.encoder import Transform
from clfed.learners.ncm import NearestClassMean


class SimpleCIL(NearestClassMean):
    """Nearest class mean by cosine, on a network that is taken as it is.

    Args:
        backbone: The network, usually with pre-trained weights.
        transform: Its input transform.
        classifier: What is read off the memory.
        train: ``none`` or ``first``.
        options: Options of :class:`~clfed.learners.ncm.NearestClassMean`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        classifier: Mapping[str, Any] | None = None,
        train: str = "none",
        **options: Any,
    ) -> None:
        chosen = {"name": "ncm_cosine"} if classifier is None else classifier
        super().__init__(backbone, transform, classifier=chosen, train=train, **options)
