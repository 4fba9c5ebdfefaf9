"""Time a node and round on engine=local, and its ratio to Flower's own simulation.

    python tests/benchmarks/engines.py [--nodes 100] [--rounds 10] [--no-ray]

Every node meets 5 classes x 5 shots of ready 64-number embeddings in each round, out of 500
classes; the server waits for all nodes, merges, and sends the merged table with the next round.
Timed are the rounds alone: no start-up, no evaluation.
"""

import argparse
import tempfile
import time
from functools import partial

from clfed.backbones import Encoder, Identity
from clfed.federated import engines
from clfed.federated.field import field_settings, open_field
from clfed.federated.node import briefing
from clfed.federated.rounds import run_rounds
from clfed.prototypes import PrototypeMemory
from clfed.strategies import PrototypeAveraging


def federation(
    nodes: int, rounds: int, cache: str
) -> tuple[PrototypeAveraging, list[float], partial]:
    data = {"_target_": "many_classes.load"}
    scenario = {
        "_target_": "clfed.scenarios.multi_client",
        "nodes": nodes,
        "rounds": rounds,
        "classes_per_mission": 5,
        "shots": 5,
        "replacement": True,
        "test_images": 10,
    }
    settings = field_settings(data, scenario, seed=0)
    open_field(settings)
    encoder = Encoder(Identity(), {"_target_": "clfed.backbones.Identity"}, input_shape=(64,))
    records = briefing({"field": settings, "moments": "none", "cache_dir": cache}, encoder)
    empty = PrototypeMemory.empty(64, encoder.embedding_id)
    strategy = PrototypeAveraging(empty, briefing=records, session="bench", nodes=nodes)
    seconds: list[float] = []
    serve = partial(
        lambda strategy, grid: run_rounds(
            strategy,
            grid,
            strategy.arrays(),
            rounds=rounds,
            timeout=600,
            after=lambda report, arrays: seconds.append(report.seconds),
        ),
        strategy,
    )
    return strategy, seconds, serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-ray", action="store_true")
    options = parser.parse_args()
    times: dict[str, float] = {}
    memories: dict[str, str] = {}
    for name in ("local",) if options.no_ray else ("local", "ray"):
        with tempfile.TemporaryDirectory() as cache:
            strategy, seconds, serve = federation(options.nodes, options.rounds, cache)
            start = time.perf_counter()
            getattr(engines, name)(serve, nodes=options.nodes)
            whole = time.perf_counter() - start
        times[name] = sum(seconds) / (options.nodes * options.rounds) * 1000
        # The first round of a simulation starts its workers, which is not what is compared.
        steady = sum(seconds[1:]) / (options.nodes * max(len(seconds) - 1, 1)) * 1000
        memories[name] = strategy.memory.sha256()
        print(
            f"engine={name:<6} {times[name]:7.3f} ms a node and round "
            f"({steady:.3f} ms after the first round), {whole:.1f} s in all, "
            f"memory {memories[name][:12]}"
        )
    if "ray" in times:
        same = memories["local"] == memories["ray"]
        print(f"Flower's simulation / engine=local: {times['ray'] / times['local']:.1f}x, ", end="")
        print("same memory" if same else "DIFFERENT MEMORY")


if __name__ == "__main__":
    main()
