"""Dataclasses read back from JSON: every field of its own kind, or an error that names it."""

from __future__ import annotations

import math
import reprlib
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from hesd_fast.errors import CheckpointError, HESDError
from hesd_fast.estimate import Estimate

T = TypeVar("T")

INTEGERS = (-(2**63), 2**64 - 1)
"""The integers that are read: those of 64 bits, with a sign or without."""

MAY_BE_MISSING = {"may_be_missing": True}
"""Metadata of a field that files need not have; all others they must."""


def read_record(kind: type[T], value: Any, where: str = "") -> T:
    """Return the dataclass that a JSON value describes.

    Fields may be ``str``, ``bool``, ``int``, ``float``, an `Enum` (by name), an array (as a list of rows), another
    dataclass, ``X | None``, ``tuple[X, ...]`` or ``dict[str, X]``. Numbers are finite, but for those of an `Estimate`,
    which may be the words ``"inf"`` and ``"-inf"``. An integer may stand for a float; nothing else is converted.

    Parameters
    ----------
    kind : type
        The dataclass.
    value : Any
        What ``json.loads`` gave.
    where : str
        Name of the value, for messages.

    Raises
    ------
    CheckpointError
        If a field is missing, unknown, of another kind, or refused by its dataclass. The message begins with its name.
    """
    entries = _mapping(value, where)
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for name in entries:
        if name not in known:
            raise CheckpointError(f"{_inside(where, shown(name))} is no field; known are {', '.join(known)}")
    arguments = {}
    for name, field in known.items():
        if name in entries:
            arguments[name] = _read(hints[name], entries[name], _inside(where, name), finite=kind is not Estimate)
        elif not field.metadata.get("may_be_missing"):
            raise CheckpointError(f"{_inside(where, name)} is missing")
    try:
        return kind(**arguments)
    except (HESDError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}" if where else str(error)) from error


def shown(value: Any) -> str:
    """Return a short text for a value of any kind and size."""
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object with {len(value)} fields"
    if isinstance(value, int) and not INTEGERS[0] <= value <= INTEGERS[1]:
        return f"an integer of {value.bit_length()} bits"
    return reprlib.repr(value)


def _read(kind: Any, value: Any, where: str, finite: bool) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        (kind,) = (one for one in get_args(kind) if one is not types.NoneType)
        return None if value is None else _read(kind, value, where, finite)
    if origin is tuple:
        item = get_args(kind)[0]
        return tuple(_read(item, one, f"{where}[{i}]", finite) for i, one in enumerate(_list(value, where)))
    if origin is dict:
        item = get_args(kind)[1]
        entries = _mapping(value, where)
        return {name: _read(item, one, _inside(where, shown(name)), finite) for name, one in entries.items()}
    if get_origin(getattr(origin, "__value__", kind)) is np.ndarray:  # NumPy 2.5 has an alias by that name
        return _matrix(value, where)
    if is_dataclass(kind):
        return read_record(kind, value, where)  # type: ignore[arg-type]
    if issubclass(kind, Enum):
        return _member(kind, value, where)
    return _scalar(kind, value, where, finite)


def _scalar(kind: type, value: Any, where: str, finite: bool) -> Any:
    if kind is float:
        return _number(value, where, finite)
    wanted = {str: "a text", bool: "true or false", int: "an integer"}[kind]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(f"{where} is {shown(value)}; wanted {wanted}")
    if isinstance(value, int) and not INTEGERS[0] <= value <= INTEGERS[1]:
        raise CheckpointError(f"{where} is {shown(value)}; wanted one of at most 64")
    return value


def _number(value: Any, where: str, finite: bool) -> float:
    if not finite and value in ("inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"{where} is {shown(value)}; wanted a number")
    if isinstance(value, int) and not INTEGERS[0] <= value <= INTEGERS[1]:
        raise CheckpointError(f"{where} is {shown(value)}; wanted one of at most 64, or a float")
    number = float(value)
    if math.isnan(number) or (finite and math.isinf(number)):
        raise CheckpointError(f"{where} is {number}; wanted a finite number")
    return number


def _matrix(value: Any, where: str) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    rows = [_list(row, f"{where}[{i}]") for i, row in enumerate(_list(value, where))]
    width = len(rows[0]) if rows else 0
    for i, row in enumerate(rows):
        if len(row) != width:
            raise CheckpointError(f"{where}[{i}] has {len(row)} numbers; wanted {width}, as in the first row")
    numbers = [[_number(x, f"{where}[{i}][{j}]", True) for j, x in enumerate(row)] for i, row in enumerate(rows)]
    return np.array(numbers, dtype=np.float64).reshape(len(rows), width)


def _member(kind: type[Enum], value: Any, where: str) -> Enum:
    names = list(kind.__members__)
    if not isinstance(value, str) or value not in names:
        raise CheckpointError(f"{where} is {shown(value)}; wanted one of {', '.join(names)}")
    return kind[value]


def _list(value: Any, where: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise CheckpointError(f"{where} is {shown(value)}; wanted a list")
    return value


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{where or 'the content'} is {shown(value)}; wanted an object with named fields")
    return value


def _inside(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
