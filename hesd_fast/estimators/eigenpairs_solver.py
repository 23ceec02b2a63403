"""Eigenpairs by thick-restart block Lanczos: arguments, memory, measured residuals, intervals."""

from __future__ import annotations

import contextlib
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesd_fast.choices import is_one_of
from hesd_fast.engine import kernels
from hesd_fast.engine.memory import available_memory, one_look
from hesd_fast.errors import PlanError, ProblemError, ToleranceWarning
from hesd_fast.estimate import Estimate
from hesd_fast.estimators.eigenpairs import LINEAR, QUADRATIC, EigenResult, layout_of
from hesd_fast.estimators.eigenpairs_search import ENDS, Search, SearchSettings, Wanted
from hesd_fast.estimators.thick_restart import TILE_BYTES, TILE_SHARE, Order
from hesd_fast.lanczos.block_tridiagonal import Array
from hesd_fast.lanczos.memory_budget import BASIS_SHARE, PRODUCTS_SHARE
from hesd_fast.operators import CurvatureOperator, HessianOperator, as_operator
from hesd_fast.operators.base import ProblemOperator
from hesd_fast.problem.problem import Problem

MORE_ROWS = 90
"""Vectors of the basis by default beside those wanted; more save products, and cost reading."""

FEWEST_ROWS = 6
"""Blocks of the basis beside the vectors wanted, at least."""

KEPT = 0.3
"""Part of these vectors that a restart keeps: products were fewest from 0.2 to 0.4."""

LONGEST_GAP = 4608
"""Bytes between two vectors of a panel at most."""

PRODUCTS_PER_ROW = 100
"""Products at most by default, per vector of the basis."""


@one_look()
def eigsh(
    operator: CurvatureOperator | Problem | Any,
    k: int = 10,
    which: str = "LA",
    tol: float | None = None,
    *,
    block_size: int = 1,
    basis_size: int | None = None,
    max_products: int | None = None,
    memory_limit: int | None = None,
    check_missed: bool = True,
    seed: int = 0,
) -> EigenResult:
    """Find eigenvalues at the ends of the spectrum and their eigenvectors by thick-restart block Lanczos.

    Then random vectors look for eigenvalues that were missed, such as copies of multiple ones, until there is none but
    with a probability of 2.5 % at each end. Last, a product for each pair measures its residual. What has not
    converged, or may be missed, is said in a ToleranceWarning and returned as it is.

    Parameters
    ----------
    operator : CurvatureOperator, Problem or symmetric matrix (n, n)
        For a Problem, its Hessian.
    k, which : int, {"LA", "SA", "LM", "BE"}
        How many: the largest, the smallest, those of largest magnitude, or half from each end (with the odd one large).
    tol : float, optional
        Residual norm, relative to the largest ``|eigenvalue|``: ``epsilon^(2/3)``, 2.4e-5 in float32, by default.
    block_size, seed : int
        Vectors multiplied at a time: more take more products, each maybe cheaper. What chooses the random ones.
    basis_size, memory_limit : int, optional
        Vectors kept at most, by default ``max(4 k, k + 90)`` or as many as fit: more save products. Bytes for all
        vectors, by default three quarters of what can be had; ``basis_size + 2 block_size + k`` lie there.
    max_products : int, optional
        Products, but for a last block and those of the residuals; by default 100 per vector of the basis.
    check_missed : bool
        Whether to look for missed eigenvalues, for 5 to 80 % more products.

    Raises
    ------
    ProblemError, PlanError, OperatorError, EngineError
        For arguments that cannot be used; vectors that do not fit; products not finite or not those of a symmetric
        matrix; a device without kernels.

    Examples
    --------
    >>> import torch, hesd_fast as hesd
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> loss = hesd.losses.supervised(torch.nn.MSELoss())
    >>> result = hesd.eigsh(hesd.Problem(torch.nn.Linear(2, 1, bias=False), loss, data), k=1)
    >>> result.values.round(3), result.vectors[0]["weight"].abs().round(decimals=3)
    (array([4.]), tensor([[0., 1.]]))
    """
    matrix = operator if isinstance(operator, Problem) else as_operator(operator)
    kernels.require_device(matrix.device)
    asked = Request(k, which, tol, block_size, basis_size, max_products, check_missed, seed).checked(matrix)
    rows, left = basis_rows(asked, matrix, memory_limit)
    operator = HessianOperator(matrix, hvp="auto", memory_limit=left) if isinstance(matrix, Problem) else matrix
    with _session(operator):
        return solve(operator, asked, rows)


@dataclass(frozen=True)
class Request:
    """What :func:`eigsh` is asked for; see there."""

    k: int
    which: str
    tol: float | None
    block_size: int
    basis_size: int | None
    max_products: int | None
    check_missed: bool
    seed: int

    def checked(self, matrix: CurvatureOperator | Problem) -> Request:
        """Return the same in Python's own numbers, with the default tolerance; a ProblemError for what cannot be."""
        n = matrix.size
        if not is_one_of(self.which, ENDS):
            raise ProblemError(f"which is {self.which!r}; wanted one of {', '.join(map(repr, ENDS))}")
        k = _whole("k", self.k, 1, n, "the size of the matrix")
        fewest = min(k + FEWEST_ROWS, n)
        basis = self.basis_size
        return replace(
            self,
            k=k,
            tol=self._tolerance(matrix),
            block_size=_whole("block_size", self.block_size, 1, n, "the size of the matrix"),
            basis_size=None if basis is None else min(_whole("basis_size", basis, fewest), n),
            max_products=None if self.max_products is None else _whole("max_products", self.max_products, k),
            check_missed=bool(self.check_missed),
            seed=_whole("seed", self.seed, 0, 2**64 - 1),
        )

    def _tolerance(self, matrix: CurvatureOperator | Problem) -> float:
        if self.tol is None:
            epsilon = max(torch.finfo(matrix.dtype).eps, getattr(matrix, "epsilon", 0.0))
            return float(epsilon ** (2.0 / 3.0))
        if isinstance(self.tol, bool) or not isinstance(self.tol, (int, float)) or not 0.0 < self.tol < 1.0:
            raise ProblemError(f"tol is {self.tol!r}; wanted a number between 0 and 1, or None for the default")
        return float(self.tol)


def _whole(name: str, value: Any, least: int, most: int | None = None, what: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ProblemError(f"{name} is {value!r}; wanted an integer")
    if value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"{least} to {most}{', ' + what if what else ''}"
        raise ProblemError(f"{name} is {value}; wanted {wanted}")
    return int(value)


def basis_rows(asked: Request, matrix: CurvatureOperator | Problem, memory_limit: int | None) -> tuple[int, int | None]:
    """Return how many vectors the basis may have, and how many bytes products may keep; a PlanError if too few fit."""
    n, k, b = matrix.size, asked.k, asked.block_size
    wanted = min(max(asked.basis_size or max(4 * k, k + MORE_ROWS), k + FEWEST_ROWS * b), n)
    available = available_memory(matrix.device)
    if memory_limit is not None:
        memory_limit = _whole("memory_limit", memory_limit, 1)
    elif available is None:
        return wanted, None
    else:
        memory_limit = int(BASIS_SHARE * available)
    row = n * matrix.dtype.itemsize + LONGEST_GAP
    fit = (memory_limit - min(TILE_BYTES, int(TILE_SHARE * memory_limit))) // row - 2 * b - k
    fewest = min(k + FEWEST_ROWS * b, n) if asked.basis_size is None else wanted
    if fit >= fewest:
        taken = (min(wanted, fit) + 2 * b + k) * row
        return min(wanted, fit), None if available is None else int(PRODUCTS_SHARE * max(available - taken, 0))
    raise PlanError(
        f"{k} eigenpairs of length {n} take {(fewest + 2 * b + k) * row / 2**30:.3g} GiB ({fewest} vectors of the "
        f"basis, {2 * b} at work, {k} results), but {memory_limit / 2**30:.3g} GiB may be taken; "
        f"{_what_fits(fit + k, asked)}"
    )


def _what_fits(vectors: int, asked: Request) -> str:
    """Return what to do where only so many vectors of basis and result fit."""
    most = (vectors - FEWEST_ROWS * asked.block_size) // 2
    if most >= asked.k:
        return f"basis_size={vectors - asked.k} would fit"
    if most >= 1:
        return f"k={most} would fit" + (", more with block_size=1" if asked.block_size > 1 else "")
    return "no eigenpair fits; free memory, or take fewer parameters"


def _session(operator: CurvatureOperator) -> contextlib.AbstractContextManager[Any]:
    """Return what holds on to the model of an operator meanwhile."""
    return operator.problem.session() if isinstance(operator, ProblemOperator) else contextlib.nullcontext()


def solve(operator: CurvatureOperator, asked: Request, rows: int) -> EigenResult:
    """Search in a basis of so many vectors, measure, and warn of what has not come out as it should."""
    settings = SearchSettings(
        wanted=Wanted(asked.k, asked.which),
        tolerance=asked.tol or 0.0,
        block_size=asked.block_size,
        kept=min(asked.k + max(int(KEPT * (rows - asked.k)), 1), rows),
        max_products=asked.max_products or PRODUCTS_PER_ROW * rows,
        seed=asked.seed,
        check_missed=asked.check_missed,
    )
    panel = kernels.empty_panel(rows + 2 * asked.block_size, operator.size, operator.dtype, operator.device)
    search = Search(operator, panel, settings)
    search.run()
    values, residuals = measure(operator, panel, asked.k, asked.block_size)
    order = final_order(asked.which, values)
    vectors = kernels.empty_panel(asked.k, operator.size, operator.dtype, operator.device)
    for row, source in enumerate(order.tolist()):
        vectors[row].copy_(panel[source])
    values, residuals = values[order], residuals[order]
    # What was computed belongs to a matrix that is as far from H as noise and rounding.
    noise = search.space.noise
    limits = {side: limit + side * noise for side, limit in search.limits.items()}
    result = EigenResult(
        which=asked.which,
        values=values,
        residuals=residuals,
        bounds=intervals(values, residuals, noise, limits if search.complete else {}),
        converged=residuals <= max(search.tolerance, search.space.epsilon * search.space.scale),
        tolerance=search.tolerance,
        limits=(limits.get(-1.0, -math.inf), limits.get(1.0, math.inf)),
        complete=search.complete,
        products=search.products + asked.k,
        panel=vectors,
        layout=layout_of(operator.problem.parameters) if isinstance(operator, ProblemOperator) else None,
    )
    _warn(result, search, asked)
    return result


def final_order(which: str, values: Array) -> Order:
    """Return the order of results: most wanted first; the largest first where both ends are wanted."""
    if which == "LM":
        return np.argsort(-np.abs(values), kind="stable")
    return np.argsort(values if which == "SA" else -values, kind="stable")


def measure(operator: CurvatureOperator, panel: Tensor, k: int, block_size: int) -> tuple[Array, Array]:
    """Return the Rayleigh quotient and the residual norm of the first k vectors; overwrites vectors behind them."""
    values, residuals = np.empty(k), np.empty(k)
    for begin in range(0, k, block_size):
        block = panel[begin : min(begin + block_size, k)]
        products = panel[k : k + len(block)]
        result = operator.matmat(block, out=products)
        if result is not products:
            products.copy_(result)
        squares = np.diagonal(np.asarray(kernels.panel_gram(block, block)))
        quotients = np.diagonal(np.asarray(kernels.panel_gram(block, products))) / squares
        _, gram = kernels.panel_project(products, block, np.diag(quotients), gram=False)
        values[begin : begin + len(block)] = quotients
        residuals[begin : begin + len(block)] = np.sqrt(np.diagonal(np.asarray(gram)) / squares)
    return values, residuals


def intervals(values: Array, residuals: Array, noise: float, limits: dict[float, float]) -> tuple[Estimate, ...]:
    """Return an interval for each value that holds an eigenvalue.

    Within the residual norm of each value there is one (Parlett, *The Symmetric Eigenvalue Problem*, 1998, theorem
    4.5.1). Where these intervals do not meet, and nothing else lies beyond the limit, there is exactly one in each, and
    the square of the norm over the distance to all others bounds its error (Kato and Temple; theorem 11.7.1).
    """
    radii = residuals + noise
    bounds = []
    for i, value in enumerate(values.tolist()):
        error, method = float(radii[i]), LINEAR
        side = 1.0 if value > limits.get(1.0, math.inf) else -1.0
        beyond = side in limits and side * value > side * limits[side]
        if beyond:
            others = np.delete(np.abs(values - value) - radii, i)
            gap = min(float(others.min(initial=math.inf)), side * (value - limits[side]))
            if gap > error:
                error, method = min(error, float(residuals[i]) ** 2 / gap + noise), QUADRATIC
        bounds.append(Estimate(value, value - error, value + error, method))
    return tuple(bounds)


def _warn(result: EigenResult, search: Search, asked: Request) -> None:
    """Say what has not come out as it should."""
    missing = int((~result.converged).sum())
    if missing:
        worst = float(result.residuals.max())
        spent = search.products >= search.most_products
        remedy = (
            f"give max_products of more than {search.most_products}, a larger basis_size, or a larger tol"
            if spent
            else "rounding and noise of the products allow no more: take a larger tol"
            + (", or float64" if result.panel.dtype == torch.float32 else "")
        )
        warnings.warn(
            f"{missing} of {asked.k} eigenpairs have not converged: the largest residual norm is {worst:.2g}, asked "
            f"for was {result.tolerance:.2g}; {remedy}",
            ToleranceWarning,
            stacklevel=5,
        )
    elif asked.check_missed and not result.complete:
        warnings.warn(
            "the eigenpairs have converged, but some between them may be missed: what is known is in `limits`; give a "
            "larger basis_size or max_products, or a smaller tol",
            ToleranceWarning,
            stacklevel=5,
        )
