"""Flower server strategies, one a file; each works in any Flower app of the message API."""

if __name__ == "strategies":
    raise ImportError("Import these modules as clfed.strategies, so that each class exists once.")

from clfed.strategies.fed3r import Fed3R
from clfed.strategies.fedavg import FedAvg
from clfed.strategies.fedcof import FedCOF
from clfed.strategies.fedncm import FedNCM
from clfed.strategies.fedproto import FedProto
from clfed.strategies.fedprox import FedProx
from clfed.strategies.fedre import FedRE
from clfed.strategies.local import LocalOnly
from clfed.strategies.mfcl import MFCL
from clfed.strategies.prototype_averaging import PrototypeAveraging, RoundSummary
from clfed.strategies.target import TARGET

__all__ = [
    "MFCL",
    "TARGET",
    "Fed3R",
    "FedAvg",
    "FedCOF",
    "FedNCM",
    "FedProto",
    "FedProx",
    "FedRE",
    "LocalOnly",
    "PrototypeAveraging",
    "RoundSummary",
]
