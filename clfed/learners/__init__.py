"""Learners: one file a method, its paper and its equation at the top."""

from clfed.learners.base import EmbeddingLearner
from clfed.learners.cross_entropy import CrossEntropy
from clfed.learners.fine_tuning import FineTuning
from clfed.learners.protonet import PrototypicalNetwork

__all__ = ["CrossEntropy", "EmbeddingLearner", "FineTuning", "PrototypicalNetwork"]
