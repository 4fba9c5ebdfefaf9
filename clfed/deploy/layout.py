"""Names in a federation folder, and the schemas of its files, without anything heavy to import.

:mod:`clfed.deploy.federation` says what each is for.
"""

from __future__ import annotations

SETTINGS, ENCODER, LEDGER = "federation.json", "encoder.safetensors", "ledger.db"
NODES, CERTIFICATES, FLOWER = "nodes", "certificates", "flower"
SETTINGS_SCHEMA = 1
LEDGER_SCHEMA = 1


def no_answer(number: int) -> str:
    """The note on a node that was asked in a round and did not answer in time."""
    return f"no answer in round {number}"
