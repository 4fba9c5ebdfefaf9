"""Who sees which classes when."""

from clfed.scenarios.missions import (
    Mission,
    MissionPlan,
    class_incremental,
    expected_coverage,
    multi_client,
)

__all__ = ["Mission", "MissionPlan", "class_incremental", "expected_coverage", "multi_client"]
