"""How a node answers each kind of request; the heavy half of the ClientApp."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from flwr.app import Array, ArrayRecord, Context, MetricRecord, RecordDict

from clfed import __version__
from clfed.errors import FederationError, VersionMismatch
from clfed.federated.discretion import take_part, tell
from clfed.federated.gauge import Gauge
from clfed.federated.local_training import LocalTraining, Visit, open_training
from clfed.federated.node import MissionNode, Node, open_node
from clfed.federated.records import arrays, config, config_record, integer, text
from clfed.federated.wire import COST
from clfed.privacy.secagg_messages import STEPS


def answer(action: str, content: RecordDict, context: Context) -> RecordDict:
    """Return the reply to a request.

    Args:
        action: A name in :data:`ACTIONS`, or a step of a masked sum.
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
    if not head.get("gauge"):
        return _act(action, node, content, context)
    with Gauge() as gauge:
        reply = _act(action, node, content, context)
    reply[COST] = cost = MetricRecord({"seconds": gauge.seconds})
    if gauge.peak is not None:
        cost["peak"] = gauge.peak
    return reply


def _act(action: str, node: Node, content: RecordDict, context: Context) -> RecordDict:
    if action in STEPS:
        return take_part(node, action, content, context)
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
    """Learn what this round brings and tell what the server does not have yet."""
    head = config(content, "round")
    told = tell(node, head)
    if "memory" in content:
        node.keep(arrays(content, "memory"), integer(head, "round"))
    node.write()
    return RecordDict({"status": node.status(), **told})


def keep(node: Node, content: RecordDict) -> RecordDict:
    """Keep the merged memory that the server broadcasts, and say what it is."""
    sha256 = node.keep(arrays(content, "memory"), integer(config(content, "round"), "round"))
    return RecordDict({"status": config_record(contributor=node.name, sha256=sha256)})


def introduce(node: Node, content: RecordDict) -> RecordDict:
    """Say which node this is, so that a server can choose among nodes by name."""
    node.write()
    return RecordDict({"status": node.status()})


def train(node: Node, content: RecordDict) -> RecordDict:
    """Train on this round's images as the method's own half says, see :mod:`.local_training`.

    Raises:
        FederationError: The node is not a simulated one.
    """
    method, visit = _visit(node, content)
    reply = method.train(visit, content)
    node.write()
    status = node.status()
    status.update(config(reply, "status") if "status" in reply else {})
    reply["status"] = status
    return reply


def score(node: Node, content: RecordDict) -> RecordDict:
    """Say how hard this round's images are for what the server sent."""
    method, visit = _visit(node, content)
    status = config_record(contributor=node.name, score=method.score(visit, content))
    node.write()
    return RecordDict({"status": status})


def predict(node: Node, content: RecordDict) -> RecordDict:
    """Answer the test images of all classes known so far with the node's own model."""
    method, visit = _visit(node, content)
    assert isinstance(node, MissionNode)
    plan = node.field.plan
    images = plan.test.images[plan.asked(visit.mission)]
    classes, predicted = method.predict(visit, content, images)
    node.write()
    answers = ArrayRecord({"predicted": Array(predicted.numpy())})
    status = config_record(
        contributor=node.name, number=node.number, classes=json.dumps(list(classes))
    )
    return RecordDict({"status": status, "answers": answers})


def _visit(node: Node, content: RecordDict) -> tuple[LocalTraining, Visit]:
    if not isinstance(node, MissionNode):
        raise FederationError(f"{node.name!r} takes part with class statistics alone.")
    head = config(content, "round")
    mission = integer(head, "mission")
    images, labels = node.field.images(node.number, mission)
    return open_training(node.settings["local"]), Visit(
        node=node.name,
        number=node.number,
        mission=mission,
        round=integer(head, "round"),
        seed=integer(head, "seed"),
        encoder=node.encoder,
        images=images,
        labels=labels,
        state=node.kept,
    )


Action = Callable[[Node, RecordDict], RecordDict]
ACTIONS: Mapping[str, Action] = MappingProxyType(
    {
        "reconnoitre": reconnoitre,
        "keep": keep,
        "introduce": introduce,
        "train": train,
        "score": score,
        "predict": predict,
    }
)
