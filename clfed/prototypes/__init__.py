"""Class statistics as an exact algebra, and the classifiers that are read off them."""

from clfed.prototypes.classifiers import (
    CLASSIFIERS,
    Classifier,
    LinearClassifier,
    QuadraticClassifier,
    read_off,
)
from clfed.prototypes.compression import Compressed, compress, expand
from clfed.prototypes.features import RandomProjection, tukey
from clfed.prototypes.groups import Groups, groups_of
from clfed.prototypes.ledger import Contribution, ContributorLedger, Receipt
from clfed.prototypes.memory import RESOLUTION, Moments, PrototypeMemory
from clfed.prototypes.merging import MERGES
from clfed.prototypes.sketch import Sketch

__all__ = [
    "CLASSIFIERS",
    "MERGES",
    "RESOLUTION",
    "Classifier",
    "Compressed",
    "Contribution",
    "ContributorLedger",
    "Groups",
    "LinearClassifier",
    "Moments",
    "PrototypeMemory",
    "QuadraticClassifier",
    "RandomProjection",
    "Receipt",
    "Sketch",
    "compress",
    "expand",
    "groups_of",
    "read_off",
    "tukey",
]
