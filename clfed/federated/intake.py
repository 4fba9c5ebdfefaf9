"""The one gate that every message of a node passes before anything of it counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from clfed.errors import ConfigError, FederationError, InvalidMessage, RequestError
from clfed.federated.forgetting import MESSAGE_BYTES, MESSAGE_REQUESTS, check_asked
from clfed.federated.records import arrays, config, text
from clfed.federated.wire import decode_contribution, record_bytes
from clfed.prototypes import Contribution, ContributorLedger, Receipt
from clfed.prototypes.contribution import check_contributor
from clfed.unlearning.requests import Request


@dataclass(frozen=True)
class Limits:
    """What one message may hold at most.

    Attributes:
        bytes: Payload.
        classes: Rows.
        ahead: How far a version may be beyond the newest one known. Each message raises it by
            one, so only lost messages and restored state make it jump.

    Raises:
        ConfigError: A limit below 1.
    """

    bytes: int = 2**28
    classes: int = 10_000
    ahead: int = 2**20

    def __post_init__(self) -> None:
        for name, limit in vars(self).items():
            if type(limit) is not int or not 1 <= limit < 2**53:
                raise ConfigError(f"Expected a limit of {name} from 1 on, got {limit!r}.")


@dataclass(frozen=True)
class Intake:
    """What one reply brought.

    Attributes:
        contributor: Who sent it; empty where the node is not briefed.
        status: What the node says of itself.
        confirmed: Requests to forget that the node has carried out, with the number of examples
            that each removed there.
        asked: Requests to forget that the node brings.
        receipt: What the ledger took; None where no rows came.
        briefed: Whether the node knows encoder and settings.
    """

    contributor: str
    status: ConfigRecord
    confirmed: Mapping[str, int] = field(default_factory=dict)
    asked: tuple[Request, ...] = ()
    receipt: Receipt | None = None
    briefed: bool = True


def take_in(
    reply: Message,
    ledger: ContributorLedger,
    *,
    limits: Limits,
    sender: str | None = None,
    reserved: str | None = None,
    check: Callable[[str], None] = lambda name: None,
) -> Intake:
    """Check a reply and add its rows to a ledger, or refuse all of it.

    In this order: the node's own error, bytes, records and their types, the sender's name, what it
    says of requests to forget, dtypes and shapes (which leave no place for a number that is not
    finite), number of classes, version, names, counts from 1 to the ledger's cap (0 takes a row
    back), the range of sums and second moments, and the embedding.

    Args:
        reply: Believed in nothing.
        ledger: Changed by an acceptable reply only.
        limits: Of the message.
        sender: The only name that this node may use; None: any.
        reserved: A name that no node may use.
        check: Raises InvalidMessage for a name that this node may not use now.

    Raises:
        FederationError: The node reports an error of its own.
        InvalidMessage: It breaks a rule; see the order above.
        EmbeddingMismatch: It describes another embedding.
        UnsupportedStatistics: It brings other second moments.
        InvalidEmbedding: The total would no longer fit into 64 bits.
    """
    if reply.has_error():
        raise FederationError(str(reply.error.reason))
    content = reply.content
    size = record_bytes(content)
    if size > limits.bytes:
        raise InvalidMessage(f"Expected at most {limits.bytes:,} bytes, got {size:,}.")
    status = config(content, "status")
    if status.get("needs-briefing") is True:
        return Intake("", status, briefed=False)
    name = text(status, "contributor")
    check_contributor(name)
    if name == reserved:
        raise InvalidMessage(f"No node may call itself {name!r}.")
    if sender is not None and name != sender:
        raise InvalidMessage(f"The node with the key of {sender!r} calls itself {name!r}.")
    check(name)
    found = Intake(name, status, _confirmed(status), _asked(status))
    if "rows" not in content:
        return found
    return replace(found, receipt=ledger.receive(_rows(content, name, ledger, limits)))


def _confirmed(status: ConfigRecord) -> dict[str, int]:
    # Which of these requests there are is for the server's book to say.
    confirmed = _parsed(status, "confirmed", {})
    if not isinstance(confirmed, dict) or any(
        type(removed) is not int or not 0 <= removed < 2**53 for removed in confirmed.values()
    ):
        raise InvalidMessage("Expected the number of examples that each request removed.")
    return confirmed


def _asked(status: ConfigRecord) -> tuple[Request, ...]:
    asked = _parsed(status, "requests", [])
    if not isinstance(asked, list):
        raise InvalidMessage("Expected a list of requests to forget.")
    if len(asked) > MESSAGE_REQUESTS:
        raise InvalidMessage(
            f"Expected at most {MESSAGE_REQUESTS} requests to forget, got {len(asked):,}."
        )
    try:
        requests = tuple(map(Request.parse, asked))
        for request in requests:
            check_asked(request)
        return requests
    except RequestError as error:
        raise InvalidMessage(f"Expected requests to forget, got: {error}") from error


def _parsed(status: ConfigRecord, key: str, default: Any) -> Any:
    if key not in status:
        return default
    told = text(status, key)
    if len(told) > MESSAGE_BYTES:
        raise InvalidMessage(f"Expected {key} of at most {MESSAGE_BYTES:,} characters.")
    try:
        return json.loads(told)
    except (ValueError, RecursionError) as error:
        raise InvalidMessage(f"Expected JSON as {key}, got: {error}.") from error


def _rows(
    content: RecordDict, name: str, ledger: ContributorLedger, limits: Limits
) -> Contribution:
    contribution = decode_contribution(arrays(content, "rows"))
    if contribution.contributor != name:
        raise InvalidMessage(f"{name!r} sent rows in the name of {contribution.contributor!r}.")
    if len(contribution.classes) > limits.classes:
        raise InvalidMessage(
            f"Expected at most {limits.classes:,} classes, got {len(contribution.classes):,}."
        )
    newest = ledger.version_of(name) + limits.ahead
    if contribution.version > newest:
        raise InvalidMessage(
            f"Expected a version up to {newest}, got {contribution.version}: a version this far "
            "ahead would shut out all later messages."
        )
    return contribution
