"""Which penalty of Fed3R and which shrinkage of FedCOF suit an embedding, by validation classes alone.

python tests/benchmarks/head_settings.py federated_cifar100 ../shared/data

Three groups of images of each validation class, as large as a mission's, make the statistics; the
other images of these classes are asked about. Field classes and test images are not looked at.
"""

import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from clfed.config import compose
from clfed.federated.field import names, open_benchmark
from clfed.learners.training import BaseTraining, train_base
from clfed.prototypes import PrototypeMemory, read_off
from clfed.prototypes.groups import groups_of
from clfed.reporting.tables import markdown_table
from clfed.seeding import generator

GROUPS = 3
SHRINKAGES = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
PENALTIES = (1.0, 10.0, 100.0, 1000.0)


def found(experiment, root, seed):
    """Accuracy by head and setting, for one seed."""
    cfg = compose([f"experiment={experiment}", f"data.root={root}", f"seed={seed}"])
    benchmark = open_benchmark(OmegaConf.to_container(cfg)["data"])
    cache = Path(cfg.cache_dir).expanduser()
    encoder = train_base(BaseTraining.from_config(cfg), benchmark, seed=seed, cache=cache).encoder
    images = benchmark.train.of_classes(benchmark.groups["validation"])
    embeddings, rng = encoder.embed(images.images), generator(seed, "head settings")
    drawn = torch.stack(
        [
            positions[torch.randperm(len(positions), generator=rng)[: GROUPS * cfg.scenario.shots]]
            for positions in images.indices_by_class()
        ]
    )
    empty = PrototypeMemory.empty(encoder.dim, encoder.embedding_id, "shared")
    parts = [
        empty.observe(embeddings[rows.flatten()], names(images, rows.flatten()))
        for rows in drawn.split(cfg.scenario.shots, dim=1)
    ]
    memory = sum(parts[1:], parts[0])
    groups = groups_of(memory, parts)
    asked = torch.ones(len(images), dtype=torch.bool)
    asked[drawn.flatten()] = False
    right = torch.tensor([memory.classes.index(name) for name in names(images, asked)])

    def accuracy(name, **options):
        head = read_off(name, memory, groups=groups, **options)
        return float((head.predict(embeddings[asked]) == right).double().mean())

    return {
        "fedncm": accuracy("ncm_cosine"),
        **{f"fedcof {s:g}": accuracy("fedcof", shrinkage=s, relative=True) for s in SHRINKAGES},
        **{f"fed3r {p:g}": accuracy("ridge", penalty=p, normalise=True) for p in PENALTIES},
    }


def main():
    """Print a table, one row a head, one column a seed."""
    experiment, root = sys.argv[1:]
    columns = {f"seed {seed}": found(experiment, root, seed) for seed in range(3)}
    heads = next(iter(columns.values()))
    print(
        markdown_table(
            [
                {"head": head, **{seed: f"{100 * of[head]:.1f}" for seed, of in columns.items()}}
                for head in heads
            ]
        )
    )


if __name__ == "__main__":
    main()
