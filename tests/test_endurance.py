"""Real processes that are killed, copied and cut off; each ends in the bytes of an undisturbed run.

Minutes long: ``make endurance`` runs them.
"""

import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
from deployments import Deployment, clfed, until
from federations import draw, encoder, folders, observed

from clfed.deploy.store import Store
from clfed.federated.bundle import Bundle
from clfed.prototypes import PrototypeMemory

pytestmark = pytest.mark.endurance
NAMES = ("lodge", "hut")
WORLD = {"lodge": ("owl", "fox"), "hut": ("fox", "elk")}


@pytest.fixture
def deployment(tmp_path):
    folders(tmp_path / "pictures", WORLD)
    made = Deployment(tmp_path, NAMES)
    yield made
    made.close()


def expected(deployment, names=NAMES) -> PrototypeMemory:
    empty = PrototypeMemory.empty(encoder().dim, encoder().embedding_id)
    return sum((observed(deployment.root / "pictures" / n, empty) for n in names), start=empty)


def settled(deployment, names=NAMES) -> bool:
    """Whether server and nodes hold the memory of what the folders hold, to the byte."""
    try:
        held = [Bundle.load(deployment.folder).memory]
        held += [Bundle.load(deployment.state(name)).memory for name in names]
    except Exception:
        return False
    return {memory.to_bytes() for memory in held} == {expected(deployment).to_bytes()}


def test_a_node_killed_in_the_middle_of_a_round_comes_back(deployment):
    deployment.serve(every=1, patience=30, nodes=2)
    for name in NAMES:
        deployment.join(name)
    until(lambda: settled(deployment), 120, "the first merge")
    draw(deployment.root / "pictures" / "hut" / "elk" / "new.png", 50)
    draw(deployment.root / "pictures" / "lodge" / "owl" / "new.png", 51)
    time.sleep(1.5)  # a request is on its way
    deployment.kill("hut")
    killed = time.monotonic()
    until(lambda: "waiting for hut" in deployment.log("server"), 60, "the node to be named")
    named = time.monotonic() - killed
    number = deployment.rounds()
    deployment.wait_for_round(number + 1, 60)
    deployment.join("hut")
    until(lambda: settled(deployment), 180, "the node to be back: " + deployment.log("hut"))
    print(f"named after {named:.0f} s, settled after {time.monotonic() - killed:.0f} s")


def test_a_server_killed_at_20_random_instants(deployment):
    rng = np.random.default_rng(0)
    for name in NAMES:
        deployment.join(name)
    rounds = 0
    for kill in range(20):
        deployment.serve(every=0.5, patience=20)
        if kill % 5 == 0:  # some time to get anything done
            deployment.wait_for_round(rounds + 1, 120)
        time.sleep(float(rng.uniform(0, 12)))
        draw(deployment.root / "pictures" / "hut" / "elk" / f"{kill}.png", 100 + kill)
        # The whole machine every other time, the command alone in between.
        deployment.kill("server", family=kill % 2 == 0)
        store = Store(deployment.folder / "ledger.db")
        numbers = [row["number"] for row in store.execute("SELECT number FROM rounds")]
        store.close()
        assert numbers == [*range(1, len(numbers) + 1)] and len(numbers) >= rounds
        rounds = len(numbers)
    deployment.serve(every=0.5, patience=20)
    until(lambda: settled(deployment), 180, "the last restart: " + deployment.log("server"))
    print(f"{rounds} rounds between 20 kills")


def test_a_node_that_is_away_for_two_rounds(deployment):
    deployment.serve(every=0.5, patience=20, nodes=2)
    for name in NAMES:
        deployment.join(name)
    until(lambda: settled(deployment), 120, "the first merge")
    deployment.processes["hut"].terminate()
    deployment.processes.pop("hut").wait(30)
    shutil.rmtree(deployment.root / "pictures" / "hut" / "fox")
    draw(deployment.root / "pictures" / "lodge" / "owl" / "new.png", 51)
    deployment.wait_for_round(deployment.rounds() + 2)
    deployment.join("hut")
    until(lambda: settled(deployment), 120, "the node to be back: " + deployment.log("hut"))


def test_two_machines_with_one_key(deployment):
    deployment.serve(every=0.5, patience=20, nodes=2)
    for name in NAMES:
        deployment.join(name)
    until(lambda: settled(deployment), 120, "the first merge")
    copy = deployment.join("hut", state=deployment.root / "copy")
    assert copy.wait(90) == 46
    assert "connected as 'hut'" in deployment.log("copy")
    draw(deployment.root / "pictures" / "hut" / "elk" / "new.png", 50)
    until(lambda: settled(deployment), 60, "the first machine to go on")


def test_who_is_refused_hears_why(deployment, tmp_path_factory):
    root = deployment.root
    deployment.serve(every=1)
    gate = deployment.folder / "flower" / "gate.log"
    until(lambda: gate.exists() and "listens" in gate.read_text(), 60, "the gate")

    def join(invitation):
        return clfed(
            *("join", invitation, root / "pictures" / "hut"),
            *("--state", root / "refused", "--wait", 30),
            check=False,
        )

    revoked = deployment.folder / "nodes" / "hut.pub"
    revoked.rename(root / "hut.pub")
    done = join(root / "hut.invitation")
    assert done.returncode == 44 and "key" in done.stderr
    (root / "hut.pub").rename(revoked)
    other = Deployment(tmp_path_factory.mktemp("other"), ["hut"])
    stranger = replace(other.federation(), address=deployment.address)
    stranger.invite("cabin", root / "cabin.invitation")
    done = join(root / "cabin.invitation")
    assert done.returncode == 42 and "certificate" in done.stderr
    # A key that is revoked while its node is connected.
    deployment.join("hut")
    until(lambda: deployment.rounds() > 0, 90, "a round")
    revoked.unlink()
    assert deployment.processes["hut"].wait(60) == 44, deployment.log("hut")
