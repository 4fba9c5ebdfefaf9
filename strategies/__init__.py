"""Flower server strategies, one a file; each works in any Flower app of the message API."""

if __name__ == "strategies":
    raise ImportError("Import these modules as clfed.strategies, so that each class exists once.")

from clfed.strategies.fedavg import GrowingHeadFedAvg
from clfed.strategies.prototype_averaging import PrototypeAveraging, RoundSummary

__all__ = ["GrowingHeadFedAvg", "PrototypeAveraging", "RoundSummary"]
