"""Certificates of unlearning: what was asked, what was deleted, what came of it.

One certificate a request, as a JSON file in one canonical form, so that no byte of it can change
unnoticed. Each carries the digest of the one before it, which makes a chain of a sequence of
requests. A digest shows damage and mix-ups; only a signature shows who issued it. A certificate
says what was done and measured: it is no proof in the sense of differential privacy.

A run certifies a model file and knows its data. Server and nodes of a federation certify their
share of a request without either, see :mod:`clfed.federated.certificates`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from clfed import __version__
from clfed.errors import CertificateError, RunFolderError
from clfed.files import write_file
from clfed.unlearning.model_file import read_model, save_model
from clfed.unlearning.report import Report
from clfed.unlearning.requests import Request
from clfed.unlearning.signatures import Signer

if TYPE_CHECKING:
    from clfed.data.benchmark import ImageSet
    from clfed.learners.base import ContinualLearner
    from clfed.scenarios.holdings import Holdings

FORMAT = 1
FILE, MODEL = "certificate.json", "model.pt"


@dataclass(frozen=True)
class Certificate:
    """What is certified of one request; all hashes are SHA-256 in hexadecimal.

    Attributes:
        format: Version of this form.
        clfed: Version of the program.
        time: Of the issue, ISO 8601, UTC.
        number: Place in the sequence of requests, from 1.
        request: As in a file of requests.
        deleted: Hash of pixels and class name of each deleted sample, by its id; in a federation
            the number of deleted examples, at the server by node and at a node by SHA-256 of the
            file.
        unlearner: Name of the method.
        settings: Its settings.
        exact: Whether an algorithm guarantees the result, for what ``scope`` names.
        scope: What is as if the forget set had never been seen.
        touched: Distinct samples that were looked at, by kind of data.
        model_from: State of the model before; at a federation's server of the ledger, at its nodes
            of the frozen embedding.
        model_to: State of the model after.
        model_file: The file that holds it; None in a federation.
        classifier: What the model's answers are read off its class statistics by; None: a head.
        statistics_from: Class statistics before; None where there are none.
        statistics_to: Class statistics after.
        data_from: Fingerprint of the training images before; None where they are not known.
        data_to: Fingerprint of the training images that stay.
        evidence: Measures by name, each with its ``value`` and that of the ``oracle``.
        previous: Digest of the certificate before it; None for the first.
        public_key: Of who signed, in hexadecimal; None where nobody did.
        digest: Hash of all of the above.
        signature: Of the digest, in hexadecimal.
    """

    format: int
    clfed: str
    time: str
    number: int
    request: dict[str, Any]
    deleted: dict[str, Any]
    unlearner: str
    settings: dict[str, Any]
    exact: bool
    scope: str
    touched: dict[str, Any]
    model_from: str
    model_to: str
    model_file: str | None
    classifier: dict[str, Any] | None
    statistics_from: str | None
    statistics_to: str | None
    data_from: str | None
    data_to: str | None
    evidence: dict[str, Any]
    previous: str | None = None
    public_key: str | None = None
    digest: str = ""
    signature: str | None = None

    @cached_property
    def computed_digest(self) -> str:
        """The digest that the content has."""
        content = asdict(self)
        del content["digest"], content["signature"]
        return hashlib.sha256(_canonical(content)).hexdigest()

    def to_bytes(self) -> bytes:
        """Return the one form that a file may have."""
        return _canonical(asdict(self))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, all or none.

        Raises:
            RunFolderError: It cannot be written.
        """
        write_file(path, self.to_bytes())


def certify(
    folder: str | os.PathLike[str], *, model: ContinualLearner, **content: Any
) -> Certificate:
    """Write the model that a request led to, and its certificate, into a folder of their own.

    Args:
        folder: Made where it is absent, such as ``requests/01-r1``.
        model: The result.
        content: What :func:`issue` takes, less the model file.

    Raises:
        RunFolderError: A file cannot be written.
        CertificateError: As :func:`issue`.
    """
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"Expected to write into {place}, got: {error.strerror}.") from error
    save_model(place / MODEL, model)
    certificate = issue(model_file=place / MODEL, **content)
    certificate.save(place / FILE)
    return certificate


def issue(
    *,
    request: Request,
    gone: Tensor,
    holdings: Holdings,
    settings: Mapping[str, Any],
    report: Report,
    model_file: str | os.PathLike[str],
    evidence: Mapping[str, float | None],
    oracle: Mapping[str, Mapping[str, float | None]] | None = None,
    previous: Sequence[Certificate] = (),
    signing_key: str | os.PathLike[str] | None = None,
) -> Certificate:
    """Certify one request that was carried out.

    Args:
        request: What was asked.
        gone: ``(M,)`` int64, the samples that it meant.
        holdings: The data.
        settings: Of the unlearner, plain values.
        report: Its account; where class statistics changed, ``lineage`` holds their hashes.
        model_file: Where :func:`~clfed.unlearning.model_file.save_model` wrote the result.
        evidence: Measures of the result, by name.
        oracle: Measures of retrained models, by name; each with its ``mean``.
        previous: The certificates before it in the sequence, first to last.
        signing_key: PEM file of an Ed25519 key; None: not signed.

    Raises:
        CertificateError: The model file is not that of the report, or the key cannot be used.
    """
    model = read_model(model_file)
    if model.state_sha256 != report.after:
        raise CertificateError(
            f"Expected the model that request {request.id!r} led to in {model_file}, got another."
        )
    stays = ~deleted(holdings, previous)
    goes = stays & torch.isin(holdings.ids, gone)
    certificate = Certificate(
        format=FORMAT,
        clfed=__version__,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        number=len(previous) + 1,
        request=request.plain(),
        deleted=sample_hashes(holdings, goes),
        unlearner=report.unlearner,
        settings=_plain(settings),
        exact=report.exact,
        scope=report.scope,
        touched=_plain(report.touched),
        model_from=report.before,
        model_to=report.after,
        model_file=model.sha256,
        classifier=_plain(model.classifier),
        statistics_from=report.lineage.get("statistics_from"),
        statistics_to=report.lineage.get("statistics_to"),
        data_from=holdings.train.subset(stays).fingerprint,
        data_to=holdings.train.subset(stays & ~goes).fingerprint,
        evidence={
            name: {
                "value": _plain(value),
                "oracle": _plain((oracle or {}).get(name, {}).get("mean")),
            }
            for name, value in evidence.items()
        },
        previous=previous[-1].digest if previous else None,
    )
    return sealed(certificate, signing_key)


def sealed(certificate: Certificate, signing_key: str | os.PathLike[str] | None) -> Certificate:
    """Return a certificate with its digest, signed where there is a key.

    Raises:
        CertificateError: The key cannot be used.
    """
    signer = None if signing_key is None else Signer(signing_key)
    named = replace(certificate, public_key=None if signer is None else signer.public_key)
    digest = named.computed_digest
    return replace(named, digest=digest, signature=None if signer is None else signer.sign(digest))


def read(path: str | os.PathLike[str]) -> Certificate:
    """Read a certificate, believing nothing of its content; :func:`verify` says whether it holds.

    Raises:
        CertificateError: There is no such file, or it is damaged or of another form.
    """
    try:
        data = Path(path).read_bytes()
        content = json.loads(data)
        fits = isinstance(content, dict) and content.keys() == _KINDS.keys()
        fits = fits and all(isinstance(content[key], kinds) for key, kinds in _KINDS.items())
        if not fits or content["format"] != FORMAT:
            raise ValueError(f"no certificate of form {FORMAT}")
        certificate = Certificate(**content)
        if certificate.to_bytes() != data:
            raise ValueError("another spelling than the one that clfed writes")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CertificateError(f"Expected a certificate at {path}, got: {reason}.") from error
    return certificate


def sample_hashes(holdings: Holdings, rows: Tensor) -> dict[str, str]:
    """Return the hash of pixels and class name of some training images, by sample id.

    Args:
        holdings: The data.
        rows: ``(N,)`` bool.
    """
    ids = map(str, holdings.ids[rows].tolist())
    return dict(zip(ids, _hashes(holdings.train.subset(rows)), strict=True))


def deleted(holdings: Holdings, certificates: Sequence[Certificate]) -> Tensor:
    """Return which training images some certificates name as deleted, ``(N,)`` bool."""
    names = {name for one in certificates for name in one.deleted}
    return torch.tensor([str(i) in names for i in holdings.ids.tolist()], dtype=torch.bool)


def _hashes(images: ImageSet) -> list[str]:
    pixels = images.images.contiguous().numpy()
    form = f"{pixels.dtype} {pixels.shape[1:]} "
    starts = [hashlib.sha256(f"{form}{name}\n".encode()) for name in images.classes]
    found = []
    for image, label in zip(pixels, images.labels.tolist(), strict=True):
        digest = starts[label].copy()
        digest.update(image.data)
        found.append(digest.hexdigest())
    return found


def _canonical(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def _plain(value: Any) -> Any:
    """What JSON holds of a value: measures that are no numbers become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [*map(_plain, value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if isinstance(value, str | int | NoneType) else str(value)


def _kinds(hint: Any) -> tuple[type, ...]:
    choices = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return tuple(get_origin(choice) or choice for choice in choices)


_HINTS = get_type_hints(Certificate)
_KINDS = {field.name: _kinds(_HINTS[field.name]) for field in fields(Certificate)}
