"""Learners: one file a method, its paper and its equation at the top.

A method is found by the ``_target_`` of its file in ``conf/learner``; it need not be listed here.
"""

from clfed.learners.base import ContinualLearner, LossTerm, Step
from clfed.learners.cross_entropy import CrossEntropy
from clfed.learners.fine_tuning import FineTuning
from clfed.learners.protonet import PrototypicalNetwork

__all__ = [
    "ContinualLearner",
    "CrossEntropy",
    "FineTuning",
    "LossTerm",
    "PrototypicalNetwork",
    "Step",
]
