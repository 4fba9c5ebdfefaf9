"""Flower server strategies, one a file; each works in any Flower app of the message API."""

if __name__ == "strategies":
    raise ImportError("Import these modules as clfed.strategies, so that each class exists once.")

from clfed.strategies.fed3r import Fed3R
from clfed.strategies.fedavg import FedAvg
from clfed.strategies.fedcof import FedCOF
from clfed.strategies.fedncm import FedNCM
from clfed.strategies.fedprox import FedProx
from clfed.strategies.prototype_averaging import PrototypeAveraging, RoundSummary

__all__ = [
    "Fed3R",
    "FedAvg",
    "FedCOF",
    "FedNCM",
    "FedProx",
    "PrototypeAveraging",
    "RoundSummary",
]
