"""How a node answers each kind of request; the heavy half of the ClientApp."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from flwr.app import Context, RecordDict

from clfed import __version__
from clfed.errors import FederationError, VersionMismatch
from clfed.federated.node import MissionNode, Node, open_node
from clfed.federated.records import arrays, config, config_record, integer, text
from clfed.federated.wire import encode_contribution
from clfed.seeding import generator


def answer(action: str, content: RecordDict, context: Context) -> RecordDict:
    """Return the reply to a request.

    Args:
        action: A name in :data:`ACTIONS`.
        content: The request.
        context: Configuration of the node, and Flower's state of it.

    Raises:
        ClfedError: The node cannot answer; its state stays as it was.
    """
    head = config(content, "round")
    spoken = text(head, "clfed")
    if spoken != __version__:
        raise VersionMismatch(f"Expected a server with clfed {__version__}, got {spoken}.")
    node = open_node(content, context)
    if node is None:
        return RecordDict({"status": config_record(needs_briefing=True)})
    return ACTIONS[action](node, content)


def answer_alone(action: str, content: RecordDict, context: Context) -> RecordDict:
    """Return the reply of a node whose state directory, if it has one, nobody else uses now.

    Raises:
        ClfedError: As :func:`answer`, or another process uses the directory.
    """
    directory = context.node_config.get("state-dir")
    if directory is None:
        return answer(action, content, context)
    from clfed.federated.folder_state import hold

    with hold(Path(str(directory))):
        return answer(action, content, context)


def reconnoitre(node: Node, content: RecordDict) -> RecordDict:
    """Learn what this round brings and send the own rows that the server does not have yet."""
    head = config(content, "round")
    contribution = node.answer(head)
    if "memory" in content:
        node.keep(arrays(content, "memory"), integer(head, "round"))
    node.write()
    reply = RecordDict({"status": node.status()})
    if contribution is not None:
        reply["rows"] = encode_contribution(contribution, bits=integer(head, "bits"))
    return reply


def keep(node: Node, content: RecordDict) -> RecordDict:
    """Keep the merged memory that the server broadcasts, and say what it is."""
    sha256 = node.keep(arrays(content, "memory"), integer(config(content, "round"), "round"))
    return RecordDict({"status": config_record(contributor=node.name, sha256=sha256)})


def finetune(node: Node, content: RecordDict) -> RecordDict:
    """Train the whole network on this round's images alone and send it back.

    Raises:
        FederationError: The node is not a simulated one.
    """
    from clfed.federated.networks import load_network, network_record

    if not isinstance(node, MissionNode):
        raise FederationError(f"{node.name!r} takes part with class statistics alone.")
    head = config(content, "round")
    round_ = integer(head, "round")
    settings = node.settings["finetune"]
    images, labels = node.field.images(node.number, round_)
    learner = load_network(
        node.encoder,
        arrays(content, "model"),
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
    node.write()
    status = config_record(
        contributor=node.name, classes=json.dumps(learner.classes), examples=len(labels)
    )
    return RecordDict({"model": network_record(learner), "status": status})


Action = Callable[[Node, RecordDict], RecordDict]
ACTIONS: Mapping[str, Action] = MappingProxyType(
    {"reconnoitre": reconnoitre, "keep": keep, "finetune": finetune}
)
