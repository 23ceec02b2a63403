"""One run of block Lanczos on the compiled engine, step by step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hesd_fast.engine import _engine, kernels
from hesd_fast.errors import NumericalError, OperatorError, ProblemError
from hesd_fast.lanczos.basis_storage import BasisPlan
from hesd_fast.lanczos.block_tridiagonal import ORTHOGONAL_MODES, BlockTridiagonal
from hesd_fast.lanczos.memory_budget import WORKING_BLOCKS
from hesd_fast.lanczos.options import LanczosSettings
from hesd_fast.operators.base import CurvatureOperator

BREAKDOWN_MULTIPLE = 8.0
"""A direction is dropped when its norm is at most this many machine epsilons times the largest product so far."""

SMALLEST_SCALE = 1e-140
"""Norm of a product below which its square loses digits in float64."""

LARGEST_ASYMMETRY = 0.1
"""Asymmetry of the products, relative to the largest one, at which a run ends; below it widens the intervals.

Rounding alone reaches 0.03 in float32 networks that fit their data to a loss of 1e-8: the curvature is what is left of
much larger terms.
"""


class LanczosRun:
    """Block Lanczos by reverse communication: multiply ``panel`` into ``product``, ``take_step()``, until finished.

    Parameters
    ----------
    operator : CurvatureOperator
        Says what the matrix is, and is not called.
    settings : LanczosSettings
        Checked ones, see :meth:`LanczosSettings.checked`.
    basis : BasisPlan
        Where the vectors are kept that are not at work.
    probes : tensor (b, n), optional
        Probes to use instead of random ones; results carry no sampling error.

    Attributes
    ----------
    products : int
        Vectors multiplied so far.
    most_steps : int
        Steps that will be taken at most.
    """

    def __init__(
        self, operator: CurvatureOperator, settings: LanczosSettings, basis: BasisPlan, probes: Tensor | None = None
    ) -> None:
        self._operator = operator
        self._settings = settings if probes is None else replace(settings, probe_kind="given")
        self._basis = basis
        self.most_steps = min(settings.max_steps, operator.size)
        self.products = 0
        self._epsilon = max(torch.finfo(operator.dtype).eps, getattr(operator, "epsilon", 0.0))
        self._working, history = self._allocate()
        self._engine = _engine.BlockLanczos(
            history,
            self._working,
            settings.block_size,
            max_steps=self.most_steps,
            global_size=operator.size,
            reorthogonalization=settings.reorthogonalization,
            breakdown_multiple=BREAKDOWN_MULTIPLE,
            reduce=None,
        )
        self._start(probes)

    def _allocate(self) -> tuple[Tensor, Tensor | list[Tensor]]:
        """Return the rows at work, and where older blocks go: the same memory where nothing keeps them apart."""
        operator, basis, settings = self._operator, self._basis, self._settings
        in_place = (
            settings.reorthogonalization in ORTHOGONAL_MODES
            and basis.place == "memory"
            and basis.dtype == operator.dtype
        )
        history = kernels.empty_panel(0, operator.size, basis.dtype, operator.device) if in_place else basis.allocate()
        rows = (basis.rows if in_place else 0) + WORKING_BLOCKS * settings.block_size
        return kernels.empty_panel(rows, operator.size, operator.dtype, operator.device), history

    def _start(self, probes: Tensor | None) -> None:
        work = self._working[self._engine.work_row : self._engine.work_row + self._settings.block_size]
        if probes is None:
            fill_probes(work, self._settings)
        else:
            work.copy_(probes.detach())
        try:
            self._engine.start()
        except NumericalError as error:
            if bool(work.any()):
                raise ProblemError(f"the probes cannot be used in {work.dtype}: {error}") from error
            raise

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the Krylov space is invariant."""
        return bool(self._engine.finished)

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self._engine.steps)

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

    def take_step(self) -> None:
        """Take the products and make the next panel."""
        self.products += self._engine.current_width
        try:
            self._engine.advance()
        except NumericalError as error:
            _name_non_finite(self.product, self._operator, error)
            raise
        self._check_scale()
        check_symmetry(self._engine.recurrence_error, self._engine.scale, self._epsilon)

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
        found = self.so_far()  # before the measurement, which reads vectors once more
        if self._settings.reorthogonalization not in ORTHOGONAL_MODES:
            return found
        return replace(found, orthogonality=self._engine.measure_orthogonality())

    def so_far(self) -> BlockTridiagonal:
        """Return what the steps so far have found, without a look at the basis."""
        engine = self._engine
        return BlockTridiagonal(
            size=self._operator.size,
            start=engine.start_factor,
            diagonal=tuple(engine.diagonal),
            offdiagonal=tuple(engine.offdiagonal),
            epsilon=self._epsilon,
            reorthogonalization=self._settings.reorthogonalization,
            products=self.products,
            orthogonality=None,
            breakdown=engine.invariant,
            probe_kind=self._settings.probe_kind,
            recurrence_error=engine.recurrence_error,
            basis_dtype=str(self._basis.dtype).removeprefix("torch."),
            basis_place=self._basis.place,
            basis_vectors_read=engine.vectors_read,
        )


def fill_probes(work: Tensor, settings: LanczosSettings) -> None:
    """Fill a panel with the random probes that the settings choose."""
    sphere = settings.probe_kind == "sphere"
    kind = "gaussian" if sphere else settings.probe_kind
    kernels.fill_probes(work, settings.seed, first_probe=settings.first_probe, kind=kind)
    if sphere:
        squares = torch.as_tensor(kernels.panel_gram(work, work)).diagonal()
        work.mul_((work.shape[1] / squares).sqrt().to(work.device, work.dtype)[:, None])


def check_symmetry(error: float, scale: float, epsilon: float) -> None:
    """Raise an OperatorError if products differ more from those of a symmetric matrix than rounding explains."""
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
