"""Requests to forget in a federation of real nodes: from the first word to the certificate.

The server subtracts classes and contributors from its ledger at the start of the next round and
refuses them from then on; pictures are known to the nodes alone, which take them out of their
rows, and so are single classes where second moments are shared. Every node is told of every
request, leaves out what it means for good, also when the file is still in its folder, and confirms.
A class that no row names yet may be in the folder of a node that is away, so its request is noted
all the same.

A request is finished, with a certificate, when every node that has taken part has confirmed and
holds a merged memory of afterwards. A node that is away is waited for; one that will never come
back has to be forgotten as a contributor, and is not waited for any more.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping

from clfed.deploy.federation import Federation
from clfed.deploy.store import Asked, Store
from clfed.errors import CertificateError, RequestError
from clfed.federated.certificates import SERVER, certify
from clfed.federated.intake import Intake
from clfed.prototypes import ContributorLedger, PrototypeMemory
from clfed.unlearning.requests import Request

logger = logging.getLogger(__name__)
_SCOPE = (
    "The ledger and the merged memory of the server, and the rows and merged memories of all nodes "
    "that confirmed, byte for byte; the frozen embedding keeps whatever it was trained on."
)


class Requests:
    """The server's book of requests.

    Args:
        federation: Settings.
        store: Where they are kept.
    """

    def __init__(self, federation: Federation, store: Store) -> None:
        self._federation, self._store = federation, store
        self._told: dict[str, dict[str, bool]] = {}

    def apply(self, ledger: ContributorLedger, memory: Callable[[], PrototypeMemory]) -> None:
        """Subtract what new requests mean, and what has come of older ones since.

        Only names that were not known when they were forgotten can come later: the ledger itself
        refuses the others.

        Args:
            ledger: Changed, and written together with the account.
            memory: Returns the merged memory of now.
        """
        for asked in self._store.requests():
            examples = examples_of(ledger, asked.request)
            if asked.applied is None:
                self._subtract(asked, ledger, examples, memory().sha256())
                logger.info("Request %s of %s is carried out.", asked.request.id, asked.origin)
            elif examples and (asked.request.kind == "contributor" or ledger.moments != "shared"):
                self._subtract(asked, ledger, examples, asked.before)
                logger.warning(
                    "Request %s: subtracted what came later, of %s.",
                    asked.request.id,
                    ", ".join(examples),
                )

    def _subtract(
        self,
        asked: Asked,
        ledger: ContributorLedger,
        examples: Mapping[str, int],
        before: str | None,
    ) -> None:
        request, ledger_before = asked.request, asked.ledger_before or self._store.ledger_sha256()
        subtracted = Counter(json.loads(asked.subtracted or "{}"))
        subtracted.update(examples)
        itself = True
        if request.kind == "contributor":
            ledger.forget_contributor(request.contributor)
        elif request.kind == "picture" or ledger.moments == "shared":
            itself = False  # the nodes send rows and moments without what is meant
        else:
            for name in request.classes:
                ledger.forget_class(name)
        with self._store.transaction():
            self._store.write_ledger(ledger)
            self._store.execute(
                "UPDATE requests SET applied = coalesce(applied, ?), before = ?, "
                "ledger_before = ?, subtracted = ? WHERE id = ?",
                time.time(),
                before,
                ledger_before,
                json.dumps(subtracted, sort_keys=True) if itself else None,
                request.id,
            )

    def open_for(self, confirmed: Mapping[str, int]) -> list[Request]:
        """Return the requests that a node has not confirmed yet."""
        return [
            asked.request
            for asked in self._store.requests()
            if asked.applied is not None and asked.request.id not in confirmed
        ]

    def heard(self, found: Intake) -> list[str]:
        """Note what a node confirms and what it asks for; call it in a transaction.

        Returns:
            A sentence for each request that was refused.
        """
        book = self._store.requests()
        known = {asked.request.id for asked in book if asked.applied is not None}
        for request, removed in found.confirmed.items():
            if request in known:
                self._store.execute(
                    "INSERT OR IGNORE INTO confirmations (request, node, removed, at) "
                    "VALUES (?, ?, ?, ?)",
                    request,
                    found.contributor,
                    removed,
                    time.time(),
                )
        forgotten = {asked.request.contributor for asked in book if asked.applied is not None}
        refused = []
        for asked in found.asked:
            try:
                _check_right(asked, found.contributor, forgotten)
                if self._store.ask(asked, found.contributor):
                    logger.info("Request %s came from %s.", asked.id, found.contributor)
            except RequestError as error:
                logger.warning("Refused a request to forget: %s", error)
                refused.append(str(error))
        return refused

    def finish(self, memory: PrototypeMemory, connected: Collection[str]) -> None:
        """Close the requests that every awaited node has carried out, with a certificate.

        Args:
            memory: The merged memory.
            connected: Nodes that are there, to say of the others that they are away.
        """
        digest = memory.sha256()
        for asked in self._store.requests():
            if asked.applied is None or asked.finished is not None:
                continue
            request, awaited = asked.request, self._store.awaited(asked.request.id)
            # Where the ledger cannot subtract a class, a row may outlive its node's confirmation
            # by the messages that are on their way.
            clear = all(awaited.values()) and not any(name in memory for name in request.classes)
            if clear:
                self._note_clear(asked, digest)
            awaited = self._store.awaited(request.id)
            if clear and not awaited:
                self._close(request.id)
            else:
                self._tell(request.id, awaited, connected)

    def _note_clear(self, asked: Asked, digest: str) -> None:
        """Note since when the merged memory is clear, and which nodes hold such a memory."""
        identity, now = asked.request.id, time.time()
        with self._store.transaction():
            if asked.cleared is None:
                self._store.execute(
                    "UPDATE requests SET cleared = ?, after = ?, ledger_after = ? WHERE id = ?",
                    now,
                    digest,
                    self._store.ledger_sha256(),
                    identity,
                )
            self._store.execute(
                "UPDATE confirmations SET held = ? WHERE request = ? AND held IS NULL "
                "AND node IN (SELECT name FROM nodes WHERE holds = ?)",
                now,
                identity,
                digest,
            )

    def _close(self, identity: str) -> None:
        try:
            self._certify(*self._store.requests(identity))
        except CertificateError as error:  # mended by hand; until then the request stays open
            logger.error("Request %s has no certificate yet: %s", identity, error)
            return
        self._store.execute("UPDATE requests SET finished = ? WHERE id = ?", time.time(), identity)
        logger.info("Request %s is carried out at every node.", identity)

    def _certify(self, asked: Asked) -> None:
        confirmed = self._store.confirmations(asked.request.id)
        removed = confirmed if asked.subtracted is None else json.loads(asked.subtracted)
        removed = {node: number for node, number in removed.items() if number}
        rules = self._federation.rules
        certify(
            self._federation.folder,
            asked.request,
            federation=self._federation.id,
            place=SERVER,
            settings={
                "embedding": self._federation.embedding,
                "moments": rules.moments,
                "robust": rules.robust,
                "origin": asked.origin,
                "confirmed": [*confirmed],
            },
            evidence={"examples": sum(removed.values()), "nodes": len(confirmed)},
            scope=_SCOPE,
            deleted=removed,
            touched={},
            model_from=asked.ledger_before,
            model_to=asked.ledger_after,
            statistics_from=asked.before,
            statistics_to=asked.after,
            data_from=None,
            data_to=None,
        )

    def _tell(self, request: str, awaited: dict[str, bool], connected: Collection[str]) -> None:
        if self._told.get(request) == awaited:
            return
        self._told[request] = awaited
        names = [name if name in connected else f"{name} (away)" for name in awaited]
        logger.info("Request %s waits for %s.", request, ", ".join(names) or "the next messages")


def examples_of(ledger: ContributorLedger, request: Request) -> dict[str, int]:
    """Return how many examples of a class or a contributor the rows of each node hold."""
    found = {}
    for node, share in ledger.shares.items():
        rows = share.evidence
        if request.kind == "contributor":
            number = rows.total_count if node == request.contributor else 0
        else:
            held = [name for name in request.classes if name in rows]
            number = int(rows.counts[rows.rows(held)].sum()) if held else 0
        if number:
            found[node] = number
    return found


def _check_right(request: Request, contributor: str, forgotten: Collection[str]) -> None:
    if contributor in forgotten:
        raise RequestError(
            f"Expected request {request.id!r} of a node that takes part, got one of "
            f"{contributor!r}, which was forgotten."
        )
    if request.kind == "contributor" and request.contributor != contributor:
        raise RequestError(
            f"Expected request {request.id!r} of {contributor!r} about itself, got one about "
            f"{request.contributor!r}; only the operator may ask that."
        )
