"""Whether a certificate holds: its own content, the model, the chain, and the data.

What a federation's certificates are compared with beside content and chain is in
:mod:`clfed.deploy.verification`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from clfed.errors import ClfedError
from clfed.prototypes import PrototypeMemory
from clfed.unlearning.certificate import Certificate, deleted, sample_hashes
from clfed.unlearning.model_file import ModelFile, read_model
from clfed.unlearning.requests import Request, resolve
from clfed.unlearning.signatures import is_signed

if TYPE_CHECKING:
    from clfed.scenarios.holdings import Holdings


class Check(NamedTuple):
    """One thing that was looked at.

    Attributes:
        name: Of the check.
        ok: Whether it holds.
        sentence: What holds, or what was expected and what came.
    """

    name: str
    ok: bool
    sentence: str


def verify(
    certificate: Certificate,
    *,
    model_file: str | os.PathLike[str],
    previous: Sequence[Certificate] = (),
    holdings: Holdings | None = None,
    public_key: str | None = None,
) -> list[Check]:
    """Compare a certificate with everything that it speaks of.

    Args:
        certificate: As :func:`~clfed.unlearning.certificate.read` gives it.
        model_file: The model that it certifies.
        previous: The certificates before it in its sequence, first to last.
        holdings: The data of the run; None leaves them out.
        public_key: Who must have signed it, in hexadecimal; None: whoever, or nobody.

    Returns:
        All checks, also those after one that failed; only what cannot be read at all ends the list
        early.
    """
    checks = [*content_checks(certificate, previous, public_key)]
    try:
        request = Request.parse(certificate.request)
        checks += _model(certificate, request, read_model(model_file))
        if holdings is not None:
            checks += _data(certificate, request, previous, holdings)
    except ClfedError as error:
        checks.append(Check("files", False, str(error)))
    return checks


def content_checks(
    certificate: Certificate, previous: Sequence[Certificate], public_key: str | None
) -> Iterator[Check]:
    """Look at a certificate's own content and at its chain, as :func:`verify` does."""
    yield equal("digest", "digest of the content", certificate.digest, certificate.computed_digest)
    signer, signature = certificate.public_key, certificate.signature
    if public_key is not None:
        yield equal("signer", "key of the signature", public_key, signer or "none")
    if signer is not None or signature is not None:
        signed = is_signed(certificate.computed_digest, signature or "", signer or "")
        told = f"signature by key {(signer or 'none')[:16]}"
        yield Check("signature", signed, f"The {told} is {'' if signed else 'not '}valid.")
    yield _chain([*previous, certificate])


def _model(certificate: Certificate, request: Request, model: ModelFile) -> Iterator[Check]:
    yield equal("model", "hash of the model's state", certificate.model_to, model.state_sha256)
    yield equal("file", "hash of the model file", certificate.model_file or "none", model.sha256)
    reads = model.classifier == certificate.classifier
    told = "as certified" if reads else f"read by {model.classifier}, not {certificate.classifier}"
    yield Check("answers", reads, f"The answers of the model are {told}.")
    if request.classes:
        retired = all(name in model.state["retired"] for name in request.classes)
        told = "closed" if retired else "open, expected closed ones"
        yield Check("outputs", retired, f"The outputs of the deleted classes are {told}.")
    if certificate.statistics_to is not None:
        data = model.memory_bytes() or b""
        found = hashlib.sha256(data).hexdigest()
        yield equal("statistics", "hash of the class statistics", certificate.statistics_to, found)
        left = {*request.classes} & {*PrototypeMemory.from_bytes(data).classes}
        told = f"{', '.join(sorted(left))}, expected none of it" if left else "no deleted class"
        yield Check("classes", not left, f"The class statistics hold {told}.")


def _chain(chain: Sequence[Certificate]) -> Check:
    last = chain[-1]
    if last.number != len(chain):
        told = f"Expected {last.number - 1} certificates before number {last.number}, "
        return Check("chain", False, f"{told}got {len(chain) - 1}.")
    for number, one in enumerate(chain, 1):
        before = None if number == 1 else chain[number - 2]
        links: list[tuple[str, object, object]] = [
            ("digest", one.digest, one.computed_digest),
            ("place in the sequence", one.number, number),
            ("digest of the one before", one.previous, before and before.digest),
        ]
        # The rows and folders of a federation change between requests, the data of a run do not.
        if before is not None and one.model_file is not None:
            links += [
                ("model before", one.model_from, before.model_to),
                ("data before", one.data_from, before.data_to),
            ]
        for what, stated, found in links:
            if stated != found:
                return equal("chain", f"{what} of certificate {number}", str(stated), str(found))
    return Check("chain", True, f"The chain of {len(chain)} certificates is whole.")


def _data(
    certificate: Certificate, request: Request, previous: Sequence[Certificate], holdings: Holdings
) -> Iterator[Check]:
    gone, goes = deleted(holdings, previous), deleted(holdings, [certificate])
    same = sample_hashes(holdings, goes) == certificate.deleted
    told = "are those of the data" if same else "are not those of the data, expected the same"
    yield Check("samples", same, f"The {len(certificate.deleted)} deleted images {told}.")
    for name, stated, left in (
        ("data before", certificate.data_from, ~gone),
        ("data after", certificate.data_to, ~(gone | goes)),
    ):
        found = holdings.train.subset(left).fingerprint
        yield equal(name, "fingerprint of the training images", stated or "none", found)
    meant = resolve(request, holdings, holdings.ids[gone])
    fits = torch.equal(meant, holdings.ids[goes].sort().values)
    told = "these were deleted" if fits else "others were deleted"
    yield Check("request", fits, f"The request means {len(meant)} images, and {told}.")


def equal(name: str, what: str, told: str, found: str) -> Check:
    """Compare what a certificate tells with what was found."""
    if told == found:
        return Check(name, True, f"The {what} is {_short(told)}.")
    return Check(name, False, f"Expected as {what} {_short(told)}, got {_short(found)}.")


def _short(text: str) -> str:
    return f"{text[:16]}..." if len(text) > 16 else text
