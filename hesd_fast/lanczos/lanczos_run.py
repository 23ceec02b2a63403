"""Drives the compiled block Lanczos with a curvature operator."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesd_fast.engine import _engine, cuda, kernels
from hesd_fast.engine.memory import available_memory
from hesd_fast.errors import NumericalError, OperatorError, ProblemError
from hesd_fast.lanczos.basis_storage import BasisPlan, plan_basis
from hesd_fast.lanczos.block_tridiagonal import ORTHOGONAL_MODES, BlockTridiagonal
from hesd_fast.lanczos.options import check_options
from hesd_fast.operators import as_operator
from hesd_fast.operators.base import CurvatureOperator

WORKING_BLOCKS = 3
"""The block at work, the one before it, and the products."""

BASIS_SHARE = 0.75
"""Part of a CUDA device's free memory that vectors may take; products need some, and nothing is swapped there."""

BREAKDOWN_MULTIPLE = 8.0
"""A direction is dropped when its norm is at most this many machine epsilons times the largest product so far."""


SMALLEST_SCALE = 1e-140
"""Norm of a product below which its square loses digits in float64."""

LARGEST_ASYMMETRY = 0.1
"""Asymmetry of the products, relative to the largest one, at which a run ends; below it widens the intervals.

Rounding alone reaches 0.03 in float32 networks that fit their data to a loss of 1e-8: the curvature is what is left of
much larger terms.
"""


@dataclass(frozen=True)
class LanczosProgress:
    """What a progress callback is told after each step: steps done, products done, and the whole of each."""

    step: int
    steps: int
    products: int


def block_lanczos(
    operator: CurvatureOperator | Any,
    steps: int = 25,
    block_size: int = 4,
    *,
    seed: int = 0,
    reorthogonalization: str = "full",
    window: int = 10,
    probe_kind: str = "rademacher",
    probes: Tensor | None = None,
    basis: str | os.PathLike[str] = "auto",
    basis_dtype: str | torch.dtype = "auto",
    on_step: Callable[[LanczosProgress], None] | None = None,
) -> BlockTridiagonal:
    """Run block Lanczos from random probes.

    Parameters
    ----------
    operator : CurvatureOperator or symmetric matrix (n, n)
        Multiplies panels; see :func:`hesd_fast.operators.as_operator` for what is accepted.
    steps : int
        Block steps m. Fewer are taken when the Krylov space becomes invariant.
    block_size : int
        Probes b, 1 <= b <= n.
    seed : int
        Chooses the probes, 0 <= seed < 2**64.
    reorthogonalization : {"full", "partial", "window", "none"}
        "full": each new block against all previous ones (memory (m + 1) b n elements). "partial": against the last two,
        and against older ones only when an estimate of the overlaps passes the square root of epsilon; the same
        memory and the same spectrum for fewer reads. "window": against the last ``window`` vectors. "none": the
        three-term recurrence alone (3 b n elements), where converged Ritz values reappear as copies that share their
        weight.
    window : int
        Number of vectors kept in "window" mode, rounded up to whole blocks, at least two blocks.
    probe_kind : {"rademacher", "gaussian"}
        Distribution of the probes.
    probes : tensor (b, n), optional
        Probes to use instead of random ones; ``block_size``, ``seed`` and ``probe_kind`` then have no say. Results
        carry no sampling error.
    basis : {"auto", "memory", "host", "disk"} or path of a directory
        Where the vectors are kept that are not at work: in memory, or in a file without a name, which the system
        removes when the run ends, however it ends. "auto" takes memory where it suffices. "disk" takes the directory
        ``HESD_FAST_SCRATCH``, else ``/var/tmp``. On a CUDA device memory is the device's, and "host" the pinned memory
        of its host, from where the vectors are read piece by piece while others are at work.
    basis_dtype : {"auto", "float64", "float32", "bfloat16", "float16"} or torch.dtype
        What they are kept in; "auto" is the dtype of the products. The block at work and the one before it always have
        that dtype.
    on_step : callable, optional
        Called with a :class:`LanczosProgress` after each step.

    Returns
    -------
    BlockTridiagonal
        Cost: m b products, and in full mode m^2 b n to 3 m^2 b n / 2 elements of basis read.

    Raises
    ------
    ProblemError
        For options that do not fit together or the operator.
    PlanError
        When the basis does not fit into the available memory or onto the disk.
    OperatorError
        When a product is not finite.
    EngineError
        When the operator lives on a device without kernels.

    References
    ----------
    Golub and Underwood, *The block Lanczos method for computing eigenvalues*, 1977. Golub and Meurant, *Matrices,
    Moments and Quadrature with Applications*, 2010, section 4.7.
    """
    operator = as_operator(operator)
    run = LanczosRun(
        operator,
        steps,
        block_size,
        seed=seed,
        reorthogonalization=reorthogonalization,
        window=window,
        probe_kind=probe_kind,
        probes=probes,
        basis=basis,
        basis_dtype=basis_dtype,
    )
    while not run.finished:
        product = run.product
        result = operator.matmat(run.panel, out=product)
        if result is not product:  # an operator of the user's own may have made a panel of its own
            product.copy_(result)
        run.advance()
        if on_step is not None:
            on_step(run.progress)
    return run.result()


class LanczosRun:
    """Block Lanczos by reverse communication: multiply ``panel`` into ``product``, then ``advance()``, until finished.

    For those who make the products of several runs together. Parameters and errors are those of :func:`block_lanczos`;
    the operator says what the matrix is, and is not called.

    Attributes
    ----------
    products : int
        Vectors multiplied so far.
    """

    def __init__(
        self,
        operator: CurvatureOperator,
        steps: int,
        block_size: int,
        *,
        seed: int = 0,
        reorthogonalization: str = "full",
        window: int = 10,
        probe_kind: str = "rademacher",
        probes: Tensor | None = None,
        basis: str | os.PathLike[str] = "auto",
        basis_dtype: str | torch.dtype = "auto",
    ) -> None:
        n = operator.size
        if probes is not None:
            _check_probes(probes, n)
            block_size, probe_kind = probes.shape[0], "given"
        check_options(n, steps, block_size, reorthogonalization, seed, window, probe_kind)
        steps, block_size, window, seed = int(steps), int(block_size), int(window), int(seed)
        kernels.require_device(operator.device)
        self._operator = operator
        self._steps = min(steps, n)
        self._reorthogonalization = reorthogonalization
        self._probe_kind = probe_kind
        self._plan = plan = plan_blocks(
            n, operator.dtype, operator.device, steps, block_size, reorthogonalization, window, basis, basis_dtype
        )
        in_place = reorthogonalization in ORTHOGONAL_MODES and plan.place == "memory" and plan.dtype == operator.dtype
        history = kernels.empty_panel(0, n, plan.dtype, operator.device) if in_place else plan.allocate()
        rows = (plan.rows if in_place else 0) + WORKING_BLOCKS * block_size
        self._working = kernels.empty_panel(rows, n, operator.dtype, operator.device)
        self._engine = _engine.BlockLanczos(
            history,
            self._working,
            block_size,
            max_steps=self._steps,
            global_size=n,
            reorthogonalization=reorthogonalization,
            breakdown_multiple=BREAKDOWN_MULTIPLE,
            reduce=None,
        )
        work = self._working[self._engine.work_row : self._engine.work_row + block_size]
        if probes is None:
            kernels.fill_probes(work, seed, kind=probe_kind)
        else:
            work.copy_(probes.detach())
        try:
            self._engine.start()
        except NumericalError as error:
            if bool(work.any()):
                raise ProblemError(f"the probes cannot be used in {operator.dtype}: {error}") from error
            raise
        self._epsilon = max(torch.finfo(operator.dtype).eps, getattr(operator, "epsilon", 0.0))
        self.products = 0

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the Krylov space is invariant."""
        return bool(self._engine.finished)

    @property
    def panel(self) -> Tensor:
        """The vectors to multiply, (width, n)."""
        row = self._engine.current_row
        return self._working[row : row + self._engine.current_width]

    @property
    def product(self) -> Tensor:
        """Where their products belong, (width, n)."""
        row = self._engine.work_row
        return self._working[row : row + self._engine.current_width]

    @property
    def progress(self) -> LanczosProgress:
        """How far the run is."""
        return LanczosProgress(self._engine.steps, self._steps, self.products)

    def advance(self) -> None:
        """Take the products and make the next panel."""
        product = self.product
        self.products += len(product)
        try:
            self._engine.advance()
        except NumericalError as error:
            _name_non_finite(product, self._operator, error)
            raise
        self._check_scale()
        _check_symmetry(self._engine.recurrence_error, self._engine.scale, self._epsilon)

    def _check_scale(self) -> None:
        """Raise an OperatorError for products too small to be squared."""
        scale = self._engine.scale
        if scale >= SMALLEST_SCALE or (scale == 0.0 and not np.any(self._engine.diagonal[-1])):
            return
        raise OperatorError(
            f"the products have norms below {SMALLEST_SCALE:g}, which squared are lost to underflow; multiply the "
            "loss, or the matrix, by a power of two that brings its curvature near 1"
        )

    def result(self) -> BlockTridiagonal:
        """Return what the steps so far have found; in an orthogonal mode the basis is read once."""
        engine = self._engine
        vectors_read = engine.vectors_read  # before the measurement, which reads them once more
        orthogonality = None
        if self._reorthogonalization in ORTHOGONAL_MODES:
            orthogonality = engine.measure_orthogonality()
        return BlockTridiagonal(
            size=self._operator.size,
            start=engine.start_factor,
            diagonal=tuple(engine.diagonal),
            offdiagonal=tuple(engine.offdiagonal),
            epsilon=self._epsilon,
            reorthogonalization=self._reorthogonalization,
            products=self.products,
            orthogonality=orthogonality,
            breakdown=engine.invariant,
            probe_kind=self._probe_kind,
            recurrence_error=engine.recurrence_error,
            basis_dtype=str(self._plan.dtype).removeprefix("torch."),
            basis_place=self._plan.place,
            basis_vectors_read=vectors_read,
        )


def plan_blocks(
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    steps: int,
    block_size: int,
    reorthogonalization: str,
    window: int,
    basis: str | os.PathLike[str],
    basis_dtype: str | torch.dtype,
) -> BasisPlan:
    """Choose where the blocks of a run lie that are not at work, see `basis_storage.plan_basis`."""
    steps = min(steps, size)
    available = available_memory(device)
    if cuda.runtime.is_cuda(device) and available is not None:
        available = int(available * BASIS_SHARE)
    blocks = {"window": math.ceil(window / block_size), "none": 2}.get(reorthogonalization, steps)
    return plan_basis(
        max(min(blocks, steps) - 2, 0) * block_size,
        WORKING_BLOCKS * block_size,
        size,
        dtype,
        basis=basis,
        basis_dtype=basis_dtype,
        available=available,
        device=device,
    )


def _check_probes(probes: Tensor, n: int) -> None:
    if not isinstance(probes, Tensor) or probes.ndim != 2 or probes.shape[1] != n or not probes.is_floating_point():
        got = f"{tuple(probes.shape)} {probes.dtype}" if isinstance(probes, Tensor) else type(probes).__name__
        raise ProblemError(f"probes is {got}; wanted a floating-point tensor of shape (b, {n})")
    if not bool(torch.isfinite(probes).all()):
        raise ProblemError("probes holds a number that is not finite; wanted finite vectors")


def _check_symmetry(error: float, scale: float, epsilon: float) -> None:
    allowed = max(LARGEST_ASYMMETRY, 8.0 * epsilon) * scale
    if error > allowed:
        raise OperatorError(
            f"the products are not those of one symmetric matrix: u'Hv and v'Hu differ by {error:.3g}, "
            f"{error / scale:.2g} of the largest product (at most {allowed / scale:.2g} is allowed). Likely causes "
            "are rounding, where the loss is close to zero (use float64), finite differences of a loss with kinks (use "
            "hvp='double_backward'), an operation with a wrong second derivative, or a loss that changes from one "
            "product to the next; compare a few products with a dense Hessian"
        )


def _name_non_finite(product: Tensor, operator: CurvatureOperator, error: NumericalError) -> None:
    places = (~torch.isfinite(product)).nonzero()
    if len(places) == 0:
        raise OperatorError(
            "the products are finite, but too large or too small to be squared in float64; multiply the loss by a "
            "power of two that brings its curvature near 1"
        ) from error
    row, column = places[0].tolist()
    describe = getattr(operator, "describe", None)
    where = describe(column) if callable(describe) else f"column {column}"
    raise OperatorError(
        f"the product of vector {row} is {float(product[row, column])} at {where}; wanted finite numbers. "
        "Check weights, data and loss, or use float64"
    ) from error
