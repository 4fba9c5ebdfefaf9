r"""Plain fine-tuning on what is there now, the lower bound of every comparison.

.. math:: L = \mathrm{CE}(W f(x) + b,\; y)
"""

from __future__ import annotations

from clfed.learners.base import ContinualLearner


class Naive(ContinualLearner):
    """Train on each experience as if there had been no other."""
