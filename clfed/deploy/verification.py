"""Whether a certificate of a federation holds, at the server and at a node.

Beside content, chain and signature it is compared with what lies in the folder of which it is a
part. Rows and folders change from round to round, so it is not their digests that have to stay but
what the request made of them: what was forgotten is not there, and stays shut out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from clfed.deploy.federation import Federation
from clfed.deploy.layout import SETTINGS
from clfed.deploy.requests import examples_of
from clfed.errors import ClfedError
from clfed.federated.bundle import BUNDLE, Bundle
from clfed.federated.certificates import NODE, SERVER, before
from clfed.federated.folder_state import STATE, read_state
from clfed.federated.forgetting import is_shut_out
from clfed.unlearning.certificate import Certificate
from clfed.unlearning.requests import Request
from clfed.unlearning.verification import Check, content_checks, equal


def verify(path: Path, certificate: Certificate, *, public_key: str | None = None) -> list[Check]:
    """Compare a certificate of a federation with everything that it speaks of.

    Args:
        path: Its file, in ``certificates`` of a federation folder or a node's state directory;
            elsewhere only the chain beside it is looked at.
        certificate: As :func:`~clfed.unlearning.certificate.read` gives it.
        public_key: Who must have signed it, in hexadecimal; None: whoever, or nobody.

    Returns:
        All checks, also those after one that failed; only what cannot be read at all ends the list
        early.

    Raises:
        CertificateError: One before it is missing or damaged.
    """
    directory = path.absolute().parent.parent
    previous = [*before(path, certificate)]
    checks = [*content_checks(certificate, previous, public_key)]
    place = certificate.settings.get("place")
    try:
        request = Request.parse(certificate.request)
        name = f"{certificate.number:02d}-{request.id}.json"
        checks.append(equal("name", "name of the file", name, path.name))
        if place == SERVER and (directory / SETTINGS).is_file():
            checks += _at_server(directory, certificate, request)
        elif place == NODE and (directory / STATE).is_file():
            checks += _at_node(directory, certificate, request)
        elif place not in (SERVER, NODE):
            told = f"Expected the certificate of a server or a node, got one of {place!r}."
            checks.append(Check("place", False, told))
        else:
            told = f"No {place} lies around it, so only the certificate itself was looked at."
            checks.append(Check("place", True, told))
    except ClfedError as error:
        checks.append(Check("files", False, str(error)))
    return checks


def _at_server(folder: Path, certificate: Certificate, request: Request) -> Iterator[Check]:
    federation = Federation.open(folder)
    yield _federation(certificate, federation.id)
    store = federation.store()
    try:
        book = {asked.request.id: asked for asked in store.requests()}
        confirmed = store.confirmations(request.id)
        ledger = store.read_ledger(federation.empty(federation.encoder()), cap=federation.rules.cap)
    finally:
        store.close()
    asked = book.get(request.id)
    known = asked is not None and asked.request == request and asked.finished is not None
    told = "is in the book, and finished" if known else "is not in the book as finished"
    yield Check("request", known, f"The request {told}.")
    if asked is None:
        return
    for what, stated, found in (
        ("ledger before", certificate.model_from, asked.ledger_before),
        ("ledger after", certificate.model_to, asked.ledger_after),
        ("memory before", certificate.statistics_from, asked.before),
        ("memory after", certificate.statistics_to, asked.after),
    ):
        yield equal(what, f"digest of the {what}", stated or "none", found or "none")
    stated = certificate.settings.get("confirmed")
    there = isinstance(stated, list) and all(name in [*confirmed] for name in stated)
    told = "are in the book" if there else "are not all in the book"
    yield Check("confirmations", there, f"The confirmations of nodes {told}.")
    left = sum(examples_of(ledger, request).values())
    yield Check("ledger", not left, f"The ledger holds {left} examples of what was forgotten.")
    memory = Bundle.load(folder / BUNDLE).memory
    yield _classes("memory", "merged memory", request, memory.classes)
    same = memory.sha256() == certificate.statistics_to
    told = "is still the one that was certified" if same else "has changed since, in later rounds"
    yield Check("now", True, f"The merged memory {told}.")


def _at_node(directory: Path, certificate: Certificate, request: Request) -> Iterator[Check]:
    state = read_state(directory)
    if state is None:  # gone since it was looked for
        return
    yield _federation(certificate, state.session)
    shut = is_shut_out(state, request)
    told = "shut out for good" if shut else "not shut out; the next round brings the request again"
    yield Check("tombstones", shut, f"What was forgotten is {told}.")
    yield _classes("rows", "rows of this node", request, state.own.classes)
    kept = {*request.pictures} & {*state.album.hashes}
    if request.kind == "contributor" and request.contributor == state.name:
        kept = {*state.album.hashes}
        left = state.own.total_count
        yield Check("rows", not left, f"The rows of this node hold {left} examples.")
    yield Check("embeddings", not kept, f"Of what was forgotten {len(kept)} embeddings are kept.")


def _federation(certificate: Certificate, identity: str) -> Check:
    told = str(certificate.settings.get("federation"))
    return equal("federation", "id of the federation", told, identity)


def _classes(name: str, what: str, request: Request, classes: tuple[str, ...]) -> Check:
    left = sorted({*request.classes} & {*classes})
    told = f"{', '.join(left)}, expected none of it" if left else "no deleted class"
    return Check(name, not left, f"Among the classes of the {what} is {told}.")
