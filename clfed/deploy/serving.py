"""The server's side of a federation of real nodes: rounds that go on whatever happens.

A round asks every connected node for what is new, takes in each reply when it comes, and sends the
merged memory to the nodes that do not have it yet. What was accepted is on disk before it is
acknowledged. A node that does not answer in time is named and left behind; what it sends later is
merged later.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from clfed.deploy.accounts import Accounts, bytes_of
from clfed.deploy.federation import Federation
from clfed.deploy.layout import no_answer
from clfed.deploy.live_averaging import LiveAveraging
from clfed.deploy.pace import Pace
from clfed.deploy.requests import Requests
from clfed.deploy.store import Store
from clfed.errors import ClfedError
from clfed.federated.bundle import BUNDLE, Bundle
from clfed.federated.grid import Mailbox, wait_for_nodes
from clfed.federated.intake import Intake
from clfed.prototypes import PrototypeMemory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What one finished round was; the columns of the table ``rounds``."""

    number: int
    started: float
    seconds: float
    asked: int
    answered: int
    up: int
    down: int
    classes: int
    examples: int
    memory: str


class Server:
    """Runs rounds.

    Args:
        federation: Settings.
        store: What must not be lost.
        grid: Reaches the nodes.
        pace: How long to wait for what.
        report: Called after each round, such as with a sink of metrics.
    """

    def __init__(
        self,
        federation: Federation,
        store: Store,
        grid: Grid,
        pace: Pace,
        *,
        report: Callable[[Report], None] = lambda report: None,
    ) -> None:
        self.federation, self.store, self.grid, self.pace = federation, store, grid, pace
        self.encoder = federation.encoder()
        self.requests = Requests(federation, store)
        self.strategy = LiveAveraging(federation, self.encoder, store, self.requests)
        self._report = report
        self._mailbox = Mailbox(grid)
        self._number = store.last_round() + 1
        self._accounts = Accounts(store)
        self._answered: list[int] = []
        self._unbriefed: list[int] = []
        self._bundled: PrototypeMemory | None = None

    def run(self) -> None:
        """Run rounds until as many as wanted are finished.

        Raises:
            RunFolderError: The disk is full or the store cannot be written; what was
                acknowledged is there.
        """
        self._wait_for_nodes()
        waiting = False
        while self.pace.rounds is None or self._number <= self.pace.rounds:
            start = time.monotonic()
            lonely = self.round() is None
            if lonely and not waiting:
                logger.info("No node is connected; waiting for nodes.")
            waiting = lonely
            if self.pace.rounds is None or self._number <= self.pace.rounds:
                time.sleep(max(0.0, self.pace.every - (time.monotonic() - start)))

    def round(self) -> Report | None:
        """Run one round; ``None``, and nothing done, where no node is connected."""
        start, started = time.perf_counter(), time.time()
        self.requests.apply(self.strategy.ledger, lambda: self.strategy.memory)
        ids = sorted(self.grid.get_node_ids())
        if not ids:
            return None
        self.strategy.meet(ids)
        self._accounts.clear()
        answered = self._gather(ids)
        self._distribute(answered)
        self.requests.finish(self.strategy.memory, [self.strategy.name_of(i) for i in ids])
        memory = self.strategy.memory
        report = Report(
            number=self._number,
            started=started,
            seconds=time.perf_counter() - start,
            asked=len(ids),
            answered=len(answered),
            up=self._accounts.up,
            down=self._accounts.down,
            classes=len(memory),
            examples=memory.total_count,
            memory=memory.sha256(),
        )
        with self.store.transaction():
            self.store.insert("rounds", asdict(report))
            self._accounts.forget_old()
        logger.info(
            "Round %d: %d of %d nodes answered, %d classes, %d examples, %.1f s.",
            report.number,
            report.answered,
            report.asked,
            report.classes,
            report.examples,
            report.seconds,
        )
        self._number += 1
        self._report(report)
        return report

    def _gather(self, ids: list[int]) -> list[int]:
        """Ask nodes for what is new; ask again, with the briefing, those that need it."""
        self._answered, self._unbriefed = [], []
        self._ask(ids)
        if self._unbriefed:
            self._ask(self._unbriefed)
        return self._answered

    def _ask(self, ids: list[int]) -> None:
        head = self.strategy.head(self._number, ConfigRecord())
        memory = self.strategy.arrays()
        self._exchange([self.strategy.request(node, memory, head) for node in ids])

    def _distribute(self, answered: list[int]) -> None:
        """Send the merged memory to the nodes that answered and do not have it."""
        self._write_bundle()
        targets = self.strategy.without_memory(answered)
        head = self.strategy.head(self._number, ConfigRecord())
        memory = self.strategy.arrays()
        self._exchange([self.strategy.broadcast(node, memory, head) for node in targets])

    def _exchange(self, messages: list[Message]) -> None:
        if not messages:
            return
        self._accounts.send(messages)
        replies = self._mailbox.exchange(
            messages, timeout=self.pace.patience, arrived=self._arrived, waiting=self._waiting
        )
        done = {reply.metadata.src_node_id for reply in replies}
        for node in {message.metadata.dst_node_id for message in messages} - done:
            name = self.strategy.name_of(node)
            logger.warning(
                "Round %d: %s did not answer within %g s; the round goes on without it.",
                self._number,
                name,
                self.pace.patience,
            )
            with self.store.transaction():
                self._accounts.settle(self._number, node, name)
                self.store.update_node(name, note=no_answer(self._number))

    def _arrived(self, reply: Message) -> None:
        """Take in a reply of this round or an earlier one, to whichever request."""
        sha256 = _kept(reply)
        if sha256 is None:
            self._take(reply)
            return
        node = reply.metadata.src_node_id
        name = self.strategy.name_of(node)
        self.strategy.held(node, sha256)
        with self.store.transaction():
            self._accounts.settle(self._number, node, name, up=bytes_of(reply))
            self.store.update_node(name, holds=sha256, last_seen=time.time())

    def _take(self, reply: Message) -> None:
        """Take in one reply: on disk together with its account, or refused and counted."""
        node = reply.metadata.src_node_id
        found: Intake | None = None
        refused = ""
        try:
            found = self.strategy.take(reply)
        except ClfedError as error:
            refused = str(error)
        name = found.contributor if found and found.briefed else self.strategy.name_of(node)
        receipt = found.receipt if found else None
        with self.store.transaction():
            if receipt is not None:
                self.store.write_ledger(self.strategy.ledger)
            if found is not None and found.briefed:
                self.requests.heard(found)
                share = self.strategy.ledger.share(name)
                self.store.update_node(
                    name,
                    classes=len(share),
                    examples=share.total_count,
                    last_seen=time.time(),
                    pictures=found.status.get("pictures"),
                    holds=_text(found.status, "holds"),
                    note=_note(found),
                )
            elif refused:
                self.store.update_node(name, last_seen=time.time(), note=refused)
            rows = len(receipt.accepted) if receipt else 0
            self._accounts.settle(
                self._number, node, name, up=bytes_of(reply), rows=rows, refused=refused
            )
        if refused:
            logger.warning("Round %d: refused the reply of %s: %s", self._number, name, refused)
        elif found is not None and not found.briefed:
            self._unbriefed.append(node)
        elif found is not None:
            if node not in self._answered:  # a reply may come twice
                self._answered.append(node)
            self.strategy.held(node, _text(found.status, "holds"))

    def _waiting(self, nodes: list[int], seconds: float) -> None:
        names = ", ".join(self.strategy.name_of(node) for node in nodes)
        logger.warning("Round %d: waiting for %s since %.0f s.", self._number, names, seconds)

    def _wait_for_nodes(self) -> None:
        wanted = self.pace.nodes
        ids = wait_for_nodes(
            self.grid,
            wanted,
            timeout=self.pace.gather,
            waiting=lambda there: logger.info("%d of %d nodes are connected.", there, wanted),
        )
        if len(ids) < wanted:
            logger.warning(
                "%d of %d nodes came within %g s; starting with them.",
                len(ids),
                wanted,
                self.pace.gather,
            )

    def _write_bundle(self) -> None:
        """Write what ``clfed predict`` reads, where the memory is another one than before."""
        path = self.federation.folder / BUNDLE
        if self._bundled is None and path.is_file():
            self._bundled = Bundle.load(path).memory
        if self._bundled == self.strategy.memory:
            return
        bundle = Bundle(
            self.encoder,
            self.strategy.memory,
            self.federation.rules.threshold,
            self.federation.name,
            self._number,
        )
        bundle.save(path)
        self._bundled = self.strategy.memory


def _kept(reply: Message) -> str | None:
    """Return the digest of the memory that a node says to have kept, if that is what it says."""
    status = reply.content.get("status") if reply.has_content() else None
    sha256 = status.get("sha256") if isinstance(status, ConfigRecord) else None
    return sha256 if isinstance(sha256, str) and "rows" not in reply.content else None


def _text(status: ConfigRecord, key: str) -> str:
    value = status.get(key)
    return value if isinstance(value, str) else ""


def _note(found: Intake) -> str:
    unreadable = found.status.get("unreadable")
    return (
        f"{unreadable} files are no pictures" if isinstance(unreadable, int) and unreadable else ""
    )
