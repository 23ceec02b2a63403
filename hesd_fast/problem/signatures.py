"""Whether a function of the user's takes the arguments that it will be given, before it is called."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def signature_of(function: Any) -> inspect.Signature | None:
    """Return the signature of a function, or of the forward method of a module; None if it has none to be seen."""
    try:
        return inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):  # some functions written in C have none
        return None


def takes(signature: inspect.Signature, *arguments: Any, **options: Any) -> bool:
    """Whether a function with that signature can be called with these arguments."""
    return not refusal(signature, *arguments, **options)


def refusal(signature: inspect.Signature, *arguments: Any, **options: Any) -> str:
    """Return why a function with that signature cannot be called with these arguments; "" if it can."""
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        return str(error)
    return ""
