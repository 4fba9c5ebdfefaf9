"""Every error that clfed raises on purpose: one sentence, one remedy, one exit code.

Code 1 is left to unforeseen failures (a traceback is a bug report) and 2 to the command line
parser's own convention, which wrong configuration shares. ``docs/errors.md`` lists all codes.
"""

from __future__ import annotations


class ClfedError(Exception):
    """Base of all errors that a user can mend.

    Args:
        message: What was expected and what came.
        remedy: What to do; the class's own remedy when omitted.

    Attributes:
        code: Exit code of the ``clfed`` command, unique for each class.
        remedy: What to do about it.
    """

    code: int = 3
    remedy: str = "Run the command again with --help, or report this message."

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        if remedy is not None:
            self.remedy = remedy


class ConfigError(ClfedError):
    """A configuration key, group or value does not exist or does not fit."""

    code = 2
    remedy = "clfed --help lists the groups and their choices."


class MissingData(ClfedError):
    """A data set is not where it was looked for."""

    code = 10
    remedy = "Set data.root to the folder that holds it, or data.download=true."


class CorruptData(ClfedError):
    """A data file exists but cannot be read as what it claims to be."""

    code = 11
    remedy = "Delete the file and fetch it again."


class NotEnoughData(ClfedError):
    """There are fewer classes or images than the protocol needs."""

    code = 12
    remedy = "Ask for fewer classes, shots or test images, or choose a larger data set."


class UnknownClass(ClfedError):
    """A class name is not among the known ones."""

    code = 13
    remedy = "Check the spelling; class names are compared letter by letter."


class InvalidEmbedding(ClfedError):
    """Embeddings are not finite, out of range, or of the wrong shape."""

    code = 20
    remedy = "Check the images and the backbone that made these embeddings."


class EmbeddingMismatch(ClfedError):
    """Statistics of two different embeddings were about to be mixed."""

    code = 21
    remedy = "Give every node the same encoder, or start from an empty memory."


class InvalidMessage(ClfedError):
    """A message or memory file breaks the format: counts, shapes, names or versions."""

    code = 22
    remedy = "Look at the node that sent it; nothing of the message was used."


class UnsupportedStatistics(ClfedError):
    """The memory does not keep the statistics that this operation needs."""

    code = 23
    remedy = "Keep more: memory.moments=shared or memory.moments=class."


class EncoderError(ClfedError):
    """An encoder or checkpoint file is missing, damaged or does not fit the data."""

    code = 30
    remedy = "Delete the file; it is made again from the configuration."


class FederationError(ClfedError):
    """Nodes are missing, late, or answered with an error."""

    code = 40
    remedy = "Look at log.txt in the run folder for the node that failed."


class Unreachable(ClfedError):
    """No server answers at the address within the wait."""

    code = 41
    remedy = "Check that clfed serve runs there, the address, and that no firewall closes the port."


class UntrustedServer(ClfedError):
    """The server's certificate is not one of this federation, or not for this address."""

    code = 42
    remedy = "Check the address; if it is right, ask the operator for a new invitation."


class ExpiredCertificate(ClfedError):
    """A certificate has expired, or is not yet valid by this machine's clock."""

    code = 43
    remedy = "Set this machine's clock; if it is right, the operator has to renew the certificate."


class UnknownNode(ClfedError):
    """The server does not know this node's key: it was revoked or never invited."""

    code = 44
    remedy = "Ask the operator for a new invitation: clfed invite DIR NAME."


class VersionMismatch(ClfedError):
    """Another version of clfed is at the other end, or wrote the file."""

    code = 45
    remedy = "Install the same version of clfed on the server and on all nodes."


class KeyInUse(ClfedError):
    """Another machine is connected with this node's key."""

    code = 46
    remedy = "Stop the other machine, or invite this one under a name of its own."


class RunFolderError(ClfedError):
    """The run folder cannot be used or its results break the schema."""

    code = 50
    remedy = "Choose another run_dir, or free some space."


class RequestError(ClfedError):
    """A request to forget cannot be read, or asks for what cannot be done."""

    code = 60
    remedy = "Name classes, sample ids or a contributor that the training data hold."


class UndeclaredData(ClfedError):
    """An unlearner looked at data that it did not declare."""

    code = 61
    remedy = "Add the kind of data to the unlearner's needs, or leave it alone."


class CertificateError(ClfedError):
    """A certificate is damaged, incomplete, or does not fit what it certifies."""

    code = 62
    remedy = "Keep the certificate together with the files of its run, unchanged."


def by_code(code: int) -> type[ClfedError]:
    """Return the error with an exit code, such as one that another process noted.

    Example:
        >>> by_code(41).__name__
        'Unreachable'
    """
    kinds = [ClfedError]
    for kind in kinds:
        if kind.code == code:
            return kind
        kinds += kind.__subclasses__()
    raise ValueError(f"expected the code of an error, got {code}")
