"""Who sees which classes when."""

from clfed.scenarios.base_shares import base_shares
from clfed.scenarios.dirichlet import dirichlet
from clfed.scenarios.domains import permuted, rotated
from clfed.scenarios.few_shot import few_shot
from clfed.scenarios.missions import Mission, MissionPlan
from clfed.scenarios.online import online
from clfed.scenarios.power_law import power_law, rehearsal_probabilities
from clfed.scenarios.reconnaissance import class_incremental, expected_coverage, multi_client
from clfed.scenarios.split import split
from clfed.scenarios.streams import Experience, Setting, Stream

__all__ = [
    "Experience",
    "Mission",
    "MissionPlan",
    "Setting",
    "Stream",
    "base_shares",
    "class_incremental",
    "dirichlet",
    "expected_coverage",
    "few_shot",
    "multi_client",
    "online",
    "permuted",
    "power_law",
    "rehearsal_probabilities",
    "rotated",
    "split",
]
