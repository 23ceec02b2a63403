"""What a run shows about the operator and the engine, at no further product."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from hesd_fast.engine import cuda
from hesd_fast.lanczos.basis_storage import BASIS_DTYPES
from hesd_fast.lanczos.block_tridiagonal import BlockTridiagonal
from hesd_fast.operators.base import ProblemOperator
from hesd_fast.operators.linearity_check import Deviations
from hesd_fast.operators.precision_check import LARGEST_ERROR, PrecisionCheck
from hesd_fast.problem.problem import Problem
from hesd_fast.report.facts import Check
from hesd_fast.spectrum.spectral_measure import SpectralMeasure

ORTHOGONALITY_MULTIPLE = 1024.0
"""Loss of orthogonality, in machine epsilons, up to which a fully reorthogonalized run passes its check."""

SEMIORTHOGONALITY_MULTIPLE = 8.0
"""The same of a partially reorthogonalized one, in square roots of epsilon."""

REPETITION_MULTIPLE, REPETITION_MULTIPLE_ON_GPUS = 64, 1024
"""Difference of a product from the same one before, in machine epsilons; a GPU's atomic additions come in any order."""

DIFFERENCES_MULTIPLE = 16.0
"""Disagreement of products from finite differences, in the error that was measured along two vectors on one batch."""

LOST = (
    "so intervals may be too narrow; likely causes are products near underflow (multiply the loss by a power of two "
    "that brings its curvature near 1) or a coarse basis (use reorthogonalization='full' and basis_dtype='auto')"
)
"""What follows where vectors are not orthonormal."""


def checks_of_run(
    tridiagonal: BlockTridiagonal,
    measure: SpectralMeasure,
    deviations: Deviations,
    precision: PrecisionCheck,
    matrix: ProblemOperator,
    problem: Problem,
) -> tuple[Check, ...]:
    """Return everything that was verified, in the order of a report."""
    linearity, repetition = _meaningful(deviations, measure, problem)
    determinism = _determinism(problem, repetition)
    strategy = getattr(matrix, "strategy", None)
    error = 0.0 if strategy is None or strategy.exact else strategy.error
    cause = _cause_of_disorder(problem, matrix, determinism.passed)
    checks = [
        _with_cause(_symmetry(tridiagonal, measure, error), cause),
        _with_cause(_linearity(tridiagonal, linearity, error), cause),
        _with_cause(determinism, problem.likely_causes()),
        _with_cause(_weights(measure, problem), LOST),
        *_derivatives(matrix),
        *_precision(precision),
    ]
    if strategy is not None and not strategy.exact:
        checks.append(_finite_differences(strategy.error, strategy.step))
    if tridiagonal.orthogonality is not None:
        checks.append(_with_cause(_orthogonality(tridiagonal, tridiagonal.orthogonality, problem), LOST))
    return tuple(checks)


def _meaningful(deviations: Deviations, measure: SpectralMeasure, problem: Problem) -> tuple[float, float]:
    """Return the deviations from linearity and repetition, 0 where the product itself is nothing but rounding.

    Signs may lie in the kernel of a matrix of low rank, as that of a network of which only the last biases work.
    """
    *found, gain = deviations
    rounding = REPETITION_MULTIPLE * torch.finfo(problem.dtype).eps * measure.largest_magnitude
    linearity, repetition = (0.0 if deviation is None or gain <= rounding else deviation for deviation in found)
    return linearity, repetition


def _with_cause(check: Check, cause: str) -> Check:
    return check if check.passed else Check(check.name, False, f"{check.detail}; {cause}")


def _cause_of_disorder(problem: Problem, matrix: ProblemOperator, is_deterministic: bool) -> str:
    """Return why products may be those of no symmetric matrix."""
    if not is_deterministic:
        return problem.likely_causes()
    strategy = getattr(matrix, "strategy", None)
    if strategy is not None and not strategy.exact:
        return (
            "the products are finite differences, whose error was measured along one direction of the first batch and "
            "may be larger along others, across kinks of the loss (ReLU, max pooling) and by rounding; use "
            "hvp='double_backward' where the model has second derivatives, float64, or smooth activations"
        )
    derivatives = getattr(matrix, "derivatives", None)
    if derivatives is not None and derivatives.agrees is False:
        return "the second derivative is wrong, see the check of derivatives"
    return (
        "the same product came out twice, so likely causes are rounding (a loss that works in lower precision, as "
        "under autocast; numbers near overflow or underflow; a loss near zero, whose curvature is what is left of "
        "larger terms: use float64) or an operation with a wrong second derivative"
    )


def _symmetry(tridiagonal: BlockTridiagonal, measure: SpectralMeasure, error: float) -> Check:
    scale, noise = measure.largest_magnitude, tridiagonal.recurrence_error or 0.0
    relative = noise / scale if scale > 0.0 else 0.0
    # One of the two may be the vector that was multiplied, and the other as it is stored.
    allowed = max(float(np.sqrt(tridiagonal.epsilon)), _rounding_of_basis(tridiagonal), DIFFERENCES_MULTIPLE * error)
    return Check(
        "symmetry",
        relative <= allowed,
        f"u'Hv and v'Hu of all vectors u, v that met differ by at most {noise:.2g}, "
        f"{relative:.2g} of the largest eigenvalue (allowed {allowed:.2g})",
    )


def _linearity(tridiagonal: BlockTridiagonal, deviation: float, error: float) -> Check:
    allowed = max(float(np.sqrt(tridiagonal.epsilon)), DIFFERENCES_MULTIPLE * error)
    return Check(
        "linearity",
        deviation <= allowed,
        f"the product of a combination of probes is that of their products within {deviation:.2g} of its norm "
        f"(allowed {allowed:.2g})",
    )


def _determinism(problem: Problem, repetition: float) -> Check:
    multiple = REPETITION_MULTIPLE_ON_GPUS if cuda.runtime.is_cuda(problem.device) else REPETITION_MULTIPLE
    allowed = multiple * torch.finfo(problem.dtype).eps
    return Check(
        "determinism",
        repetition <= allowed,
        f"the same vector multiplied twice differs by {repetition:.2g} of the product's norm (allowed "
        f"{allowed:.2g}); data and losses were the same at every pass",
    )


def _weights(measure: SpectralMeasure, problem: Problem) -> Check:
    missing = float(np.abs(measure.weight_sums - 1.0).max())
    allowed = REPETITION_MULTIPLE * torch.finfo(problem.dtype).eps
    return Check("weights", missing <= allowed, f"each probe's weights sum to 1 within {missing:.2g}")


def _derivatives(matrix: ProblemOperator) -> Iterator[Check]:
    derivatives = getattr(matrix, "derivatives", None)
    if derivatives is not None:
        detail = derivatives.detail if derivatives.agrees is not None else f"not known: {derivatives.detail}"
        yield Check("derivatives", derivatives.agrees is not False, detail)


def _precision(check: PrecisionCheck) -> Iterator[Check]:
    """Yield the comparison with a wider precision; nothing where there is none to compare with."""
    found = check.precision
    if found is None:
        if check.reason:
            yield Check("precision", True, f"not known: {check.reason}")
        return
    batches = "1 batch" if found.batches == 1 else f"{found.batches:,} batches"
    detail = (
        f"products are {found.relative_error:.2g} of their norm away from those in {found.reference} (cosine "
        f"{found.cosine:.6g}; {found.vectors} vectors, {batches}), most in {found.worst!r} (allowed "
        f"{LARGEST_ERROR:.2g})"
    )
    if not found.suffices:
        detail += f"; all intervals allow for it; {found.cause}"
    yield Check("precision", found.suffices, detail)


def _finite_differences(error: float, step: float) -> Check:
    return Check(
        "finite differences",
        True,
        f"products were off by {error:.2g} of their norm where it was measured, at steps of {step:.2g} of the "
        "weights' norm; above the tolerance the run would not have begun",
    )


def _orthogonality(tridiagonal: BlockTridiagonal, found: float, problem: Problem) -> Check:
    """Compare with what the precision of the vectors allows, however coarse the products are."""
    epsilon = torch.finfo(problem.dtype).eps
    bound = ORTHOGONALITY_MULTIPLE * epsilon
    if tridiagonal.reorthogonalization == "partial":
        bound = max(bound, SEMIORTHOGONALITY_MULTIPLE * float(np.sqrt(epsilon)))
    rounding = _rounding_of_basis(tridiagonal)
    if rounding > epsilon:
        # a stored vector is off by its rounding, all of it where the vector sits on a few coordinates
        bound = max(bound, rounding)
    return Check(
        "orthogonality",
        found <= bound,
        f"the last block is orthonormal to the basis within {found:.2g} (allowed {bound:.2g})",
    )


def _rounding_of_basis(tridiagonal: BlockTridiagonal) -> float:
    return 0.0 if tridiagonal.basis_dtype is None else torch.finfo(BASIS_DTYPES[tridiagonal.basis_dtype]).eps
