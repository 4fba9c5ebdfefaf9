r"""Nearest class mean on a network that is frozen: the simplest learner that cannot forget.

.. math:: \mu_k = s_k / n_k, \qquad \hat y = \arg\min_k \|f(x) - \mu_k\|^2

(Mensink et al. 2013; the classifier of prototypical networks, Snell et al. 2017, arXiv 1703.05175.)
With ``transductive``, all questions of a batch are answered together by Laplacian clustering that
starts from the means (Ziko et al. 2021, arXiv 2106.09516); see
:mod:`clfed.prototypes.transductive`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from clfed.backbones.encoder import Transform
from clfed.errors import ConfigError
from clfed.learners.frozen import FrozenLearner
from clfed.prototypes import Classifier, LinearClassifier, PrototypeMemory
from clfed.prototypes.transductive import Laplacian, TransductiveClassifier

NEAREST = ("ncm", "ncm_cosine", "teen")


class NearestClassMean(FrozenLearner):
    """Remember the exact mean of every class; train the network on the first experience at most.

    Args:
        backbone: The network.
        transform: Its input transform.
        classifier: What is read off the memory; ``{name: ncm, metric: cosine}`` for cosines.
        transductive: Options of :class:`~clfed.prototypes.transductive.Laplacian`; None answers
            one by one.
        options: Options of :class:`~clfed.learners.frozen.FrozenLearner`.

    Raises:
        ConfigError: Only a nearest class mean can be made transductive, or an option of it does
            not exist.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        *,
        classifier: Mapping[str, Any] | None = None,
        transductive: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        chosen = {"name": "ncm"} if classifier is None else classifier
        super().__init__(backbone, transform, classifier=chosen, **options)
        self.transductive = transductive is not None
        if self.transductive and chosen["name"] not in NEAREST:
            raise ConfigError(
                f"learner.transductive goes with a classifier of {NEAREST}, got {chosen['name']!r}."
            )
        try:
            self.clustering = Laplacian(**(transductive or {}))
        except TypeError as error:
            raise ConfigError(f"learner.transductive does not fit: {error}.") from error

    def read(self, memory: PrototypeMemory) -> Classifier:
        """Make the classifier, for single questions or for batches of them."""
        inductive = super().read(memory)
        if not self.transductive:
            return inductive
        assert isinstance(inductive, LinearClassifier)  # all of NEAREST are
        counts = memory.counts[memory.rows(inductive.classes)]
        return TransductiveClassifier(inductive, counts, self.clustering)
