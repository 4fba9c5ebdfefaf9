"""How a simulated node tells what it met, other than as rows in the open.

The settings of the briefing say how, for the whole federation: a node that was briefed to send
noised tables, or to take part in masked sums, sends no row, whatever it is asked for.

What was told is never told again: a table that did not arrive is sent again as it is, noise and
all, and what was put into a masked sum is in no other one, even if the sum did not come about (it
may have been read: see :mod:`clfed.privacy.secure_aggregation`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict

from clfed.errors import FederationError, InvalidMessage
from clfed.federated.node import MissionNode, Node
from clfed.federated.records import integer
from clfed.federated.wire import encode_contribution
from clfed.privacy.mechanism import Mechanism
from clfed.privacy.secagg_messages import STEPS, respond
from clfed.privacy.terms import Terms
from clfed.prototypes import Contribution, PrototypeMemory

RELEASE = "release-"
MASKED = STEPS[2]
Told = dict[str, ArrayRecord]


def rows(node: Node, head: ConfigRecord) -> Told:
    """Return the rows that the server does not have yet, in the open."""
    contribution = node.answer(head)
    if contribution is None:
        return {}
    return {"rows": encode_contribution(contribution, bits=integer(head, "bits"))}


def releases(node: MissionNode, head: ConfigRecord) -> Told:
    """Return every noised table that the server does not have yet, one a mission.

    A node that met nothing sends noise: that it is silent would tell.

    Args:
        node: Learns what is new.
        head: The record ``round``, with the number of the newest table that the server has
            (``released``).
    """
    number, known = integer(head, "round"), integer(head, "released")
    for name in [name for name in node.kept if name.startswith(RELEASE)]:
        if int(name.removeprefix(RELEASE)) <= known:
            del node.kept[name]
    if number > node.version:
        new = node.look(head) - node.own
        table = _mechanism(node).release(new, node.name, number)
        node.own, node.version = node.met, number
        node.kept[f"{RELEASE}{number}"] = encode_contribution(
            Contribution(
                node.name, number, table.embedding_id, table.classes, table.counts, table.sums
            )
        )
    found = {name: node.kept[name] for name in node.kept if name.startswith(RELEASE)}
    return {name: part for name, part in found.items() if isinstance(part, ArrayRecord)}


def silence(node: MissionNode, head: ConfigRecord) -> Told:
    """Learn what is new and tell nothing: it goes into the masked sum that follows."""
    node.look(head)
    return {}


TELL: Mapping[str, Callable[[MissionNode, ConfigRecord], Told]] = MappingProxyType(
    {"rows": rows, "releases": releases, "sums": silence}
)


def tell(node: Node, head: ConfigRecord) -> Told:
    """Return the records of a reply that hold what the node met, as its briefing says."""
    if not isinstance(node, MissionNode):
        return rows(node, head)
    return TELL[node.privacy.get("send", "rows")](node, head)


def take_part(node: Node, action: str, content: RecordDict, context: Context) -> RecordDict:
    """Answer one step of a masked sum.

    Args:
        node: Whose new evidence goes into it.
        action: One of :data:`clfed.privacy.secagg_messages.STEPS`.
        content: The request.
        context: Of the node.

    Raises:
        FederationError: The node is not a simulated one.
        InvalidMessage: It was not briefed to take part in sums, or a rule is broken.
    """
    if not isinstance(node, MissionNode):
        raise FederationError(f"{node.name!r} takes part with rows in the open alone.")
    if node.privacy.get("send") != "sums":
        raise InvalidMessage(f"{node.name!r} was not briefed to take part in masked sums.")
    number = node.version + 1

    def new(terms: Terms) -> PrototypeMemory:
        delta = node.met - node.own
        if node.privacy["mechanism"] is None:
            return delta
        table = _mechanism(node).release(delta, node.name, number, share=terms.threshold)
        return PrototypeMemory.of(table.classes, table.counts, table.sums, table.embedding_id)

    reply = respond(action, content, context, new)
    if action == MASKED:
        node.own, node.version = node.met, number
    node.write()
    return reply


def _mechanism(node: MissionNode) -> Mechanism:
    return Mechanism.of(node.privacy["mechanism"])
