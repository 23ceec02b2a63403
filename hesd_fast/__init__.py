"""Hessian eigenvalue spectral densities of PyTorch models.

``analyze(model, loss, data)`` gives the density with its type, the generalization criteria and how sure each number is.
"""

from __future__ import annotations

import random
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # pyproject.toml and CMakeLists.txt read it here

_FUNCTIONS = ("analyze", "criteria", "plan")
"""The functions that have the name of the submodule they are in."""

if TYPE_CHECKING:
    from hesd_fast.public import *  # noqa: F403 - the names are listed there
else:
    # Importing the package loads nothing, not even PyTorch: `hesd --help` is there at once.

    def __getattr__(name: str) -> Any:
        """Load a submodule, or all public names together, when the first of them is asked for."""
        if name not in _FUNCTIONS and name.isidentifier() and find_spec(f"{__name__}.{name}"):
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


class _TorchFirst:
    """Imports PyTorch before the extension, whoever imports that: they have to share PyTorch's OpenMP runtime."""

    def find_spec(self, name: str, *_: object) -> None:
        """Find nothing; the finders that come after this one do."""
        if name == f"{__name__}._engine":
            import torch  # noqa: F401


sys.meta_path.insert(0, _TorchFirst())


class _Package(ModuleType):
    """A package in which an imported submodule does not take the place of the function that has its name."""

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute, as Python does with every submodule that it has imported."""
        if name not in _FUNCTIONS or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
