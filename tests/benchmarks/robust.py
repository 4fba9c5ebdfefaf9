"""Time the robust totals of a ledger, as ratios to adding its rows up exactly.

    python tests/benchmarks/robust.py [--nodes 100] [--classes 600] [--dim 256] [--threads 2]

Every node holds every class, the largest table of that many nodes; the norm is so small that each
row has to be shortened.
"""

import argparse
import statistics
import time

import torch

from clfed.prototypes import Contribution, ContributorLedger, PrototypeMemory
from clfed.prototypes.robust import robust_total
from clfed.prototypes.shares import sum_of


def filled(nodes: int, classes: int, dim: int) -> ContributorLedger:
    names = [f"class {c:04d}" for c in range(classes)]
    rng = torch.Generator().manual_seed(0)
    ledger = ContributorLedger(dim, "bench")
    for node in range(nodes):
        rows = PrototypeMemory.empty(dim, "bench").observe(
            torch.randn(classes, dim, generator=rng), names
        )
        ledger.receive(Contribution.of(f"node {node:03d}", 1, rows))
    return ledger


def seconds(work, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--classes", type=int, default=600)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ledger = filled(options.nodes, options.classes, options.dim)
    zero = PrototypeMemory.empty(options.dim, "bench")
    shares = [ledger.share(name) for name in ledger.contributors]
    exact = seconds(lambda: sum_of(zero, shares))
    print(f"exact sum {1e3 * exact:8.1f} ms")
    for rule, norm in (("none", 1.0), ("median", None), ("trimmed", None), ("trimmed", 1.0)):
        took = seconds(lambda rule=rule, norm=norm: robust_total(ledger, rule, norm=norm))
        print(f"{rule:8} norm={norm!s:5} {1e3 * took:8.1f} ms {took / exact:6.2f} x")


if __name__ == "__main__":
    main()
