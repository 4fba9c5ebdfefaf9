"""The Flower apps of ``merge_round.py``: clfed's own, with a no-op beside them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from clfed.federated.client_app import app

server = ServerApp()
client = app
_NOTHING = RecordDict({"nothing": ConfigRecord({"x": 1})})


@client.train("noop")
def train(message: Message, context: Context) -> Message:
    return Message(_NOTHING, reply_to=message)


@client.evaluate("noop")
def evaluate(message: Message, context: Context) -> Message:
    return Message(_NOTHING, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    from filelock import FileLock

    from clfed.deploy.federation import Federation
    from clfed.deploy.flower_run import Places
    from clfed.deploy.pace import Pace
    from clfed.deploy.serving import Server
    from clfed.federated.grid import Mailbox

    root = Path(os.environ["MERGE_ROUND_ROOT"])
    federation = Federation.open(Path(str(context.run_config["federation"])))
    with FileLock(Places(federation).running):
        running = Server(federation, federation.store(), grid, Pace(nodes=2))
        running._wait_for_nodes()
        running.round()
        times: dict[str, list[float]] = {}
        parts = {"gather": running._gather, "distribute": running._distribute}
        for name, part in parts.items():
            setattr(running, f"_{name}", timed(times, f"  of it {name}", part))
        ids = sorted(grid.get_node_ids())

        def messages(kind: str) -> list[Message]:
            return [Message(_NOTHING, node, f"{kind}.noop") for node in ids]

        def flowers_own() -> None:
            for kind in ("train", "evaluate"):
                assert len(list(grid.send_and_receive(messages(kind), timeout=60))) == len(ids)

        def collected_alike() -> None:
            for kind in ("train", "evaluate"):
                assert len(Mailbox(grid).exchange(messages(kind), timeout=60)) == len(ids)

        for number in range(int(os.environ["MERGE_ROUND_ROUNDS"])):
            timed(times, "Flower's own no-op round", flowers_own)()
            timed(times, "no-op round, replies collected as clfed does", collected_alike)()
            for name in "ab":
                from federations import draw

                draw(root / "pictures" / name / "fox" / f"n{number}.png", 1000 + number)
            report = timed(times, "merge round", running.round)()
            assert report is not None and report.answered == len(ids)
        (root / "times.json").write_text(json.dumps(times))


def timed(times, name, act):
    def run(*arguments):
        start = time.perf_counter()
        found = act(*arguments)
        times.setdefault(name, []).append(time.perf_counter() - start)
        return found

    return run
