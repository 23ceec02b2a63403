"""The exceptions and the warning of hesd-fast.

Every message says what was wrong, the value that was got, what is wanted and what to do about it.
"""

from __future__ import annotations


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
