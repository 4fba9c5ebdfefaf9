"""What the tests of data-free methods share: little networks, nodes and whole runs on digits."""

import json

import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from torch.nn import functional as F

from clfed.backbones import MLP, Conv4, Encoder, Identity
from clfed.config import compose
from clfed.federated.local_training import Visit
from clfed.federated.networks import network_record
from clfed.jobs import federated
from clfed.learners.fine_tuning import FineTuning
from clfed.reporting.results import read

OLD, NEW = ("cat", "dog", "owl"), ("ant", "bee")
WIDTHS = [4, 4, 4, 4]


def pixels(seed=0):
    """A network without batch normalisation for 8 x 8 grey pictures."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = MLP(1, 8, [6])
    config = {"_target_": "clfed.backbones.MLP", "widths": [6]}
    return Encoder(backbone, config, input_shape=(1, 8, 8), mean=(0.4,), std=(0.3,))


def normalised(seed=0):
    """A network with four batch normalisation layers, whose statistics are those of pictures."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = Conv4(3, 18, WIDTHS)
        for layer in backbone.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = 1.0
        with torch.no_grad():
            backbone.train()(F.interpolate(torch.randn(64, 3, 6, 6), size=18))
    config = {"_target_": "clfed.backbones.Conv4", "widths": WIDTHS}
    return Encoder(backbone, config, input_shape=(3, 18, 18), mean=(0.5,) * 3, std=(0.25,) * 3)


def vectors():
    """Ready features."""
    config = {"_target_": "clfed.backbones.Identity"}
    return Encoder(Identity(5, 5), config, input_shape=(5,))


def network(encoder, classes, seed=1, **options):
    """A network with a random head."""
    made = FineTuning(encoder, classes, **options)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in made.head.parameters():
            weights.copy_(torch.randn(weights.shape, generator=rng))
    return made


def pictures(encoder, count, seed=2):
    """Random pictures, or random features."""
    rng = torch.Generator().manual_seed(seed)
    shape = (count, *encoder.input_shape)
    if len(shape) == 2:
        return torch.randn(shape, generator=rng)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)


def visit(encoder, labels, state=None, round_=2):
    """A node before a round of mission 2."""
    return Visit(
        node="hut",
        number=0,
        mission=2,
        round=round_,
        seed=3,
        encoder=encoder,
        images=pictures(encoder, len(labels)),
        labels=labels,
        state=RecordDict() if state is None else state,
    )


def taught(teacher, **parts):
    """What a node keeps of a lesson."""
    entries = {key: parts.pop(key) for key in ("code", "width") if key in parts}
    about = {"mission": 2, "classes": json.dumps(teacher.classes), **entries}
    found = {key: ArrayRecord(value) for key, value in parts.items()}
    return RecordDict({"lesson": ConfigRecord(about), "teacher": network_record(teacher), **found})


def request(model, lesson, extra=None):
    """A request in round 2."""
    head = {"classes": json.dumps(model.classes), "lesson": lesson, "round": 2}
    return RecordDict(
        {"round": ConfigRecord(head), "model": network_record(model), **(extra or {})}
    )


class Nodes:
    """A grid that only knows who is there."""

    def __init__(self, count):
        self.count = count

    def get_node_ids(self):
        return range(1, self.count + 1)


def reply(node, content):
    """What a node answered."""
    asked = Message(RecordDict(), dst_node_id=node, message_type="train.local")
    asked.metadata.__dict__["_message_id"] = str(node)
    return Message(content, reply_to=asked)


def trained(node, classes, examples, model):
    """The reply of a node that trained."""
    status = {"contributor": f"n{node}", "classes": json.dumps(classes), "examples": examples}
    return reply(node, RecordDict({"model": model, "status": ConfigRecord(status)}))


def failed(node):
    """The reply of a node that could not."""
    return reply(node, Error(2, "out of memory"))


def ask(server, round_, arrays, nodes=2):
    """What a server sends in a round, by node."""
    messages = server.configure_train(round_, arrays, ConfigRecord(), Nodes(nodes))
    return {message.metadata.dst_node_id: message.content for message in messages}


def first_mission(server, classes=OLD, nodes=2):
    """Let a server go through its first mission; return its network."""
    arrays = server.arrays()
    for round_ in range(1, server.rounds_per_mission + 1):
        ask(server, round_, arrays, nodes)
        replies = [
            trained(n, classes, n, network_record(network(server.encoder, classes, seed=n)))
            for n in range(1, nodes + 1)
        ]
        arrays, _ = server.aggregate_train(round_, replies)
    return arrays


def plain(arrays):
    """The arrays of a record by name."""
    return {name: array.numpy() for name, array in arrays.items()}


def bits(arrays):
    """The bytes of a record by name."""
    return {name: values.tobytes() for name, values in plain(arrays).items()}


def run(folder, strategy, *more):
    """The results of a method on digits: three tasks at two nodes."""
    settings = [
        "job=federated",
        "data=digits",
        "backbone=mlp",
        "backbone.widths=[64]",
        "learner=none",
        "scenario=dirichlet",
        "scenario.groups=all",
        "scenario.nodes=2",
        "scenario.tasks=3",
        "logger=none",
        f"strategy={strategy}",
        "strategy.local.lr=0.05",
        "strategy.local.momentum=0.9",
        "strategy.local.weight_decay=5e-4",
        "strategy.local.batch_size=32",
        "strategy.local.epochs=3",
        "strategy.rounds_per_mission=3",
        f"run_dir={folder / strategy}",
        f"cache_dir={folder / 'cache'}",
        *more,
    ]
    return read(federated.run(compose(settings)) / "results.json")
