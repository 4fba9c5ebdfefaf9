r"""FedCOF (Goswami et al. 2025, arXiv 2412.14326): covariance at the price of class means.

The head of :func:`clfed.prototypes.classifiers.message_mean_covariance`: the spread of the class
means that came in different messages estimates the covariance within a class, so the messages are
those of FedNCM. A group is what one message brought, so a node that meets a class on several
missions adds several groups. Once something was deleted the parts of single messages are no longer
known, and what each node holds by now is a group.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord

from clfed.errors import ConfigError
from clfed.prototypes import PrototypeMemory
from clfed.prototypes.classifiers import message_mean_covariance
from clfed.prototypes.groups import groups_of
from clfed.prototypes.heads import Classifier
from clfed.strategies.prototype_averaging import PrototypeAveraging
from clfed.strategies.settings import check_rates


class FedCOF(PrototypeAveraging):
    r"""Linear head with the covariance of message means.

    Args:
        empty: The empty memory.
        shrinkage: :math:`\gamma`, above 0.
        relative: Whether it is in units of the mean variance that the messages show; else it is in
            squared units of the embedding, as in the paper, where 1 suits one network and 0.1
            another.
        options: Of :class:`~clfed.strategies.prototype_averaging.PrototypeAveraging`.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(
        self,
        empty: PrototypeMemory,
        *,
        shrinkage: float = 5.0,
        relative: bool = True,
        **options: Any,
    ) -> None:
        check_rates(shrinkage=shrinkage)
        if not isinstance(relative, bool):
            raise ConfigError(f"strategy.relative must be true or false, got {relative!r}.")
        if options.get("merge", "pooled") != "pooled":
            raise ConfigError(
                f"FedCOF needs groups that add up, which merge={options['merge']} does not.",
                remedy="Leave merge= out.",
            )
        super().__init__(empty, **options)
        self.shrinkage, self.relative = shrinkage, relative
        self._parts = [self.ledger.total]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge, and note what each message brought."""
        merged = super().aggregate_train(server_round, replies)
        self._parts += self.last.deltas.values()
        return merged

    def classifier(self) -> Classifier:
        """Return the head.

        Raises:
            NotEnoughData: Nothing has been merged yet.
        """
        first, *later = self._parts
        grown = all(bool((part.counts > 0).all()) for part in self._parts)
        # The ledger may also have forgotten something without any message.
        known = grown and sum(later, first) == self.memory
        groups = groups_of(self.memory, self._parts) if known else self.ledger.groups()
        return message_mean_covariance(
            self.memory, groups, shrinkage=self.shrinkage, relative=self.relative
        )
