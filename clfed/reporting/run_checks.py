"""Whether the results of a job hold what its table shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from clfed.errors import RunFolderError

Numbers = Sequence[object]


def _check_continual(results: Mapping[str, Any]) -> None:
    learner = results.get("learner")
    name = learner.get("name") if isinstance(learner, Mapping) else None
    if not isinstance(name, str) or name not in results["final"]["accuracy"]:
        raise RunFolderError("results.json: expected the learner and its final accuracy.")
    assert isinstance(learner, Mapping)
    parts = [learner.get("stored", {}), results.get("continual", {}), results.get("stability", {})]
    if not all(isinstance(part, Mapping) for part in parts):
        raise RunFolderError("results.json: expected objects as learner.stored and continual.")
    stored, metrics, stability = parts
    numbers = [*stored.values(), *metrics.values(), learner.get("images_kept", 0)]
    numbers.append(stability.get("wc_acc", 0.0))
    if not all(map(_is_number, numbers)):
        raise RunFolderError("results.json: expected numbers in learner.stored and continual.")


def _check_unlearning(results: Mapping[str, Any]) -> None:
    try:
        found = results["unlearning"]
        numbers = [found["cost"][key] for key in ("seconds", "oracle_seconds", "ratio")]
        numbers += [run["original_seed"] for run in found["runs"]]
        spreads = [found["cost"]["spread"]]
        for part in ("measures", "original", "oracle"):
            numbers += [measure["mean"] for measure in found[part].values()]
            spreads += [v for m in found[part].values() for k, v in m.items() if k != "mean"]
        numbers += [spread for spread in spreads if spread is not None]
        texts = [request[key] for request in results["requests"] for key in ("kind", "what")]
        texts += [results["unlearner"][key] for key in ("name", "scope")]
        texts += found["ideals"].values()
        sound = all(map(_is_number, numbers)) and all(isinstance(text, str) for text in texts)
    except (AttributeError, KeyError, TypeError):
        sound = False
    if not sound:
        raise RunFolderError(
            "results.json: expected the unlearner, its requests, and its measures and cost in "
            "numbers beside those of original and oracle."
        )


def _federated(results: Mapping[str, Any]) -> tuple[Numbers, Numbers]:
    final = results["final"]
    return [final["accuracy"][key] for key in ("union", "own")], [final["forgetting"]]


def _embedding(results: Mapping[str, Any]) -> tuple[Numbers, Numbers]:
    found = dict(results["final"]["accuracy"])
    found |= results["replacement"]["accuracy"] if "replacement" in results else {}
    return [*found.values()], []


def _check_method(
    measured: Callable[[Mapping[str, Any]], tuple[Numbers, Numbers]], results: Mapping[str, Any]
) -> None:
    """Refuse results without the method, its costs, or what is measured of it.

    Args:
        measured: Returns what must be numbers, and what may be None instead.
        results: Content of ``results.json``.
    """
    try:
        method, final = results["method"], results["final"]
        numbers, some = measured(results)
        numbers = [*numbers, *(final["bytes"][key] for key in ("up", "down"))]
        numbers += [final["node_seconds"]]
        some = [*some, final["peak_bytes"], method.get("epsilon")]
        texts = [method["name"], method["leaves"]]
        sound = (
            isinstance(method["options"], Mapping)
            and all(map(_is_number, numbers))
            and all(value is None or _is_number(value) for value in some)
            and all(isinstance(text, str) for text in texts)
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise RunFolderError(
            "results.json: expected the method, what leaves a node, and accuracies, forgetting if "
            "it is measured, bytes, seconds and memory in numbers."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


#: What a job's results must hold beside what all results hold.
CHECKS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "continual": _check_continual,
    "unlearning": _check_unlearning,
    "federated": partial(_check_method, _federated),
    "embedding": partial(_check_method, _embedding),
}
