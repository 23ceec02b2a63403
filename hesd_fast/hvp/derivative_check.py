"""Whether PyTorch's second derivative of a loss is the derivative of its first, which nothing else would notice.

A function that keeps an intermediate result of its forward pass, a kernel whose backward pass leaves no graph, or a
hook has right first derivatives and second ones that are not theirs, symmetric to the last bit. So the product with one
vector is compared with differences of gradients of one batch, parameter by parameter.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from hesd_fast.errors import HESDWarning, OperatorError, first_line, raised_outside_of_libraries
from hesd_fast.hvp.derivative_causes import causes_of_wrong_derivatives, has_kinks
from hesd_fast.hvp.differences import central_difference, length_of_weights
from hesd_fast.hvp.second_derivatives import product_along_gradient
from hesd_fast.memory import available_memory
from hesd_fast.parameters import norm_of
from hesd_fast.problem import LossTerm, Problem

STEP = 5e-4
"""Length of a step in float32, relative to the norm of the weights."""

STEPS_IN_FLOAT64 = (1e-9, 1e-8, 1e-7)
"""The same in float64: so short that hardly a unit passes its kink, and rounding is still far below the differences."""

LONG_STEPS = (3e-3, 1e-3, 3e-4)
"""The same where float64 cannot be had."""

ROUNDING = 16.0
"""Product along a vector of the weights' length, in machine epsilons of the loss, that is nothing but rounding."""

ALLOWED = {torch.float32: (2e-2, 1e-3), torch.float64: (1e-3, 1e-5)}
"""Deviation relative to a parameter's part of the product, and to the whole product, that is no deviation."""

CONSISTENT = 1e-2
"""Difference of two steps' results, relative to how far both are from the product, at which the product is wrong."""

CLEARLY_WRONG = 0.1
"""The same of steps in float32, and how far the product must be off there, relative to its norm."""

LEAST_COARSE = 1e-3
"""Relative difference of a loss in float64 from that in the model's precision that says nothing."""

COPIES = 12
"""Float64 vectors of n that the check may take in all, beside the graph of one batch."""


@dataclass(frozen=True)
class DerivativeCheck:
    """What the comparison found.

    Attributes
    ----------
    agrees : bool or None
        Whether products are derivatives of gradients; None where it could not be told, as among many kinks in float32.
    detail : str
        What was compared, and how far apart it is; where they disagree, likely causes and what to do.
    """

    agrees: bool | None
    detail: str


Parts = list[Tensor]
"""One tensor for each selected parameter."""


def check_derivatives(problem: Problem) -> DerivativeCheck:
    """Compare the product of the first batch's Hessian and one vector with differences of gradients, once a problem.

    Cost: two gradients of one batch where that settles it in float32; else, as for networks with kinks, a product and
    two to six gradients in float64.

    Raises
    ------
    OperatorError
        If an operation of model or loss has no second derivative.
    """
    if problem.derivative_check is None:
        term = problem.first_term()
        direction, product = product_along_gradient(problem, term)
        with _quiet():
            problem.derivative_check = _compare(problem, term, direction, problem.unflatten(product))
    return problem.derivative_check


def warn_of_wrong_derivatives(problem: Problem) -> None:
    """Warn, once a problem, where second derivatives are not those of the first ones; the check must have been made."""
    found = problem.derivative_check
    if found is not None and found.agrees is False and not problem.derivative_warning_given:
        problem.derivative_warning_given = True
        warnings.warn(found.detail, HESDWarning, stacklevel=2)


def _compare(problem: Problem, term: LossTerm, direction: Tensor, product: Parts) -> DerivativeCheck:
    length = norm_of([direction])
    if length == 0.0:
        return DerivativeCheck(None, "every parameter is a row of padding, which has no derivative")
    scale = length_of_weights(problem) / length

    def difference(step: float) -> Parts:
        return problem.unflatten(central_difference(problem, term, direction, step * scale))

    if not all(bool(torch.isfinite(part).all()) for part in product):
        return DerivativeCheck(None, "the product is not finite")  # the operator names the place
    allowed = ALLOWED[torch.float64 if problem.epsilon < torch.finfo(torch.float32).eps else torch.float32]
    noise = ROUNDING * problem.epsilon * abs(problem.loss_of(term)) / (scale * scale * length)
    if problem.epsilon == torch.finfo(torch.float32).eps:
        found = difference(STEP)
        if not _deviating(product, found, *allowed) or norm_of(product) + norm_of(found) <= noise:
            return _agreement(product, found, "float32")
    try:
        wide = _LossInFloat64(problem, term, direction, scale)
        found = wide.difference(STEPS_IN_FLOAT64[0])
        if not _deviating(product, found, *allowed) or norm_of(product) + norm_of(found) <= noise:
            return _agreement(product, found, "float64")
        return _with_short_steps(problem, term, wide.product(product), found, wide)
    except Exception as error:  # whatever code says that takes its own precision only
        if problem.dtype == torch.float64 and raised_outside_of_libraries(error):
            raise
        return _with_long_steps(problem, term, product, difference, first_line(error))


def _with_short_steps(
    problem: Problem, term: LossTerm, product: Parts, found: Parts, wide: _LossInFloat64
) -> DerivativeCheck:
    """Compare in float64: one step that agrees decides; two that agree with each other, and not with it, condemn."""
    for step in (None, *STEPS_IN_FLOAT64[1:]):
        previous, found = found, found if step is None else wide.difference(step)
        off = _deviating(product, found, *ALLOWED[torch.float64])
        if not off:
            return _agreement(product, found, "float64")
        # A unit that sits on its kink has another derivative on either side, whatever the step.
        suspects = (
            off & _consistent(previous, found, product, CONSISTENT) & _consistent(*wide.sides, product, CONSISTENT)
        )
        if step is not None and suspects:
            return _disagreement(problem, term, product, found, previous, suspects)
    return DerivativeCheck(
        None,
        "differences of gradients do not settle to anything to compare products with, as where a batch sits on kinks "
        "of the loss",
    )


def _with_long_steps(
    problem: Problem, term: LossTerm, product: Parts, difference: Callable[[float], Parts], reason: str
) -> DerivativeCheck:
    """Compare in the model's own precision, where only smooth losses can be told from wrong derivatives."""
    unclear = f"products could not be compared with gradients in float64: {reason}"
    if problem.epsilon > torch.finfo(torch.float32).eps or has_kinks(term):
        return DerivativeCheck(None, unclear)
    found = [difference(step) for step in LONG_STEPS]
    if max(norm_of(one) for one in (product, *found)) < torch.finfo(torch.float32).tiny / problem.epsilon:
        return DerivativeCheck(None, "the numbers are near underflow; multiply the loss by a power of two")
    if any(not _deviating(product, one, *ALLOWED[torch.float32]) for one in found):
        return _agreement(product, found[-1], "float32")
    suspects = set(range(len(product)))
    for one, other in itertools.pairwise(found):
        suspects &= _consistent(one, other, product, CLEARLY_WRONG)
    suspects &= _deviating(product, found[1], CLEARLY_WRONG, CLEARLY_WRONG)
    if not suspects:
        return DerivativeCheck(None, unclear)
    return _disagreement(problem, term, product, found[1], found[0], suspects)


def _agreement(product: Parts, found: Parts, precision: str) -> DerivativeCheck:
    return DerivativeCheck(
        True,
        f"a product is within {_distance(product, found):.2g} of its norm of differences of gradients, in {precision}",
    )


def _disagreement(
    problem: Problem, term: LossTerm, product: Parts, found: Parts, other: Parts, suspects: set[int]
) -> DerivativeCheck:
    names = [repr(name) for i, name in enumerate(problem.parameters) if i in suspects]
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    causes = causes_of_wrong_derivatives(problem, term)
    return DerivativeCheck(
        False,
        f"PyTorch's second derivative of this loss is not the derivative of its first: on batch {term.index} a product "
        f"is {_distance(found, product):.2g} of its norm away from differences of gradients, which agree with each "
        f"other within {_distance(found, other):.1g} at two steps (in {listed}). {causes} "
        "hvp='finite_differences' follows the first derivatives instead, where they are those of one function",
    )


def _distance(wanted: Parts, found: Parts) -> float:
    """Return the distance of two vectors relative to the norm of the first, or of the other where that is zero."""
    norm = norm_of(wanted) or norm_of(found)
    return norm_of([a - b for a, b in zip(wanted, found, strict=True)]) / norm if norm else 0.0


def _deviating(product: Parts, found: Parts, own: float, whole: float) -> set[int]:
    """Return the positions of the parameters whose parts differ; what is not finite differs."""
    floor = whole * norm_of(product)
    return {
        i
        for i, (a, b) in enumerate(zip(product, found, strict=True))
        if not norm_of([a - b]) <= own * max(norm_of([a]), norm_of([b])) + floor
    }


def _consistent(one: Parts, other: Parts, product: Parts, share: float) -> set[int]:
    """Return the positions where two differences are much nearer to each other than to the product."""
    return {
        i
        for i, (a, b, p) in enumerate(zip(one, other, product, strict=True))
        if norm_of([a - b]) <= share * min(norm_of([a - p]), norm_of([b - p]))
    }


class _LossInFloat64:
    """One batch's loss as a function of float64 weights, whatever the precision of the model.

    Raises
    ------
    OperatorError
        If the memory does not suffice, or the loss or its product is another one then.
    """

    def __init__(self, problem: Problem, term: LossTerm, direction: Tensor, scale: float) -> None:
        available = available_memory(problem.device)
        if available is not None and COPIES * 8 * problem.size > available // 2:
            raise OperatorError("there is not enough memory for that")
        self.problem, self.term, self.scale = problem, term, scale
        self.direction = [_widened(part) for part in problem.unflatten(direction)]
        self._coarse = max(problem.epsilon**0.5, LEAST_COARSE)

    def difference(self, step: float) -> Parts:
        """Return the central difference of the gradient along the direction."""
        self._ends = [self._gradient(sign * step * self.scale) for sign in (-1.0, 1.0)]
        self._length = step * self.scale
        return [(ahead - behind) / (2.0 * self._length) for behind, ahead in zip(*self._ends, strict=True)]

    @property
    def sides(self) -> tuple[Parts, Parts]:
        """Return the two one-sided differences of the last step; the product must have been made."""
        behind, ahead = self._ends
        return (
            [(here - there) / self._length for here, there in zip(self._at_rest, behind, strict=True)],
            [(there - here) / self._length for here, there in zip(self._at_rest, ahead, strict=True)],
        )

    def product(self, coarse: Parts) -> Parts:
        """Return the exact product, that of the model's own precision being ``coarse``."""
        gradient = self._gradient(0.0, create_graph=True)
        pairs = [(entry, part) for entry, part in zip(gradient, self.direction, strict=True) if entry.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(gradient)
        if pairs:
            entries, parts = zip(*pairs, strict=True)
            with self._elsewhere():
                found = torch.autograd.grad(entries, self._leaves, parts, allow_unused=True)
        self._at_rest = [entry.detach() for entry in gradient]
        product = self._filled(found)
        if _distance(product, [_widened(part) for part in coarse]) > 16 * self._coarse:
            raise OperatorError("the product is another one then")
        return product

    def _gradient(self, step: float, create_graph: bool = False) -> Parts:
        self._leaves = [
            (_widened(parameter.detach()) + step * part).requires_grad_()
            for parameter, part in zip(self.problem.parameters.values(), self.direction, strict=True)
        ]
        with self._elsewhere():
            loss = self.term.evaluate_moved()
            found = torch.autograd.grad(loss, self._leaves, create_graph=create_graph, allow_unused=True)
        value, wanted = float(loss.detach()), self.problem.loss_of(self.term)
        if not abs(value - wanted) <= self._coarse * abs(wanted) + self._coarse**2:
            raise OperatorError(f"the loss of batch {self.term.index} is {value!r} then, and not {wanted!r}")
        return self._filled(found)

    @contextmanager
    def _elsewhere(self) -> Iterator[None]:
        """Let model and loss find the float64 weights; a backward pass may call them again."""
        parameters = self.problem.parameters.values()
        replacements = {id(parameter): leaf for parameter, leaf in zip(parameters, self._leaves, strict=True)}
        with self.problem.replaced(self._leaves), in_float64(replacements):
            yield

    def _filled(self, found: Sequence[Tensor | None]) -> Parts:
        """Return derivatives by all parameters, zeros where there is none."""
        pairs = zip(self._leaves, found, strict=True)
        return [torch.zeros_like(leaf) if one is None else _strided(one) for leaf, one in pairs]


class InFloat64(TorchFunctionMode):
    """Lets every operation of PyTorch work in float64, and on other tensors in the place of some parameters.

    Use it by :func:`in_float64`.

    Parameters
    ----------
    replacements : dict of int to tensor
        By the ``id`` of a parameter, the tensor that takes its place, however the model comes by the parameter.
    """

    def __init__(self, replacements: dict[int, Tensor]) -> None:
        super().__init__()
        self._replacements = replacements

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function with everything in float64."""
        function = _IN_FLOAT64.get(function, function)
        return function(*tree_map(self._widened, args), **tree_map(self._widened, kwargs or {}))

    def _widened(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return _WIDE.get(value, value)
        if not isinstance(value, Tensor):
            return value
        value = self._replacements.get(id(value), value)
        return _widened(value)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(_WIDE[tensor.dtype]) if tensor.dtype in _WIDE else tensor


@contextmanager
def in_float64(replacements: dict[int, Tensor]) -> Iterator[None]:
    """Let every operation work in float64 meanwhile, see :class:`InFloat64`, and make new tensors so."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with InFloat64(replacements):
            yield
    finally:
        torch.set_default_dtype(before)


_WIDE = {torch.float32: torch.float64, torch.bfloat16: torch.float64, torch.float16: torch.float64}
_WIDE[torch.complex64] = torch.complex128

_IN_FLOAT64 = {Tensor.float: Tensor.double, Tensor.half: Tensor.double, Tensor.bfloat16: Tensor.double}


def _strided(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out warnings of the user's code, which the run itself gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
