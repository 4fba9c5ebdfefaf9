"""Gauge: seconds and memory of a block, where the system tells."""

import time

import numpy as np
import pytest

from clfed.federated import gauge
from clfed.federated.gauge import Gauge

MEGABYTE = 2**20
linux = pytest.mark.skipif(
    not (gauge._SELF / "clear_refs").exists(), reason="the system does not measure memory"
)


def fill(megabytes: int) -> np.ndarray:
    """Memory that is really taken: untouched pages would not count."""
    return np.ones(megabytes * MEGABYTE, np.uint8)


@linux
def test_memory_of_a_large_array_is_seen_although_it_is_gone_at_the_end():
    with Gauge() as measured:
        fill(100)
    assert 95 * MEGABYTE < measured.peak < 130 * MEGABYTE


@linux
def test_what_was_there_before_does_not_count_and_each_block_starts_again():
    kept = fill(100)
    with Gauge() as measured:
        fill(64)  # smaller blocks may be served from what the process has kept
    assert 59 * MEGABYTE < measured.peak < 94 * MEGABYTE
    with Gauge() as measured:
        pass
    assert 0 <= measured.peak < 10 * MEGABYTE
    assert len(kept) == 100 * MEGABYTE


def test_seconds_are_those_of_the_block():
    measured = Gauge()
    assert measured.seconds == 0
    with measured:
        time.sleep(0.05)
    assert 0.05 <= measured.seconds < 5


def test_a_block_that_fails_is_measured_and_fails():
    with pytest.raises(ZeroDivisionError), Gauge() as measured:
        _ = 1 / 0
    assert measured.seconds > 0


@pytest.mark.parametrize("files", [(), ("clear_refs",), ("clear_refs", "status")])
def test_memory_is_not_made_up_where_the_system_does_not_tell(monkeypatch, tmp_path, files):
    for name in files:
        (tmp_path / name).write_text("Name:\tsomething else\n")
    monkeypatch.setattr(gauge, "_SELF", tmp_path if files else tmp_path / "missing")
    with Gauge() as measured:
        time.sleep(0.001)
    assert measured.peak is None and measured.seconds > 0
