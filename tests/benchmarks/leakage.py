"""Attack what nodes send, with and without each defence, and print how much comes back.

    python tests/benchmarks/leakage.py [--seeds 3] [--threads 1]

Embeddings are those of 164 Greek, Armenian and Georgian characters under a Conv4 that was trained
on Latin and Cyrillic ones, clipped to the median length A of the latter; the attacker has the
latter and, to name rows, other drawings of the former. Noise is Gaussian on the sums, with the
epsilon of one release at delta = 1e-5 where one example comes or goes and the counts are public.
Gradients are of one batch of handwritten digits of 8 x 8 pixels and a network that was not trained
yet.

"nothing" is what the attacker reaches without a message: chance, or the mean of public images.
"""

import argparse
from collections import defaultdict

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.nn import functional as F

from clfed.backbones.conv4 import Conv4
from clfed.data import digits, glyphs
from clfed.evaluation.leakage import difference, differencing, label_recovery
from clfed.evaluation.leakage_gradients import (
    draw_masks,
    gradient_inversion,
    invert_gradient,
    linear_input,
    shared_gradient,
)
from clfed.evaluation.leakage_images import inversion, train_decoder
from clfed.privacy.gaussian import gaussian_sigma
from clfed.privacy.minimum_count import held_back
from clfed.privacy.noise import integer_gaussian
from clfed.prototypes import PrototypeMemory
from clfed.prototypes.fixed_point import SCALE
from clfed.reporting.tables import markdown_table
from clfed.seeding import derive_seed, generator

EPSILONS = {epsilon: gaussian_sigma(epsilon, 1e-5) for epsilon in (8, 1)}  # in units of A
DROPOUT = 0.3


class Table:
    """Successes by attack and message, over seeds."""

    def __init__(self) -> None:
        self._found = defaultdict(list)

    def add(self, attack, message, success, nothing, detail=""):
        self._found[attack, message].append((success, nothing, detail))

    def rows(self):
        for (attack, message), found in self._found.items():
            success, nothing = (
                torch.tensor(values) for values in list(zip(*found, strict=True))[:2]
            )
            spread = f" ± {success.std():.1f}" if len(found) > 1 else ""
            yield {
                "attack": attack,
                "message": message,
                "success": f"{success.mean():.1f}{spread}",
                "nothing": f"{nothing.mean():.1f}",
                "of the last seed": found[-1][2],
            }


def noised(sums, sigma, rng):
    return sums + integer_gaussian(sums.shape, sigma * SCALE, rng.bytes)


def train_encoder(images, labels, seed, passes=2):
    """A Conv4 trained to tell the base classes apart, as a function from images to embeddings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "encoder"))
        net = Conv4(1, 28, (32, 32, 64, 64))
        head = nn.Linear(net.dim, int(labels.max()) + 1)
        optimiser = torch.optim.Adam([*net.parameters(), *head.parameters()], 3e-3)
        for _ in range(passes):
            for rows in torch.randperm(len(images)).split(64):
                optimiser.zero_grad()
                F.cross_entropy(head(net(images[rows])), labels[rows]).backward()
                optimiser.step()
    net.eval().requires_grad_(False)
    return lambda x: torch.cat([net(part) for part in x.split(256)])


def attack_differences(table, z, limit, rng):
    """In every class a node had ten examples and got one more: which of ten was it?"""
    attack = "differencing, % identified"
    known, new, others, elsewhere = z[:, :10], z[:, 10], z[:, 11:20], z[:, 20:29]
    rows = (z.double() * SCALE).round().long()
    before, nine = rows[:, :10].sum(1), rows[:, 20:29].sum(1)
    after = before + rows[:, 10]

    def add(message, guesses):
        found = differencing(guesses, new, others)
        detail = f"largest error {found.max_error:.3g}, cosine {found.cosine:.2f}"
        table.add(attack, message, 100 * found.identified, 100 * found.chance, detail)

    add("(the message before: mean of the ten known)", difference(0 * before, before, 10))
    add("plain", difference(before, after))
    add("plain, the example is deleted", difference(after, before, -1))
    zero = PrototypeMemory.empty(z.shape[2], "glyphs")
    names = [f"{c:03d}" for c in range(len(z))]
    ten, fifteen = (
        zero.observe(part.flatten(0, 1), [name for name in names for _ in range(part.shape[1])])
        for part in (known, torch.cat([known, new[:, None], elsewhere[:, :4]], 1))
    )
    add("minimum count 5", difference(ten.sums, held_back(ten, fifteen, 5).sums, 5))
    for epsilon, unit in EPSILONS.items():
        guess = difference(noised(before, unit * limit, rng), noised(after, unit * limit, rng))
        add(f"noise, epsilon = {epsilon} a release", guess)
    for epsilon, unit in EPSILONS.items():
        often = [
            torch.stack([noised(sums, unit * limit, rng) for _ in range(400)])
            for sums in (before, after)
        ]
        add(f"the same, {epsilon}, 400 releases before and after", difference(*often))
    add("secure sum, new examples at 10 nodes", difference(before, after + nine, 10))
    add("secure sum, a new example at one node alone", difference(before + nine, after + nine))
    masks = torch.from_numpy(rng.integers(-(2**63), 2**63, (2, *before.shape)))
    add("masked message of one node", difference(before + masks[0], after + masks[1]))


def attack_labels(table, z, public, limit, rng):
    """Rows without names, for 1, 5 and 20 examples."""
    zero = PrototypeMemory.empty(z.shape[2], "glyphs")
    names = [f"{c:03d}" for c in range(len(z))]
    known = zero.observe(
        public.flatten(0, 1), [name for name in names for _ in range(public.shape[1])]
    )
    for shots in (1, 5, 20):
        memory = zero.observe(
            z[:, :shots].flatten(0, 1), [name for name in names for _ in range(shots)]
        )
        for epsilon, unit in ({0: 0.0} | EPSILONS).items():
            sums = noised(memory.sums, unit * limit, rng) if epsilon else memory.sums
            sent = PrototypeMemory.of(names, memory.counts, sums, "glyphs")
            found = label_recovery(sent, known)
            defence = f", noise, epsilon = {epsilon}" if epsilon else ""
            table.add(
                "naming rows, % right",
                f"mean of {shots}{defence}",
                100 * found.accuracy,
                100 * found.chance,
                f"{found.assigned:.1%} where no two rows may share a class",
            )


def attack_images(table, base, base_z, images, z, public, limit, seed):
    """Fifteen images of each field class; a decoder of base images, a judge of other drawings."""
    classes, shots = z.shape[:2]
    rng = generator(seed, "inversion")
    judge = KNeighborsClassifier(1).fit(
        public.flatten(0, 1).flatten(1).numpy(),
        torch.arange(classes).repeat_interleave(public.shape[1]).numpy(),
    )
    flat, truth = images.flatten(0, 1), torch.arange(classes).repeat_interleave(shots)
    decoder = train_decoder(base_z, base, epochs=15, seed=seed)

    def add(message, sent, many, decoder=decoder):
        found = inversion(
            decoder(sent.float()),
            flat,
            torch.arange(len(flat)) // many,
            public=base,
            judge=lambda x: torch.from_numpy(judge.predict(x.flatten(1).numpy())),
            labels=truth,
        )
        detail = f"class of {found.recognised:.1%} recognised, chance {1 / classes:.1%}"
        table.add("inversion network, PSNR in dB", message, found.psnr, found.floor, detail)

    def loud(x, sigma):
        return x + sigma * torch.randn(x.shape, generator=rng)

    raw, five = z.flatten(0, 1), z.reshape(classes * shots // 5, 5, -1).mean(1)
    fifteen = z.mean(1)
    weights = torch.rand(classes, generator=rng)
    add("feature of one image", raw, 1)
    add("mean of 5", five, 5)
    groups = [part.view(-1, 5, *part.shape[1:]).mean(1) for part in (base_z, base)]
    add("mean of 5, decoder of means of 5", five, 5, train_decoder(*groups, epochs=75, seed=seed))
    add("mean of 15", fifteen, 15)
    mixture = (weights / weights.sum() @ fifteen)[None]
    add("random average of all classes' means", mixture, len(flat))
    for epsilon, unit in EPSILONS.items():
        sigma = unit * limit
        for name, sent, many in (("one image", raw, 1), ("mean of 15", fifteen, 15)):
            # The attacker knows the noise and trains with it.
            hardened = train_decoder(loud(base_z, sigma / many), base, epochs=15, seed=seed)
            add(f"{name}, noise, epsilon = {epsilon}", loud(sent, sigma / many), many, hardened)


def network(kind, seed):
    """A small network with dropout for 8 x 8 images of ten classes."""

    def block(layer):
        return [layer, nn.GELU() if kind == "CNN" else nn.ReLU(), nn.Dropout(DROPOUT)]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "network"))
        if kind == "CNN":
            parts = [
                *block(nn.Conv2d(1, 16, 3, padding=1, stride=2)),
                *block(nn.Conv2d(16, 32, 3, padding=1, stride=2)),
                *(nn.Flatten(), *block(nn.Linear(128, 64))),
            ]
        else:
            parts = [nn.Flatten(), *block(nn.Linear(64, 128)), *block(nn.Linear(128, 64))]
        return nn.Sequential(*parts, nn.Linear(64, 10)).eval()


def attack_gradients(table, seed):
    data = digits.load().train
    public, labels = data.images.float() / 255, data.labels
    settings = [
        ("no dropout", 1, False, False, None, 0.0),
        ("dropout", 1, True, False, None, 0.0),
        ("dropout, masks sought", 1, True, True, None, 0.0),
        *((f"batch of {size}", size, False, False, None, 0.0) for size in (4, 16, 64)),
        ("dropout, masks sought, batch of 4", 4, True, True, None, 0.0),
        ("clipped", 1, False, False, 0.1, 0.0),
        *((f"clipped, noise {x:g}", 1, False, False, 0.1, x) for x in (0.01, 0.1, 1.0)),
    ]
    for kind in ("MLP", "CNN"):
        model = network(kind, seed)
        for message, size, drop, sought, clip, noise in settings:
            rng = generator(seed, kind, message)
            rows = torch.randperm(len(labels), generator=rng)[:size]
            x, y = public[rows], labels[rows]
            masks = draw_masks(model, x, rng) if drop else ()
            gradient = shared_gradient(model, x, y, masks=masks, clip=clip, noise=noise, rng=rng)
            guess = invert_gradient(model, gradient, y, (1, 8, 8), find_masks=sought, rng=rng)
            found = gradient_inversion(guess, x, public=public)
            attack = f"gradient inversion, {kind}, PSNR in dB"
            table.add(
                attack, message, found.psnr, found.floor, f"mean squared error {found.mse:.2g}"
            )
    model = network("MLP", seed)
    for size in (1, 8):
        x, y = public[20 * seed : 20 * seed + size], labels[20 * seed : 20 * seed + size]
        masks = draw_masks(model, x, generator(seed, "analytic"))
        weight, bias, *_ = shared_gradient(model, x, y, masks=masks)
        guess = linear_input(weight, bias).view(1, 1, 8, 8).expand(size, -1, -1, -1)
        found = gradient_inversion(guess, x, public=public)
        message = f"dropout, batch of {size}"
        detail = f"mean squared error {found.mse:.2g}"
        table.add("first layer solved, MLP, PSNR in dB", message, found.psnr, found.floor, detail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = glyphs.load(samples=40)
    base = data.train.of_classes(data.groups["base"])
    field, other = (part.of_classes(data.groups["field"]) for part in (data.train, data.test))
    classes = len(field.classes)
    table = Table()
    for seed in range(options.seeds):
        encode = train_encoder(base.images / 255, base.labels, seed)
        base_z = encode(base.images / 255)
        limit = float(base_z.norm(dim=1).median())

        def embed(images, encode=encode, limit=limit):
            z = encode(images)
            return z * (limit / z.norm(dim=1, keepdim=True)).clamp(max=1)

        # Images come class by class, as many of each.
        images, public = (
            (part.images / 255).view(classes, -1, *part.images.shape[1:]) for part in (field, other)
        )
        z = embed(images.flatten(0, 1)).view(classes, images.shape[1], -1)
        public_z = embed(public.flatten(0, 1)).view(classes, public.shape[1], -1)
        rng = np.random.default_rng(derive_seed(seed, "noise"))
        attack_differences(table, z, limit, rng)
        attack_labels(table, z, public_z, limit, rng)
        clipped = embed(base.images / 255)
        attack_images(
            table, base.images / 255, clipped, images[:, :15], z[:, :15], public, limit, seed
        )
        attack_gradients(table, seed)
    print(markdown_table([*table.rows()]))


if __name__ == "__main__":
    main()
