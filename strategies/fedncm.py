r"""FedNCM (Legate et al. 2023, arXiv 2306.03937): a head of unit class means, without training.

.. math:: w_c = \mu_c / \|\mu_c\|, \qquad \mu_c = \sum_k S_{k,c} / \sum_k n_{k,c}

The same messages as prototype averaging; only what is read off them differs.
"""

from __future__ import annotations

from clfed.prototypes.classifiers import nearest_mean
from clfed.prototypes.heads import Classifier
from clfed.strategies.prototype_averaging import PrototypeAveraging


class FedNCM(PrototypeAveraging):
    """Nearest class mean by cosine."""

    def classifier(self) -> Classifier:
        """Return the head of unit class means.

        Raises:
            NotEnoughData: Nothing has been merged yet.
        """
        return nearest_mean(self.memory, metric="cosine")
