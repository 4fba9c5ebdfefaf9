"""Time of one merge round of two real nodes on this machine, beside Flower's own no-op round.

    python tests/benchmarks/merge_round.py [--rounds 5]

Both run in turn inside one Flower run, over TLS, keys and the gate. A round of Flower's own
strategies is two exchanges, train and evaluate; so is a merge round, which gathers new rows (each
node has one new picture) and distributes the merged memory. Flower's no-op round uses its own
``send_and_receive``; the second no-op collects replies as clfed does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    sys.path.insert(0, str(HERE.parent))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])
    os.environ["MERGE_ROUND_ROUNDS"] = str(rounds)
    from deployments import Deployment
    from federations import folders

    from clfed.deploy import flower_run, superlink
    from clfed.deploy.address import parse_address
    from clfed.deploy.pace import Pace

    flower_run._APP = flower_run._APP.replace(
        "clfed.federated.server_app:app", "merge_round_app:server"
    ).replace("clfed.federated.client_app:app", "merge_round_app:client")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["MERGE_ROUND_ROOT"] = folder
        folders(root / "pictures", {"a": ("owl", "fox"), "b": ("fox", "elk")}, pictures=20)
        deployment = Deployment(root, ["a", "b"])
        try:
            for name in "ab":
                deployment.join(name)
            pace = Pace(nodes=2, rounds=10**6)
            try:
                superlink.serve(deployment.federation(), pace, parse_address(deployment.address))
            except Exception as error:
                if not (root / "times.json").exists():
                    raise SystemExit(f"{error}\n{deployment.log('a')}") from error
            times = json.loads((root / "times.json").read_text())
        finally:
            deployment.close()
    middle = {name: statistics.median(values[1:]) for name, values in times.items()}
    print(f"median of {rounds - 1} rounds, the first left out")
    for name, seconds in middle.items():
        print(f"{name:<46}{seconds:7.2f} s")
    own = middle["Flower's own no-op round"]
    print(f"merge round / Flower's own no-op round: {middle['merge round'] / own:.2f}")
    fast = middle["no-op round, replies collected as clfed does"]
    print(f"merge round / no-op round collected alike: {middle['merge round'] / fast:.2f}")


if __name__ == "__main__":
    main()
