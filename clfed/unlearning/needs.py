"""What an unlearner may touch, declared before it runs and enforced while it does."""

from __future__ import annotations

from enum import Flag, auto


class Need(Flag):
    """Kinds of data. A method's set of needs is part of its promise, and goes into its report."""

    NOTHING = 0
    #: Images to be forgotten, and which rows of the classes they are labelled with.
    FORGET_X = auto()
    FORGET_Y = auto()
    #: Images that stay, and their labels.
    RETAIN_X = auto()
    RETAIN_Y = auto()
    #: Images of another data set, without labels.
    OOD_X = auto()
    #: Counts and sums of embeddings, by contributor and class.
    CLASS_STATS = auto()
    #: How the model came about: its recipe, shards, checkpoints.
    HISTORY = auto()
    #: Images that were held out of the training, to choose and to stop by.
    EVAL = auto()

    FORGET = FORGET_X | FORGET_Y
    RETAIN = RETAIN_X | RETAIN_Y


def names(needs: Need) -> list[str]:
    """Return the single needs in a set, in the words of tables.

    Example:
        >>> names(Need.FORGET | Need.OOD_X)
        ['forget images', 'forget labels', 'other images']
    """
    return [_WORDS[need] for need in needs]


_WORDS = {
    Need.FORGET_X: "forget images",
    Need.FORGET_Y: "forget labels",
    Need.RETAIN_X: "retain images",
    Need.RETAIN_Y: "retain labels",
    Need.OOD_X: "other images",
    Need.CLASS_STATS: "class statistics",
    Need.HISTORY: "training history",
    Need.EVAL: "held-out images",
}
