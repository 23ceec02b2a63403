"""The exceptions and the warning of hesd-fast.

Every message says what was wrong, the value that was got, what is wanted and what to do about it.
"""

from __future__ import annotations

import dis
from pathlib import Path


class HESDError(Exception):
    """Base class of every error that hesd-fast raises on purpose.

    Examples
    --------
    >>> import hesd_fast as hesd
    >>> try:
    ...     hesd.plan("model")
    ... except hesd.HESDError as error:
    ...     print(error)
    plan got str; give a Problem, as in Problem(model, loss, data)
    """


class ProblemError(HESDError):
    """The model, the loss, the data, the parameter selection or an option cannot be used.

    Examples
    --------
    >>> import torch, hesd_fast as hesd
    >>> hesd.block_lanczos(torch.eye(4), steps=0)
    Traceback (most recent call last):
    ...
    hesd_fast.errors.ProblemError: steps is 0; wanted at least 1
    """


class OperatorError(HESDError):
    """A curvature product cannot be computed, or is not the product of one fixed symmetric matrix.

    Examples
    --------
    >>> import torch, hesd_fast as hesd
    >>> hesd.block_lanczos(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    hesd_fast.errors.OperatorError: the matrix is not symmetric: it differs from its transpose by 1, ...
    """


class EngineError(HESDError):
    """The compiled engine was given a panel it cannot use, or a device failed.

    Examples
    --------
    >>> import torch, hesd_fast as hesd
    >>> hesd.kernels.panel_gram(torch.ones(2, 3), torch.ones(1, 4))
    Traceback (most recent call last):
    ...
    hesd_fast.errors.EngineError: `V` has vectors of 3 elements and `W` of 4; wanted the same length
    """


class NumericalError(EngineError):
    """The compiled engine met numbers that are not finite, or too large or too small to be squared.

    Examples
    --------
    >>> import torch, hesd_fast as hesd
    >>> hesd.kernels.panel_orthonormalize(torch.full((1, 3), float("inf")))
    Traceback (most recent call last):
    ...
    hesd_fast.errors.NumericalError: `W` has non-finite values; wanted finite vectors
    """


class PlanError(HESDError):
    """The analysis asked for does not fit the machine.

    Examples
    --------
    >>> import types, torch, hesd_fast as hesd
    >>> where = {"dtype": torch.float32, "device": torch.device("cpu")}
    >>> huge = types.SimpleNamespace(size=10**13, products=0, matmat=lambda panel, out=None: panel, **where)
    >>> hesd.block_lanczos(huge, steps=9, block_size=1, basis="memory")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    hesd_fast.errors.PlanError: the Lanczos basis takes 372529.0 GiB (7 vectors of 10000000000000 float32, ...
    """


class CheckpointError(HESDError):
    """A saved report cannot be read.

    Examples
    --------
    >>> import hesd_fast as hesd
    >>> hesd.load_report("no-such-file")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    hesd_fast.errors.CheckpointError: 'no-such-file' cannot be read as a report: ...
    """


class HESDWarning(UserWarning):
    """Something that may be wrong: a check of the run failed, or an input looks like a mistake.

    Examples
    --------
    >>> import warnings, hesd_fast as hesd
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", hesd.HESDWarning)  # in here the first one ends the run
    ...     warnings.warn("the check of weights failed", hesd.HESDWarning)
    Traceback (most recent call last):
    ...
    hesd_fast.errors.HESDWarning: the check of weights failed
    """


class ToleranceWarning(HESDWarning):
    """All the products that may be taken are taken, and a number is less certain than was asked for.

    Examples
    --------
    >>> import torch, warnings, hesd_fast as hesd
    >>> loss, data = hesd.losses.supervised(torch.nn.MSELoss()), (torch.eye(60), torch.ones(60, 1))
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", hesd.ToleranceWarning)
    ...     hesd.analyze(
    ...         torch.nn.Linear(60, 1), loss, data, max_steps=2, tolerance={"k_mass": 1e-9}
    ...     )  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    hesd_fast.errors.ToleranceWarning: the tolerance is not met after 4 probes x 2 steps ...
    """


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
