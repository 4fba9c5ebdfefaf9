"""Names in a federation folder, and the schemas of its files, without anything heavy to import.

:mod:`clfed.deploy.federation` says what each is for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clfed.errors import InvalidMessage, MissingData, VersionMismatch
from clfed.files import read_file

SETTINGS, ENCODER, LEDGER = "federation.json", "encoder.safetensors", "ledger.db"
NODES, FLOWER = "nodes", "flower"
SETTINGS_SCHEMA = 1
LEDGER_SCHEMA = 1


def no_answer(number: int) -> str:
    """The note on a node that was asked in a round and did not answer in time."""
    return f"no answer in round {number}"


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the content of a federation's settings, the schema left out.

    The texts ``name``, ``id``, ``address``, ``embedding`` and ``clfed`` are there;
    :meth:`clfed.deploy.federation.Federation.open` looks at the rest.

    Raises:
        MissingData: The folder holds no federation.
        InvalidMessage: Its settings are damaged.
        VersionMismatch: Another version of clfed made it.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise MissingData(
            f"Expected a federation at {folder}, found none.",
            remedy="Make one: clfed create DIR --address HOST:PORT",
        )
    try:
        content: dict[str, Any] = json.loads(read_file(path))
        schema = content.pop("schema")
        texts = [content[key] for key in ("name", "id", "address", "embedding", "clfed")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidMessage(
            f"Expected the settings of a federation in {path}, got something else: {error}.",
            remedy="Restore the file from a backup.",
        ) from error
    if schema != SETTINGS_SCHEMA or not all(isinstance(text, str) for text in texts):
        raise VersionMismatch(
            f"Expected a federation of schema {SETTINGS_SCHEMA} at {folder}, got one of "
            f"{schema!r} that clfed {content['clfed']} made."
        )
    return content
