"""What may make products imprecise, as far as the forward pass shows it."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hesd_fast.problem.prepared_problem import PreparedProblem

NARROW = (torch.bfloat16, torch.float16)

CANCELLED = 1e-3
"""Mean loss below which a gradient in float32 is what is left of terms a thousand times larger, and more."""


class _Watch(TorchFunctionMode):
    """Notes what precision operations work in."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device.type
        self.autocast: str | None = None
        self.narrow: set[str] = set()
        self.matmul: str | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function."""
        found = function(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        self.narrow |= {_name(leaf.dtype) for leaf in leaves if leaf.dtype in NARROW}
        if torch.is_autocast_enabled(self._device):
            self.autocast = _name(torch.get_autocast_dtype(self._device))
        if (precision := _matmul_precision()) != "highest":
            self.matmul = precision
        return found


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer interface has been used for it
        return "highest"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _watched(problem: PreparedProblem) -> _Watch:
    """Return what the forward pass of the first batch shows, in a session."""
    watch = _Watch(problem.device)
    with watch:
        problem.first_term().evaluate_moved()
    return watch


def works_in_lower_precision(problem: PreparedProblem) -> bool:
    """Whether parameters or operations of the first batch are in less than float32, in a session."""
    if problem.epsilon > torch.finfo(torch.float32).eps:
        return True
    watch = _watched(problem)
    return bool(watch.narrow) or watch.matmul is not None


def cause_of_imprecision(problem: PreparedProblem, losses: tuple[float, float]) -> str:
    """Return why products are likely imprecise and what to do, in a session; cost: one forward pass.

    Parameters
    ----------
    problem : PreparedProblem
        The problem.
    losses : tuple of float
        The loss in the run's precision, and in the wide one.
    """
    watch = _watched(problem)
    narrow = sorted({_name(p.dtype) for p in problem.parameters.values() if p.dtype in NARROW})
    values = f"the loss is {losses[0]:.6g}, and {losses[1]:.6g} in the wider precision"
    if narrow:
        return f"likely cause: parameters in {' and '.join(narrow)} ({values}); analyse model.float(), or .double()"
    if watch.autocast is not None and watch.narrow:
        return (
            f"likely cause: autocast to {watch.autocast} in the model or the loss ({values}); leave it out for the "
            "analysis"
        )
    if watch.narrow:
        return (
            f"likely cause: operations in {' and '.join(sorted(watch.narrow))} in the model or the loss, attention "
            f"perhaps ({values}); let them work in float32"
        )
    if watch.matmul is not None:
        return (
            f"likely cause: torch.set_float32_matmul_precision({watch.matmul!r}) in the model or the loss, which "
            f"rounds the factors of float32 products ({values}); leave it out"
        )
    if abs(losses[1]) < CANCELLED:
        return (
            f"likely cause: a loss near zero ({values}), whose derivatives cancel, as softmax minus one-hot labels does"
            " in float32: what is left of it is rounding; give model and data in float64, or a loss that does not "
            "cancel, as hesd.losses.supervised(torch.nn.CrossEntropyLoss())"
        )
    return (
        f"likely cause: rounding of float32 ({values}), where large numbers cancel, overflow or underflow is near, or "
        "units sit on their kinks; give model and data in float64"
    )
