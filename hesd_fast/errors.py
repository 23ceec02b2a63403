"""The exceptions and the warning of hesd-fast.

Every message says what was wrong, the value that was got, what is wanted and what to do about it.
"""

from __future__ import annotations

import dis
from pathlib import Path


class HESDError(Exception):
    """Base class of every error that hesd-fast raises on purpose."""


class ProblemError(HESDError):
    """The model, the loss, the data, the parameter selection or an option cannot be used."""


class OperatorError(HESDError):
    """A curvature product cannot be computed, or is not the product of one fixed symmetric matrix."""


class EngineError(HESDError):
    """The compiled engine was given a panel it cannot use, or a device failed."""


class NumericalError(EngineError):
    """The compiled engine met numbers that are not finite, or too large or too small to be squared."""


class PlanError(HESDError):
    """The analysis asked for does not fit the machine."""


class CheckpointError(HESDError):
    """A saved report cannot be read."""


class HESDWarning(UserWarning):
    """Something that may be wrong: a check of the run failed, or an input looks like a mistake."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


_LIBRARIES = ("torch", "functorch", Path(__file__).parent.name)


def raised_outside_of_libraries(error: BaseException) -> bool:
    """Whether a ``raise`` or ``assert`` in code that is neither PyTorch's nor ours raised an error.

    What PyTorch refuses under its transforms is raised in its own code, or by an operation without a Python frame.
    """
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    frame = trace.tb_frame
    module = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    instruction = frame.f_code.co_code[trace.tb_lasti]
    return module not in _LIBRARIES and dis.opname[instruction] == "RAISE_VARARGS"
