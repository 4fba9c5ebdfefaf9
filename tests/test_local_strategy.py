"""Local training: nothing leaves a node, and each one is what training alone makes of it."""

import json

import torch
from flwr.app import ConfigRecord, RecordDict
from simulations import Simulation

from clfed.backbones import Encoder
from clfed.learners.fine_tuning import FineTuning
from clfed.learners.training import initial_backbone
from clfed.seeding import derive_seed, generator
from clfed.strategies.local import LocalOnly
from clfed.strategies.personal import PersonalTraining

POOL = [{"_target_": "clfed.backbones.MLP", "widths": [w]} for w in (16, 24)]
OPTIONS = {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.01}


def simulation(folder, *overrides, **local):
    local = {"epochs": 2, "batch_size": 16, **OPTIONS, **local}
    return Simulation.of(folder, "strategy=local", *overrides, local=local, names="xyz")


def asked(sim, round_):
    """Let all nodes answer, by number."""
    ids = sim.strategy.connected(sim.grid)
    messages = sim.strategy.requests(round_, sim.arrays, ConfigRecord(), ids, "query.predict")
    sim.grid.send_and_receive(messages)
    return {r.content["status"]["number"]: r.content for r in sim.grid.replies[-len(ids) :]}


def test_nothing_leaves_a_node(tmp_path):
    sim = simulation(tmp_path)
    assert len(sim.play()) == 0
    replies = sim.grid.of("train.local")
    assert len(replies) == 6
    for reply in replies:
        assert set(reply.content) == {"status"}
        assert list(reply.content["status"]) == ["contributor"]
    assert {r.content["status"]["contributor"] for r in replies} == set("xyz")
    later = [m for m in sim.grid.requests if m.content["round"]["round"] == 2]
    assert len(later) == 3 and all(set(m.content) == {"round"} for m in later)
    assert LocalOnly.leaves == "nothing" and LocalOnly.personal


def test_whatever_a_node_sends_is_not_taken():
    sent = RecordDict({"model": ConfigRecord({"weight": 1.0})})
    strategy = LocalOnly(None, local={}, session="s")
    assert strategy.read("x", sent) is None
    assert strategy.aggregate_train(1, []) == (None, None)


def alone(sim, number, rounds_of_missions):
    """Train by hand what a node should have become."""
    common, name = sim.encoder, "xyz"[number]
    config = POOL[number % 2]
    seed = derive_seed(0, "personal", name)
    encoder = Encoder(
        initial_backbone(config, common.input_shape, seed),
        config,
        input_shape=common.input_shape,
        mean=common.transform.mean,
        std=common.transform.std,
    )
    network, classes = FineTuning(encoder), []
    for round_, mission in enumerate(rounds_of_missions, 1):
        images, labels = sim.field.images(number, mission)
        if not labels:
            continue
        new = sorted(set(labels) - set(classes))
        network.grow(new)
        classes += new
        rows = torch.tensor([classes.index(label) for label in labels])
        optimiser = torch.optim.SGD(network.parameters(), **OPTIONS)
        rng = generator(0, "finetune", name, round_)
        for _ in range(2):
            for batch in torch.randperm(len(rows), generator=rng).split(16):
                if len(batch) > 1:
                    optimiser.zero_grad()
                    network.train()
                    loss = torch.nn.functional.cross_entropy(network(images[batch]), rows[batch])
                    loss.backward()
                    optimiser.step()
    return classes, network.eval()


def test_a_node_goes_on_with_its_own_network_through_rounds_and_missions(tmp_path):
    sim = simulation(tmp_path, "strategy.rounds_per_mission=2", backbones=POOL)
    sim.play()
    images = sim.field.plan.test.images[sim.field.plan.asked(2)]
    for number, content in asked(sim, 4).items():
        classes, network = alone(sim, number, [1, 1, 2, 2])
        assert json.loads(content["status"]["classes"]) == classes
        kept = sim.grid._contexts[number + 1].state["model"].to_torch_state_dict()
        expected = network.state_dict()
        assert kept.keys() == expected.keys()
        assert all(torch.equal(kept[key], expected[key]) for key in expected)
        with torch.no_grad():
            answers = network(images).argmax(1).tolist()
        assert content["answers"]["predicted"].numpy().tolist() == answers


def test_nodes_start_from_weights_of_their_own_and_never_share_any(tmp_path):
    sim = simulation(tmp_path, backbones=POOL[:1])
    half = PersonalTraining(backbones=POOL[:1])
    first = [half.encoder(sim.visit(node)).embedding_id for node in (0, 1)]
    assert first[0] != first[1] and first[0] == half.encoder(sim.visit(0)).embedding_id
    sim.play(1)
    assert len({content["answers"]["predicted"].data for content in asked(sim, 1).values()}) == 3


def test_a_node_without_classes_answers_nothing_rightly(tmp_path):
    visit = simulation(tmp_path).visit()
    images = torch.zeros(2, *visit.images.shape[1:])
    classes, answers = PersonalTraining().predict(visit, RecordDict(), images)
    assert classes == ("",) and answers.tolist() == [0, 0]
