"""A little federation of folders, for tests: random pictures, a random network, one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clfed.backbones import Conv4, Encoder
from clfed.data.folder import read_folder
from clfed.deploy.federation import Federation, Rules
from clfed.deploy.pace import Pace
from clfed.deploy.serving import Server
from clfed.federated.bundle import Bundle
from clfed.federated.client_app import app
from clfed.federated.grid import LocalGrid
from clfed.prototypes import PrototypeMemory

WORLD = {"lodge": ("owl", "fox"), "hut": ("fox", "elk"), "pier": ("fox", "gull", "seal")}


def encoder(seed: int = 0) -> Encoder:
    """A convolutional network with random weights for 28 x 28 grey pictures."""
    rng = torch.Generator().manual_seed(seed)
    network = Conv4(1, 28, (8, 8, 8, 16))
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=rng) - 0.4 * (tensor.dim() > 1))
    recipe = {"_target_": "clfed.backbones.Conv4", "widths": [8, 8, 8, 16]}
    return Encoder(network, recipe, input_shape=(1, 28, 28), mean=(0.1,), std=(0.3,))


def draw(path: Path, seed: int) -> Path:
    """Write one random picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (28, 28), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def folders(
    root: Path, world: Mapping[str, tuple[str, ...]] = WORLD, pictures: int = 3
) -> dict[str, Path]:
    """Write a folder of pictures for each node; no two pictures are alike."""
    seed = 0
    for node, classes in world.items():
        (root / node).mkdir(parents=True)
        for name in classes:
            for number in range(pictures):
                draw(root / node / name / f"{number}.png", seed)
                seed += 1
    return {node: root / node for node in world}


def observed(folder: Path, empty: PrototypeMemory) -> PrototypeMemory:
    """The memory of the pictures of a folder, observed in one place."""
    if not any(folder.glob("*/*.*")):
        return empty
    images = read_folder(folder, 28, 1)
    labels = [images.classes[row] for row in images.labels.tolist()]
    return empty.observe(encoder().embed(images.images), labels)


class Site:
    """A federation folder, nodes with folders, and a grid that carries messages between them."""

    def __init__(
        self,
        root: Path,
        world: Mapping[str, tuple[str, ...]] = WORLD,
        grid: type[LocalGrid] = LocalGrid,
        rules: Rules | None = None,
        **pace: float,
    ) -> None:
        self.root, self.names = root, [*world]
        self.folders = folders(root / "pictures", world)
        self.states = {name: root / f"{name}.node" for name in world}
        self.federation = Federation.create(
            root / "federation",
            name="test",
            address="localhost:8000",
            encoder=encoder(),
            rules=rules or Rules(),
        )
        self.grid = grid(app, [self.config(name) for name in world])
        self.pace = Pace(**{"every": 0.0, "patience": 0.3, "gather": 1.0} | pace)
        store = self.federation.store()
        for number, name in enumerate(world, 1):
            store.update_node(name, node_id=str(number))
        store.close()
        self.server = self.start()

    def config(self, name: str) -> dict[str, str]:
        return {
            "name": name,
            "folder": str(self.folders[name]),
            "state-dir": str(self.states[name]),
            "embedding": encoder().embedding_id,
        }

    def start(self) -> Server:
        """A server that finds what an earlier one left."""
        federation = Federation.open(self.federation.folder)
        return Server(federation, federation.store(), self.grid, self.pace)

    def round(self, times: int = 1) -> PrototypeMemory:
        for _ in range(times):
            self.server.round()
        return self.server.strategy.memory

    def held(self) -> dict[str, PrototypeMemory]:
        """What each node can answer from."""
        return {name: Bundle.load(state).memory for name, state in self.states.items()}

    def expected(self, *nodes: str) -> PrototypeMemory:
        """The memory of what the folders hold now."""
        empty = self.federation.empty(encoder())
        return sum(
            (observed(self.folders[name], empty) for name in nodes or self.names), start=empty
        )
