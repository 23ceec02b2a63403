"""Hessian eigenvalue spectral densities of PyTorch models.

``analyze(model, loss, data)`` gives the density with its type, the generalization criteria and how sure each number is.
"""

from __future__ import annotations

import random
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # pyproject.toml and CMakeLists.txt read it here

if TYPE_CHECKING:
    from hesd_fast.public import *  # noqa: F403 - the names are listed there
else:
    # Importing the package loads nothing, not even PyTorch: `hesd --help` is there at once.

    def __getattr__(name: str) -> Any:
        """Load a submodule, or all public names together, when the first of them is asked for."""
        if name.isidentifier() and find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")
        if name == "__all__" or not name.startswith("_"):
            state = random.getstate()  # other packages draw random numbers when they are imported
            try:
                public = import_module(f"{__name__}.public")
            finally:
                random.setstate(state)
            for each in ("__all__", *public.__all__):
                globals().setdefault(each, getattr(public, each))
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__() -> list[str]:
        """Return all names, also those that were not loaded yet."""
        __getattr__("__all__")
        return sorted(globals())
