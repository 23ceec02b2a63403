"""How far products are from the same in a wider precision, parameter by parameter, and what that leaves of a spectrum.

Products may be wrong and symmetric at once, with nothing in the run to show it: a softmax minus its one-hot labels that
has cancelled is the same wrong number in every product. So some random vectors are multiplied once more in float64, on
the same batches.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import scipy
import torch
from torch import Tensor

from hesd_fast.engine import cuda, kernels
from hesd_fast.engine.memory import MemoryWatch, free_memory, resident_memory
from hesd_fast.errors import OperatorError, first_line
from hesd_fast.estimate import ProductError
from hesd_fast.hvp.derivative_check import GraphBytes
from hesd_fast.hvp.wide_loss import WideLoss, wide_bytes, widened
from hesd_fast.operators.base import ProblemOperator
from hesd_fast.operators.precision_causes import cause_of_imprecision, works_in_lower_precision
from hesd_fast.problem.loss_term import LossTerm
from hesd_fast.problem.parameters import as_real, norm_of

LARGEST_ERROR = 1e-3
"""Error of a product, relative to its norm, up to which the check passes."""

STAGES = (2, 1e-5), (4, LARGEST_ERROR), (8, math.inf)
"""Random vectors that are multiplied in both precisions, and the error relative to the product up to which they are
enough: more of them bound the error closer. The unit vectors where there are no more parameters."""

SEED = 0x5EED
"""Chooses them, apart from the probes of any run with a small seed."""

PRODUCTS_A_BATCH, LEAST_BATCHES = 700, 8
"""Products of a run that pay for the comparison of two vectors on all batches, with 1 % of their time where float64
takes twice as long as float32; a shorter run compares fewer batches, but all where they are few."""

RISK = 0.0125
"""Probability, at each stage, that the vectors see so little of the error that its bound does not hold."""

VECTOR_COPIES = 3
"""Wide vectors that each vector of a comparison takes in all, with its products."""

SAME_LOSS = 1e-3
"""Relative difference of the losses in both precisions at which random numbers that are drawn may be others."""

SMALL_PART = 1e-2
"""Share of a product's norm below which the part of a parameter is not named as the worst one."""


@dataclass(frozen=True)
class ProductPrecision:
    """How far products are from those in a wider precision.

    Let P and P' be products of the same vectors with the same batches in the run's precision and in the wider one.

    Attributes
    ----------
    reference : str
        The wider precision, "float64" or "float32".
    vectors, batches : int
        How many vectors were multiplied, and on how many batches.
    cosine : float
        Of the angle between P and P'.
    relative_error : float
        ``||P - P'|| / ||P'||``, all vectors together.
    cosines, relative_errors : tuple of float
        The same of the part of each parameter, in their order.
    worst : str
        The parameter of the largest relative error, among those with at least a hundredth of the norm.
    loss, reference_loss : float
        That of the batches that were compared, in both precisions.
    error : ProductError
        How far eigenvalues may be from those of exact products. Holds with probability 0.975 for the batches that were
        compared, which count as all; certain for unit vectors.
    cause : str
        What the error likely comes from, and what to do; empty where it is small.
    """

    reference: str
    vectors: int
    batches: int
    cosine: float
    relative_error: float
    cosines: tuple[float, ...]
    relative_errors: tuple[float, ...]
    worst: str
    loss: float
    reference_loss: float
    error: ProductError
    cause: str = ""

    @property
    def suffices(self) -> bool:
        """Whether the error is small enough for the check to pass, see :data:`LARGEST_ERROR`."""
        return self.relative_error <= LARGEST_ERROR


@dataclass(frozen=True)
class PrecisionCheck:
    """What the comparison found.

    Attributes
    ----------
    precision : ProductPrecision or None
        None where there is nothing wider to compare with, or it is not to be had.
    reason : str
        Why it is not to be had; else empty.
    """

    precision: ProductPrecision | None
    reason: str = ""


def check_precision(operator: ProblemOperator, products: int) -> PrecisionCheck:
    """Compare products of an operator that has multiplied already with the same in float64, on the same batches.

    Where float64 is not to be had, and the model works in less than float32, float32 takes its place. Nothing is
    compared for products in float64. The model stays as it is, and no failure of the comparison ends a run.

    Parameters
    ----------
    operator : ProblemOperator
        Hessian, one of its blocks, Gauss-Newton or Fisher matrix.
    products : int
        How many products the run makes; it decides on how many batches they are compared, see
        :data:`PRODUCTS_A_BATCH`.
    """
    if operator.dtype == torch.float64 and operator.epsilon <= torch.finfo(torch.float64).eps:
        return PrecisionCheck(None)
    if (reason := operator.not_comparable) is not None:
        return PrecisionCheck(None, reason)
    reason = ""
    for wide in (torch.float64, torch.float32):
        try:
            with warnings.catch_warnings(), operator.prepared.session():
                warnings.simplefilter("ignore")  # of the user's code, which the run itself gives
                if wide == torch.float32 and not works_in_lower_precision(operator.prepared):
                    break
                return PrecisionCheck(_compare(operator, products, wide))
        except Exception as error:  # whatever code says that takes its own precision only
            reason = reason or first_line(error)
        cuda.runtime.release_unused()  # after the error, whose frames hold what was made
    return PrecisionCheck(None, f"products could not be compared with those in float64: {reason}")


def _compare(operator: ProblemOperator, products: int, wide: torch.dtype) -> ProductPrecision:
    """Return what a vector shows or, where that is not negligible and memory allows it, what more of them do."""
    found = None
    for vectors, enough in STAGES:
        try:
            found = _Comparison(operator, products, wide, vectors).run()
        except Exception:  # as where memory is short
            if found is None:
                raise
            return found
        if found.relative_error <= enough or found.vectors == operator.size:
            return found
    raise AssertionError("the last stage is always enough")


class _Comparison:
    """Products of the same vectors in two precisions."""

    def __init__(self, operator: ProblemOperator, products: int, wide: torch.dtype, vectors: int) -> None:
        self.operator, self.problem, self.wide = operator, operator.prepared, wide
        batches = len(self.problem.batch_bytes)
        self.count = min(max(batches * products // PRODUCTS_A_BATCH, LEAST_BATCHES), batches)
        self.scale = batches / self.count  # some batches count as all
        self.panel = _vectors(operator, vectors)

    def run(self) -> ProductPrecision:
        """Return what is found."""
        self._require_memory(0)
        loss = WideLoss(self.problem, self.wide)
        chosen = self._choose(loss)
        with MemoryWatch() as watch:
            before = resident_memory() or 0
            coarse = torch.zeros_like(self.panel)
            for term in self._terms(chosen):
                coarse += self.operator.products_of(term, self.panel)
            graph_bytes = max((watch.peak() or before) - before, 0)
        self._require_memory(graph_bytes)
        fine, losses = self._products(loss, chosen)
        if not bool(torch.isfinite(coarse).all()) or not bool(torch.isfinite(fine).all()):
            raise OperatorError("the products are not finite")
        return self._found(coarse, fine, losses)

    def _choose(self, loss: WideLoss) -> set[int] | None:
        """Return the batches to compare, None for all: those with most of the loss, and most of its error.

        A loss near zero is that of few samples, and so are its curvature and the error of that. Cost: a forward pass
        over all batches, where not all are compared.
        """
        if self.scale == 1.0:
            return None
        found = []
        for term in self.problem.terms():
            with torch.no_grad():
                value = float(loss.evaluate(term))
            self._check_loss(term, value)
            found.append((-abs(term.weight) * (abs(value) + abs(value - term.first_value)), term.index))
        return {index for _, index in sorted(found)[: self.count]}

    def _terms(self, chosen: set[int] | None) -> Iterator[LossTerm]:
        """Yield the terms to compare."""
        left = self.count
        for term in self.problem.terms():
            if chosen is None or term.index in chosen:
                yield term
                left -= 1
            if not left:
                return

    def _require_memory(self, graph_bytes: int) -> None:
        known = self.problem.finding(GraphBytes)
        needed = wide_bytes(self.problem, max(graph_bytes, known.bytes if known is not None else 0), self.wide)
        needed += VECTOR_COPIES * self.panel.numel() * self.wide.itemsize
        free = free_memory(self.problem.device)
        if free is not None and needed > free // 2:
            raise OperatorError(f"that takes about {needed / 2**30:.3g} GiB, and {free / 2**30:.3g} GiB are free")

    def _products(self, loss: WideLoss, chosen: set[int] | None) -> tuple[Tensor, tuple[float, float]]:
        """Return the products in the wide precision, and the loss of the batches in both."""
        fine = torch.zeros_like(self.panel, dtype=torch.float64)
        rows = [self.problem.unflatten(widened(row, self.wide)) for row in self.panel]
        losses: list[tuple[float, float]] = []
        for term in self._terms(chosen):
            value, alpha, products = self.operator.wide_products(loss, term, rows)
            losses.append((self.scale * term.weight * term.first_value, self.scale * term.weight * value))
            self._check_loss(term, value)
            for row, parts in zip(fine, products, strict=True):
                row.add_(torch.cat([as_real(part.detach()).reshape(-1).double() for part in parts]), alpha=alpha)
        return fine, (math.fsum(ours for ours, _ in losses), math.fsum(theirs for _, theirs in losses))

    def _check_loss(self, term: LossTerm, value: float) -> None:
        """Raise an OperatorError where the loss is that of other random numbers: they depend on their precision."""
        wanted = term.first_value
        if not math.isfinite(value):
            raise OperatorError(f"the loss of batch {term.index} is {value!r} then")
        if abs(value - wanted) > SAME_LOSS * (abs(wanted) + SAME_LOSS) and self.problem.has_drawn(term.index):
            raise OperatorError(
                f"the loss of batch {term.index} is {value!r} then, and not {wanted!r}, as it draws random numbers"
            )

    def _found(self, coarse: Tensor, fine: Tensor, losses: tuple[float, float]) -> ProductPrecision:
        coarse, whole = coarse.double(), norm_of([fine])
        cosines, relative, counted = [], [], []
        for i, (start, end) in enumerate(itertools.pairwise((*self.problem.offsets, self.problem.size))):
            ours, theirs = coarse[:, start:end], fine[:, start:end]
            cosines.append(_cosine(ours, theirs))
            relative.append(_distance(ours, theirs))
            if norm_of([theirs]) >= SMALL_PART * whole:
                counted.append(i)
        cosine, distance = _cosine(coarse, fine), _distance(coarse, fine)
        worst = max(counted or range(len(relative)), key=lambda i: relative[i])
        return ProductPrecision(
            str(self.wide).removeprefix("torch."),
            len(self.panel),
            self.count,
            cosine,
            distance,
            tuple(cosines),
            tuple(relative),
            list(self.problem.parameters)[worst],
            *losses,
            _bounds(coarse.sub_(fine).mul_(self.scale), self.panel),
            cause_of_imprecision(self.problem, losses) if distance > LARGEST_ERROR else "",
        )


def _vectors(operator: ProblemOperator, count: int) -> Tensor:
    """Return Gaussian vectors, which see every matrix alike; or all unit vectors where these are not more."""
    count = operator.size if operator.size <= STAGES[-1][0] else count
    panel = kernels.empty_panel(count, operator.size, operator.dtype, operator.device)
    if operator.size == count:
        return panel.copy_(torch.eye(count))
    kernels.fill_probes(panel, SEED + count, kind="gaussian")
    return panel


def _bounds(error: Tensor, panel: Tensor) -> ProductError:
    """Return bounds of what a matrix E does to eigenvalues, from its products E Z with some vectors.

    With v the first singular vector of E, ``||E||^2 ||Z^T v||^2`` is at most the largest eigenvalue of the Gram matrix
    of the products, and ``||Z^T v||^2`` a chi-squared number for Gaussian vectors, which stays below its ``RISK``
    quantile with that probability only. The trace of the Gram matrix is a sum of such numbers, with the squares of all
    singular values for weights, so small with less probability than a single one. ``z^T E z`` has the trace of E for
    its mean and a variance of at most ``2 ||E||_F^2``.
    """
    count, n = panel.shape
    largest, whole = float(torch.linalg.matrix_norm(error, 2)), norm_of([error])
    trace = float((panel.double() * error).sum())
    if count == n:
        return ProductError(largest, whole / math.sqrt(n), abs(trace) / n)
    # the chi-squared quantile; scipy.stats has it by name, and takes long to import
    unseen = math.sqrt(2.0 * float(scipy.special.gammaincinv(count / 2, RISK)))
    spread = 2.0 * math.sqrt(2.0 / count) * whole / unseen
    return ProductError(largest / unseen, whole / unseen / math.sqrt(n), (abs(trace) / count + spread) / n)


def _distance(found: Tensor, wanted: Tensor) -> float:
    """Return the distance of two vectors relative to the norm of the second, or of the first where that is zero."""
    norm = norm_of([wanted]) or norm_of([found])
    return norm_of([found - wanted]) / norm if norm else 0.0


def _cosine(one: Tensor, other: Tensor) -> float:
    """Return the cosine of the angle between two vectors; 1 for two zeros, 0 for one."""
    norms = norm_of([one]), norm_of([other])
    if 0.0 in norms:
        return 1.0 if norms == (0.0, 0.0) else 0.0
    return float((one / norms[0] * (other / norms[1])).sum())
