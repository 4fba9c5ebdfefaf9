"""Run the experiment of a golden file again and write its numbers anew.

    python tests/golden/regenerate.py digits_reconnaissance

A golden file is JSON: ``command`` (this one), ``overrides`` (the configuration) and ``metrics``: by
its place in ``results.json``, a ``value`` and the ``tolerance`` that other machines may need.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def read(name: str) -> dict[str, Any]:
    """Return a golden file."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def measure(golden: dict[str, Any], folder: Path) -> dict[str, float]:
    """Run a golden file's experiment in a folder and return its metrics."""
    from clfed.config import compose
    from clfed.jobs import reconnaissance

    places = [f"run_dir={folder / 'run'}", f"cache_dir={folder / 'cache'}", "logger=none"]
    path = reconnaissance.run(compose([*golden["overrides"], *places]))
    results = json.loads((path / "results.json").read_text(encoding="utf-8"))
    return {name: _at(results, name) for name in golden["metrics"]}


def _at(results: Any, name: str) -> float:
    for part in name.split("/"):
        results = results[int(part) if isinstance(results, list) else part]
    return results


def main(name: str) -> None:
    """Measure and write; tolerances stay."""
    golden = read(name)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(golden, Path(folder))
    for metric, value in measured.items():
        golden["metrics"][metric]["value"] = value
    text = json.dumps(golden, indent=2) + "\n"
    (HERE / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    # Started by its path, a script sees its own folder and not the checkout.
    sys.path.insert(0, str(HERE.parent.parent))
    main(*sys.argv[1:])
