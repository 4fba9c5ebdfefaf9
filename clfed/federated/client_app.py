"""The Flower ClientApp of every node, simulated or real."""

from __future__ import annotations

import json

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clfed.federated.node import open_node
from clfed.federated.records import arrays, config, config_record, integer, text
from clfed.federated.wire import decode_memory, encode_contribution
from clfed.seeding import generator

app = ClientApp()

_UNBRIEFED = RecordDict({"status": config_record(contributor="", needs_briefing=True)})


@app.train()
def reconnoitre(message: Message, context: Context) -> Message:
    """Learn what this round brings and send the own rows that the server does not have yet."""
    node = open_node(message.content, context)
    if node is None:
        return Message(_UNBRIEFED, reply_to=message)
    head = config(message.content, "round")
    round_, acknowledged = integer(head, "round"), integer(head, "acknowledged")
    node.learn(round_, acknowledged)
    reply = RecordDict({"status": config_record(contributor=node.name)})
    contribution = node.contribution(acknowledged)
    if contribution is not None:
        reply["rows"] = encode_contribution(contribution)
    context.state["merged"] = arrays(message.content, "memory")
    node.state.write(context.state)
    return Message(reply, reply_to=message)


@app.query("merged")
def keep(message: Message, context: Context) -> Message:
    """Keep the merged memory that the server broadcasts, and say what it is."""
    memory = decode_memory(arrays(message.content, "memory"))
    context.state["merged"] = arrays(message.content, "memory")
    return Message(RecordDict({"status": config_record(sha256=memory.sha256())}), reply_to=message)


@app.train("finetune")
def finetune(message: Message, context: Context) -> Message:
    """Train the whole network on this round's images alone and send it back."""
    node = open_node(message.content, context)
    if node is None:
        return Message(_UNBRIEFED, reply_to=message)
    from clfed.federated.networks import load_network, network_record

    head = config(message.content, "round")
    round_ = integer(head, "round")
    settings = node.state.settings["finetune"]
    images, labels = node.field.images(node.number, round_)
    learner = load_network(
        node.encoder,
        arrays(message.content, "model"),
        json.loads(text(head, "classes")),
        settings["optimiser"],
    )
    if labels:
        learner.grow(sorted(set(labels)))
        rng = generator(settings["seed"], "finetune", node.name, round_)
        learner.fit(
            images,
            learner.label(labels),
            epochs=settings["epochs"],
            batch_size=settings["batch_size"],
            rng=rng,
        )
    node.state.write(context.state)
    status = config_record(
        contributor=node.name, classes=json.dumps(learner.classes), examples=len(labels)
    )
    reply = RecordDict({"model": network_record(learner), "status": status})
    return Message(reply, reply_to=message)
