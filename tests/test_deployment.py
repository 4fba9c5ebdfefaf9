"""A SuperLink and three SuperNodes as processes of their own, with TLS and keys, on loopback."""

import signal
from pathlib import Path

import pytest
import torch
from deployments import Deployment, clfed
from federations import encoder, observed
from PIL import Image

from clfed.data import omniglot
from clfed.data.folder import read_folder
from clfed.deploy.federation import Federation, Rules
from clfed.deploy.pace import Pace
from clfed.deploy.serving import Server
from clfed.federated.bundle import Bundle
from clfed.federated.client_app import app
from clfed.federated.grid import LocalGrid

ALPHABETS = {"lodge": "Atlantean", "hut": "Ge_ez", "pier": "Tibetan"}
SHARED = "shared character"
SHOTS, TESTS = 5, 5


@pytest.fixture(scope="module")
def world(packs, tmp_path_factory):
    """Folders with different alphabets and one character in common; other drawings to test on."""
    root = tmp_path_factory.mktemp("deployment")
    drawings = omniglot.load(str(packs)).train
    groups = dict(zip(drawings.classes, drawings.indices_by_class(), strict=True))
    met = {
        node: [name for name in groups if name.startswith(alphabet)][:6]
        for node, alphabet in ALPHABETS.items()
    }
    common = next(name for name in groups if name.startswith("Manipuri"))
    for number, (node, names) in enumerate(met.items()):
        assert len(names) == 6
        for name in names:
            rows, label = groups[name].tolist(), name.replace("/", " ")
            write(drawings, rows[:SHOTS], root / "pictures" / node / label)
            write(drawings, rows[SHOTS : SHOTS + TESTS], root / "test" / label)
        rows = groups[common].tolist()[number * SHOTS : (number + 1) * SHOTS]
        write(drawings, rows, root / "pictures" / node / SHARED)
    write(drawings, groups[common].tolist()[-TESTS:], root / "test" / SHARED)
    return root


def write(drawings, rows, folder: Path) -> None:
    folder.mkdir(parents=True)
    for row in rows:
        Image.fromarray(drawings.images[row, 0].numpy()).save(folder / f"{row}.png")


@pytest.mark.slow
def test_three_machines_learn_each_other(world):
    deployment = Deployment(world, [*ALPHABETS])
    try:
        server = deployment.serve(nodes=3, rounds=1, patience=60)
        for name in ALPHABETS:
            deployment.join(name)
        assert server.wait(240) == 0, deployment.log("server")
        merged = Bundle.load(deployment.folder).memory

        # engine=local on the same folders
        local = Federation.create(
            world / "local", name="l", address="a:1", encoder=encoder(), rules=Rules()
        )
        configs = [
            {"name": name, "folder": str(world / "pictures" / name), "state-dir": str(world / name)}
            for name in ALPHABETS
        ]
        here = Server(local, local.store(), LocalGrid(app, configs), Pace(every=0.0, rounds=1))
        here.run()
        assert merged.to_bytes() == here.strategy.memory.to_bytes()

        # and the pictures of all machines in one place
        empty = merged - merged
        total = sum((observed(world / "pictures" / name, empty) for name in ALPHABETS), empty)
        assert merged == total and len(merged) == 19
        assert merged.select([SHARED]).total_count == 3 * SHOTS

        test = read_folder(world / "test", 28, 1)
        distance = torch.cdist(encoder().embed(test.images).double(), total.means())
        nearest = [total.classes[row] for row in distance.argmin(1).tolist()]
        truth = [test.classes[row] for row in test.labels.tolist()]
        pooled = sum(map(str.__eq__, nearest, truth)) / len(truth)
        assert pooled > 4 / len(merged), "random weights tell some of it apart"
        for name in ALPHABETS:
            assert Bundle.load(deployment.state(name)).memory.to_bytes() == merged.to_bytes()
            answers = deployment.predict(name, world / "test")
            right = sum(answer["nearest"] == answer["truth"] for answer in answers)
            assert right / len(answers) == pooled and len(answers) == len(truth)

        refused(deployment, world)
        for process in deployment.processes.values():
            process.send_signal(signal.SIGTERM)
        codes = {name: process.wait(30) for name, process in deployment.processes.items()}
        assert codes == {"server": 0} | dict.fromkeys(ALPHABETS, 128 + signal.SIGTERM)
    finally:
        deployment.close()


def refused(deployment, world) -> None:
    """Nobody serves any more: what a node says then."""
    done = clfed(
        *("join", world / "hut.invitation", world / "pictures" / "hut"),
        *("--state", world / "other", "--wait", 2),
        check=False,
    )
    assert done.returncode == 41 and "Expected a clfed server at" in done.stderr
