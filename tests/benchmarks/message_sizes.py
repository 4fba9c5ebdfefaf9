"""Accuracy against bytes for rounded and sketched messages.

    python tests/benchmarks/message_sizes.py [--root data] [--seeds 3] [--encoder FILE] [--png FILE]

Each class is met by some of ten nodes at random, each by five training images of its own; every
node sends one message and the sum of them answers for all test images over all classes. A seed draws
who meets what, the map of the sketches and the random rounding. Bytes are those of the records on
the wire, names and headers included, the mean over nodes. Digits need no file; Fashion-MNIST and,
through an encoder's file (of 1 x 28 x 28 images), Omniglot are read from the root if one is given.
Of Omniglot all 15 training drawings of a character are used, whatever the seed.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from clfed.backbones import Encoder
from clfed.data import digits, fashion_mnist, omniglot
from clfed.federated.wire import encode_contribution, narrow, record_bytes
from clfed.prototypes import Contribution, PrototypeMemory, groups_of, read_off
from clfed.prototypes.compression import Compressed, compress, expand
from clfed.prototypes.sketch import Sketch
from clfed.seeding import generator

NODES, SHOTS = 10, 5
OPTIONS = {"ncm": {}, "fedcof": {"shrinkage": 0.1}, "lda": {"shrinkage": 0.1, "target": "trace"}}
Data = tuple[str, int, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def data_sets(root: str | None, encoder: Path | None) -> Iterator[Data]:
    """Name, nodes that meet a class, training and test embeddings with their labels."""
    small = digits.load(as_features=True)
    yield (
        "digits, pixels",
        5,
        (small.train.images, small.train.labels),
        (small.test.images, small.test.labels),
    )
    if root is not None:
        clothes = fashion_mnist.load(root)
        parts = [(s.images.flatten(1) / 255, s.labels) for s in (clothes.train, clothes.test)]
        yield "Fashion-MNIST, pixels", 5, parts[0], parts[1]
    if root is not None and encoder is not None:
        network = Encoder.from_bytes(encoder.read_bytes())
        benchmark = omniglot.load(root)
        drawings = benchmark.train.of_classes(benchmark.groups["field"])
        features = network.embed(drawings.images)
        rank = torch.cat([torch.arange(len(rows)) for rows in drawings.indices_by_class()])
        order = torch.cat(drawings.indices_by_class())
        train, test = order[rank < 15], order[rank >= 15]
        yield (
            "Omniglot, Conv4",
            3,
            (features[train], drawings.labels[train]),
            (features[test], drawings.labels[test]),
        )


def holdings(labels: Tensor, holders: int, rng: torch.Generator) -> list[Tensor]:
    """Positions of the training images of each node."""
    held: list[list[Tensor]] = [[] for _ in range(NODES)]
    for name in labels.unique():
        rows = (labels == name).nonzero().squeeze(1)
        drawn = rows[torch.randperm(len(rows), generator=rng)[: holders * SHOTS]]
        for node, part in zip(
            torch.randperm(NODES, generator=rng)[:holders], drawn.split(SHOTS), strict=True
        ):
            held[int(node)].append(part)
    return [torch.cat(parts) for parts in held]


def size_of(rows: PrototypeMemory, message: Compressed | None) -> int:
    """Bytes of the record that travels."""
    record = encode_contribution(Contribution.of("node 0", 1, rows))
    if message is not None:
        head = json.loads(record["head"].numpy().tobytes()) | {"bits": message.bits}
        text = json.dumps(head, separators=(",", ":")).encode()
        record = ArrayRecord(
            {
                "head": Array(np.frombuffer(text, np.uint8)),
                "counts": record["counts"],
                "ends": Array(narrow(message.ends.numpy())),
                "codes": Array(message.codes.numpy()),
            }
        )
    return record_bytes(RecordDict({"rows": record}))


def variants(dim: int) -> Iterator[tuple[str, int, int | None, bool]]:
    """Answer, columns, bits (None: lossless) and whether to round at random."""
    for answer in ("ncm", "fedcof"):
        for bits in (None, 16, 8, 4):
            yield answer, dim, bits, False
        yield answer, dim, 4, True
        for part in (2, 4, 8, 16):
            for sketch_bits in (None, 8, 4):
                yield answer, dim // part, sketch_bits, False
    for part in (1, 2, 4, 8, 16):
        yield "lda", dim // part, None, False


def measured(
    data: Data, seed: int
) -> Iterator[tuple[tuple[str, int, int | None, bool], float, float]]:
    """Each variant with its accuracy and its mean bytes a node."""
    name, holders, (x, y), (queries, truth) = data
    dim = x.shape[1]
    held = holdings(y, holders, generator(seed, "holdings", name))
    names = [f"{int(label):04d}" for label in y]
    zero = PrototypeMemory.empty(dim, "e" * 64, "shared")
    nodes = [zero.observe(x[rows], [names[row] for row in rows]) for rows in held]
    for variant in variants(dim):
        answer, columns, bits, at_random = variant
        sketch = Sketch(dim, columns, seed) if columns < dim else None
        sent, sizes = [], []
        for number, node in enumerate(nodes):
            rows = node if answer == "lda" else node.with_moments("none")
            rows = rows if sketch is None else sketch.memory(rows)
            rng = generator(seed, "rounding", number) if at_random else None
            message = None if bits is None else compress(rows, bits, rng)
            sizes.append(size_of(rows, message))
            sent.append(rows if message is None else expand(message))
        merged = sum(sent[1:], sent[0])
        groups = groups_of(merged, sent)
        head = read_off(answer, merged, groups=groups, **OPTIONS[answer])
        answers = head.predict(queries if sketch is None else sketch(queries).float())
        labels = torch.tensor([int(label) for label in head.classes])[answers]
        yield variant, float((labels == truth).float().mean()), sum(sizes) / len(sizes)


def draw(curves: dict[str, dict[str, list[tuple[float, float]]]], path: Path) -> None:
    """One panel a data set: accuracy of the nearest mean against kilobytes."""
    from clfed.reporting.canvas import panels, save, style

    figure, row = panels(
        (4.2 * len(curves), 3.8), "Accuracy against bytes", [*curves], "kB a node", "accuracy, %"
    )
    for axes, lines in zip(row, curves.values(), strict=True):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        for index, (label, points) in enumerate(lines.items()):
            colour, marker, dashes = style(index)
            size, accuracy = zip(*sorted(points), strict=True)
            axes.plot(size, accuracy, dashes, marker=marker, color=colour, label=label)
    row[0].legend(frameon=False, fontsize=9)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", help="folder of the data sets")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--encoder", type=Path, help="encoder file for Omniglot")
    parser.add_argument("--png", type=Path, help="draw the curves of the nearest mean here")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for data in data_sets(options.root, options.encoder):
        found = defaultdict(list)
        for seed in range(options.seeds):
            for variant, accuracy, size in measured(data, seed):
                found[variant].append((accuracy, size))
        dim, classes = data[2][0].shape[1], len(data[2][1].unique())
        print(f"\n{data[0]}: {classes} classes, {dim} columns, {options.seeds} seeds")
        print("answer  columns  message            kB a node   accuracy")
        lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for (answer, columns, bits, at_random), results in found.items():
            scores, sizes = np.array(results).T
            kind = "lossless" if bits is None else f"{bits} bits" + (", random" * at_random)
            size = sizes.mean() / 1000
            print(
                f"{answer:7} {columns:7}  {kind:16} {size:11.2f}"
                f"   {100 * scores.mean():5.1f} ± {100 * scores.std(ddof=min(1, len(scores) - 1)):.1f} %"
            )
            if answer == "ncm" and not at_random:
                label = "rounded" if columns == dim else f"sketched, {kind}"
                lines[label].append((size, 100 * scores.mean()))
        curves[data[0]] = lines
    if options.png is not None:
        draw(curves, options.png)


if __name__ == "__main__":
    main()
