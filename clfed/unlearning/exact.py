r"""Exact deletion: subtract the forget set from class statistics, and read the answers off them.

.. math:: n_c' = n_c - |F_c|, \qquad S_c' = S_c - \sum_{i \in F_c} q_i, \qquad \mu_c' = S_c' / n_c'

A class without samples disappears. As all sums are integers, the result is bit for bit what a
learner of the same embedding has that never counted the forget set. It is exact for the statistics,
and for whatever a classifier reads off them; the embedding keeps what its training taught it, and
five samples bring a class back. Nearest class means without shared statistics answer every question
as before that they did not answer with a deleted class, and :math:`p'(y) = p(y) / (1 - p(u))` for a
softmax over their negative distances.
"""

from __future__ import annotations

from typing import ClassVar

from clfed.errors import ConfigError, UnsupportedStatistics
from clfed.learners.base import ContinualLearner
from clfed.learners.tables import Head
from clfed.unlearning.base import Unlearner
from clfed.unlearning.context import Context
from clfed.unlearning.needs import Need
from clfed.unlearning.statistics import Statistics


class Exact(Unlearner):
    """Subtract, in closed form; no image and no gradient.

    A learner that answers from a head is made to answer from its class statistics, by their nearest
    mean. The head, which was trained with the forget set, starts anew.

    Args:
        learner: The original, with a memory.
        options: Options of :class:`~clfed.unlearning.base.Unlearner`; none of them counts.

    Attributes:
        statistics: The class statistics that are left, after :meth:`solve`.
    """

    needs: ClassVar[Need] = Need.CLASS_STATS
    schedule = "none"
    exact = True
    scope = (
        "class statistics and what is read off them; the embedding keeps what training taught it"
    )
    reads: ClassVar[str] = "memory"
    statistics: Statistics | None = None

    def check_request(self, context: Context) -> None:
        """Refuse learners whose answers do not come from class statistics alone.

        Raises:
            ConfigError: The learner keeps no class statistics, or answers from more than them.
        """
        learner = self.learner
        name = f"learner={learner.method or type(learner).__name__}"
        if learner.moments is None:
            raise ConfigError(
                f"unlearner=exact subtracts class statistics, but {name} keeps none.",
                remedy="Set learner.moments=none (sums alone), shared or class, or choose "
                "learner=ncm.",
            )
        if _reads_more(learner):
            raise ConfigError(
                f"unlearner=exact needs answers that come from class statistics alone, but {name} "
                f"also uses {', '.join(learner.kept) or 'tables of its own'}.",
                remedy="Choose learner=ncm or slda; for learner=ranpac also fix learner.penalty.",
            )
        super().check_request(context)

    def prepare(self, context: Context) -> None:
        """Refuse statistics of another state of the learner.

        Raises:
            UnsupportedStatistics: There are none, or they are not those that it answers from.
        """
        if context.statistics is None or context.statistics.total != self.learner.memory:
            raise UnsupportedStatistics(
                "Expected the class statistics of this state of the learner, got "
                f"{'none' if context.statistics is None else 'those of another'}.",
                remedy="Make them anew from the images that the learner still knows.",
            )

    def solve(self, context: Context) -> None:
        """Subtract."""
        before = context.statistics
        assert before is not None  # prepare has seen it
        context.guard.touch(Need.CLASS_STATS, context.forget.ids)
        self.statistics = after = before.forget(context.request, context.forget.ids)
        self.learner.memory = after.total
        self.learner.classifier = self.learner.classifier or {"name": "ncm"}
        self.lineage = {
            "account": str(after.deletion),
            "statistics_from": before.total.sha256(),
            "statistics_to": after.total.sha256(),
        }

    def finalize(self, context: Context) -> None:
        """Keep the statistics, and drop what else was made with the forget set."""
        memory, head = self.learner.memory, self.learner.head
        super().finalize(context)
        self.learner.memory = memory
        self.learner.head = Head(
            self.learner.dim, head.kind, temperature=head.temperature, seed=head.seed
        )
        self.learner.head.adopt(head.classes)


def _reads_more(learner: ContinualLearner) -> bool:
    kind, base = type(learner), ContinualLearner
    reads_kept = kind.read is not base.read or kind.reading is not base.reading
    return kind.scores is not base.scores or (reads_kept and bool(learner.kept))
