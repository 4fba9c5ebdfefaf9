"""What nodes send, read without trust: names and tables of numbers that must be as expected."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from clfed.errors import InvalidMessage
from clfed.federated import records
from clfed.prototypes.tables import checked_names


def class_names(text: str) -> tuple[str, ...]:
    """Return class names from JSON.

    Raises:
        InvalidMessage: It is anything but a list of printable names, each once.
    """
    try:
        classes = checked_names(json.loads(text), "class name")
    except (ValueError, RecursionError) as error:
        raise InvalidMessage(f"expected class names as JSON: {error}") from error
    if len(set(classes)) < len(classes):
        raise InvalidMessage("expected every class once")
    return classes


def table(
    record: ArrayRecord, key: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> NDArray[Any]:
    """Return an array of one type and shape; the bytes before its numbers are compared, not read.

    Raises:
        InvalidMessage: It is missing or of another type or shape.
    """
    array = records.array(record, key)
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": dtype.str, "fortran_order": False, "shape": shape}
    )
    header, numbers = stream.getvalue(), math.prod(shape) * dtype.itemsize
    fits = len(array.data) == len(header) + numbers and array.data.startswith(header)
    if array.stype != "numpy.ndarray" or not fits:
        raise InvalidMessage(f"expected {key!r} of shape {shape} and {dtype}, got another array")
    return np.frombuffer(array.data, dtype, offset=len(header)).reshape(shape)
