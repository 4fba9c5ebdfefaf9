r"""Fed3R (Fanì et al. 2024): the ridge regression of all nodes' data, from additive statistics.

.. math:: W = \Big(\sum_k G_k + \lambda I\Big)^{-1} \sum_k B_k, \qquad
          G_k = \sum_i z_i z_i^T, \quad B_k = \sum_i z_i y_i^T

with columns of unit length. :math:`B_k` are the class sums that travel anyway; :math:`G_k` costs
:math:`d (d + 1) / 2` numbers more a message. The solution is the one of the pooled data.
"""

from __future__ import annotations

from typing import Any, ClassVar

from clfed.errors import ConfigError
from clfed.prototypes import PrototypeMemory
from clfed.prototypes.classifiers import ridge
from clfed.prototypes.heads import Classifier
from clfed.strategies.prototype_averaging import PrototypeAveraging
from clfed.strategies.settings import check_rates


class Fed3R(PrototypeAveraging):
    r"""Ridge regression onto one-hot labels.

    Args:
        empty: The empty memory; it keeps second moments.
        moments: Those that are kept, ``shared`` or ``class``; what the empty memory says.
        penalty: :math:`\lambda`, above 0.
        normalise: Whether every class's weights are scaled to unit length.
        options: Of :class:`~clfed.strategies.prototype_averaging.PrototypeAveraging`.

    Raises:
        ConfigError: The memory keeps other second moments, or a setting is out of range.
    """

    leaves: ClassVar[str] = "class names, counts and sums of embeddings, and of their products"

    def __init__(
        self,
        empty: PrototypeMemory,
        *,
        moments: str = "shared",
        penalty: float = 1.0,
        normalise: bool = True,
        **options: Any,
    ) -> None:
        if moments not in ("shared", "class") or empty.moments != moments:
            raise ConfigError(
                f"Fed3R needs memory.moments of shared or class, got {empty.moments}.",
                remedy="Leave memory.moments out of the command: the strategy sets it.",
            )
        check_rates(penalty=penalty)
        if not isinstance(normalise, bool):
            raise ConfigError(f"strategy.normalise must be true or false, got {normalise!r}.")
        if options.get("merge", "pooled") != "pooled":
            raise ConfigError(
                f"Fed3R needs products that add up, which merge={options['merge']} has not.",
                remedy="Leave merge= out.",
            )
        super().__init__(empty, **options)
        self.penalty, self.normalise = penalty, normalise

    def classifier(self) -> Classifier:
        """Return the ridge solution.

        Raises:
            NotEnoughData: Nothing has been merged yet.
        """
        return ridge(self.memory, penalty=self.penalty, normalise=self.normalise)
