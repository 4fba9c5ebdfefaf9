"""Unlearners: methods that make a trained model forget, each one file and one YAML.

``base`` is the contract, ``context`` what a method may look at, ``running`` one request through
one method. Methods are built from ``conf/unlearner``.
"""

from clfed.unlearning.base import Unlearner
from clfed.unlearning.context import Context, History, make_context
from clfed.unlearning.needs import Need
from clfed.unlearning.report import Report
from clfed.unlearning.requests import Request
from clfed.unlearning.running import forget

__all__ = ["Context", "History", "Need", "Report", "Request", "Unlearner", "forget", "make_context"]
