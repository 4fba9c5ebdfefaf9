"""Ready features of many classes, drawn from a seed: data for timing, without a network."""

import torch

from clfed.data.benchmark import Benchmark, ImageSet


def load(classes: int = 500, images: int = 40, dim: int = 64) -> Benchmark:
    """Return Gaussian classes of unit spread around random means."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(images)
    means = torch.randn(classes, dim, generator=rng)
    features = means[labels] + torch.randn(len(labels), dim, generator=rng)
    names = tuple(f"class {i:03d}" for i in range(classes))
    groups = {"base": (), "validation": (), "field": names}
    pool = ImageSet(features, labels, names)
    return Benchmark("many_classes", pool, None, groups, (), (), "Gaussian classes, for timing")
