"""Certificates of requests to forget in a federation: one at the server, one at each node.

They lie in ``certificates/NN-ID.json`` of the federation folder or the state directory and make one
chain there, in the order in which requests were finished. A key in ``signing.pem`` (Ed25519, see
:mod:`clfed.unlearning.signatures`) beside that folder signs them. None of them names a picture but
by the SHA-256 of its file.

A node certifies its own share when it has carried a request out. The server certifies the whole
when every node has confirmed and holds a merged memory of afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clfed import __version__
from clfed.errors import CertificateError, RunFolderError
from clfed.unlearning.certificate import FORMAT, Certificate, read, sealed

if TYPE_CHECKING:
    from clfed.federated.forgetting import CarriedOut
    from clfed.federated.pictures import Album
    from clfed.prototypes import PrototypeMemory
    from clfed.unlearning.requests import Request

CERTIFICATES, SIGNING_KEY = "certificates", "signing.pem"
SERVER, NODE = "server", "node"
_FILE = re.compile(r"([0-9]{2,})-(.+)\.json")
_NODE_SCOPE = (
    "The rows and kept embeddings of this node, byte for byte; the files in its folder are its "
    "owner's, and the frozen embedding keeps whatever it was trained on."
)


class Place(NamedTuple):
    """One file of a chain."""

    number: int
    request: str
    name: str
    folder: Path

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.folder / self.name


def places(directory: Path) -> list[Place]:
    """Return the certificates of a federation folder or state directory, in their order."""
    folder = directory / CERTIFICATES
    names = os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208 (paths are slow to make)
    matches = filter(None, map(_FILE.fullmatch, names))
    return sorted(Place(int(match[1]), match[2], match[0], folder) for match in matches)


def certify(
    directory: Path,
    request: Request,
    *,
    federation: str,
    place: str,
    settings: Mapping[str, Any],
    evidence: Mapping[str, int],
    **content: Any,
) -> Certificate:
    """Write the certificate of a request, once: what a killed process had written stays.

    Args:
        directory: The federation folder or state directory.
        request: What was asked.
        federation: Id of the federation.
        place: :data:`SERVER` or :data:`NODE`.
        settings: Under which it was carried out, plain values.
        evidence: Numbers by name.
        content: The other fields of :class:`~clfed.unlearning.certificate.Certificate` that say
            what was removed, from what, and what came of it.

    Raises:
        CertificateError: The last certificate of the chain or the key is damaged.
        RunFolderError: The file cannot be written.
    """
    chain = places(directory)
    for known in (read(there.path) for there in chain if there.request == request.id):
        if known.request == request.plain() and known.settings.get("federation") == federation:
            return known
    number = chain[-1].number + 1 if chain else 1
    certificate = sealed(
        Certificate(
            format=FORMAT,
            clfed=__version__,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            number=number,
            request=request.plain(),
            unlearner="exact",
            settings={"federation": federation, "place": place, **settings},
            exact=True,
            model_file=None,
            classifier=None,
            evidence={name: {"value": value, "oracle": None} for name, value in evidence.items()},
            previous=read(chain[-1].path).digest if chain else None,
            **content,
        ),
        key if (key := directory / SIGNING_KEY).is_file() else None,
    )
    folder = directory / CERTIFICATES
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"Expected to write into {folder}, got: {error.strerror}.") from error
    certificate.save(folder / f"{number:02d}-{request.id}.json")
    return certificate


def certify_node(
    directory: Path,
    carried: CarriedOut,
    *,
    federation: str,
    rows: tuple[PrototypeMemory, PrototypeMemory],
    folder: tuple[Album, Album],
) -> Certificate:
    """Write a node's certificate of its own share.

    Args:
        directory: Its state directory.
        carried: What the request meant here.
        federation: Id of the federation.
        rows: The node's own rows before and after the message that carries the request out.
        folder: What the folder counted before and after.

    Raises:
        CertificateError: As :func:`certify`.
        RunFolderError: As :func:`certify`.
    """
    before, after = rows
    return certify(
        directory,
        carried.request,
        federation=federation,
        place=NODE,
        settings={"moments": after.moments},
        evidence={"examples": carried.examples, "examples left": after.total_count},
        scope=_NODE_SCOPE,
        deleted=dict(carried.removed),
        touched={},
        model_from=before.embedding_id,
        model_to=after.embedding_id,
        statistics_from=before.sha256(),
        statistics_to=after.sha256(),
        data_from=fingerprint(folder[0]),
        data_to=fingerprint(folder[1]),
    )


def fingerprint(album: Album) -> str:
    """SHA-256 over class and content of all files of a folder, whatever they are called."""
    pairs = sorted([album.labels[place], stamp[2]] for place, stamp in album.files.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def before(path: Path, certificate: Certificate) -> Iterator[Certificate]:
    """Read the certificates before one in its chain.

    Raises:
        CertificateError: One is missing, there twice, or damaged.
    """
    chain = places(path.absolute().parent.parent)
    for number in range(1, certificate.number):
        there = [place.path for place in chain if place.number == number]
        if len(there) != 1:
            raise CertificateError(
                f"Expected one certificate number {number} in {path.parent}, got {len(there)}."
            )
        yield read(there[0])
