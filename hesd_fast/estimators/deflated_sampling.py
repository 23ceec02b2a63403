"""Sums over the diagonal of a matrix, in part exact and in part from random probes: Hutch++ that measures what pays.

A basis V takes the large eigenvalues out, where a sum is known from d products, and probes estimate the sum over what
is left, ``(I - V^T V) A (I - V^T V)`` (Meyer, Musco, Musco, Woodruff, SOSA 2021). Given V, the probes are independent,
so that the usual standard error is right for them. V is grown by block Lanczos instead of a sketch, for half the
products (Chen and Hallman, SIMAX 44(3), 2023), as long as one product more lowers the error further than one probe more
would (the rule of Persson, Cortinovis and Kressner, SIMAX 43(3), 2022, with gains that are measured). So a flat
spectrum gets plain Girard-Hutchinson estimation, and a few large eigenvalues are taken out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hesd_fast.engine import kernels
from hesd_fast.estimators.deflation import BLOCK, Array, Deflation, as_array, multiply, new_panel
from hesd_fast.operators.base import CurvatureOperator

WIDTH = 8
"""Probes that are multiplied together; the first of them decide how much to deflate."""

MARGIN, MARGIN_AT_RANDOM = 1.5, 2.0
"""How much better than probes deflation has to be; what random directions lead to is only expected."""

ENDS_DEFLATION = 0.01
"""Part of the first samples that has to suffice for deflation to end there: a tenth of the width that is wanted.

These samples are looked at after every step, and where they happen to agree the interval would be too narrow.
"""

NOISE = 8.0
"""What is left is rounding below the square of this many machine epsilons of what there was."""

Sums = Callable[[Tensor, Tensor], Array]
"""Takes vectors (k, n) and products with them; returns (k, s) sums for each vector, quadratic in it."""


@dataclass(frozen=True)
class Budget:
    """What a run may use.

    Attributes
    ----------
    products : int
        Vectors that may be multiplied.
    rows : int
        Vectors that may be kept to deflate with.
    width : int
        Probes that are multiplied together.
    """

    products: int
    rows: int
    width: int = WIDTH


class DeflatedSampling:
    """Estimates of sums of a quadratic form over an orthonormal basis of the whole space.

    Parameters
    ----------
    operator : CurvatureOperator
        The matrix A, n x n.
    budget : Budget
        Products and memory.
    sums : callable
        The quadratic forms, from vectors and products with them.
    kind : {"gaussian", "rademacher"}
        What probes z are made of. Of Gaussian ones the part outside of V has no direction, and is set to the length
        that it has on average: sums are of ``(I - P) z`` times ``A (I - P) z``, ``P = V^T V``. Of Rademacher ones they
        are of ``z`` times that, which on a diagonal matrix has no variance.
    seed : int
        What chooses them.
    fewest : int
        Probes from which their spread is trusted to end a run.
    of_squares : bool
        Whether the sums make up the trace of ``A^2`` and not that of A, for the choice of what pays.
    on_probes : callable, optional
        Told the number of the first probe of a panel, and its products, once V is as it stays.
    on_basis : callable, optional
        Told vectors of V and products with them.

    Attributes
    ----------
    inside : array (s,)
        Sums over V.
    rounded : array (s,)
        Sums of the magnitudes that they are made of.
    samples : array (p, s)
        What each probe says of the sums over everything else.
    pending : tensor (k, n) or None
        Products of the probes that are there while V may still grow.
    """

    def __init__(
        self,
        operator: CurvatureOperator,
        budget: Budget,
        sums: Sums,
        kind: str,
        seed: int,
        *,
        fewest: int,
        of_squares: bool = False,
        on_probes: Callable[[int, Tensor], None] | None = None,
        on_basis: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        self.operator, self.budget = operator, budget
        self._sums, self._kind, self._seed = sums, kind, seed
        self._fewest = fewest
        self._of_squares, self._on_probes, self._on_basis = of_squares, on_probes, on_basis
        # Random directions of V come after all probes that there can be in the table of random numbers.
        self.deflation = Deflation(operator, budget.rows, seed, first_probe=budget.products)
        self.drawn = 0
        self._noise = 0.0
        self.pending: Tensor | None = None
        self._vectors, self._products = (new_panel(operator, budget.width) for _ in range(2))
        self._raw = new_panel(operator, 0 if kind == "gaussian" else budget.width)
        self.inside: Array = np.zeros(0)
        self.rounded: Array = np.zeros(0)
        self.samples: Array = np.zeros((0, 0))

    @property
    def products(self) -> int:
        """Vectors multiplied so far."""
        return self.drawn + self.deflation.products

    @property
    def left(self) -> int:
        """Vectors that may still be multiplied."""
        return self.budget.products - self.products

    def run(self, wanted: Callable[[], float]) -> None:
        """Deflate, then sample.

        Parameters
        ----------
        wanted : callable
            Returns how many times as many samples as there are would suffice; at most 1 ends the run.
        """
        vectors, products = self._draw()
        self.inside = np.zeros(self._sums(vectors[:1], products[:1]).shape[1])
        self.rounded = np.zeros_like(self.inside)
        self.samples = self._sampled(vectors, products)
        self.pending = products
        # Below this, what seems to be left is rounding.
        squares = torch.linalg.vector_norm(products, dim=1, dtype=torch.float64) ** 2
        self._noise = (NOISE * self.deflation.epsilon * float(squares.mean())) ** 2
        if not self._of_squares:
            self._noise /= float(squares.mean()) or 1.0
        while (factor := wanted()) > ENDS_DEFLATION:
            growth = self._next_growth(vectors, products, factor)
            if growth is None:
                break
            self._deflate(vectors, products, at_random=growth)
            self.samples = self._sampled(vectors, products)
        self.samples = self._settled(vectors, products)
        while self.left > 0 and (len(self.samples) < self._fewest or wanted() > 1.0):
            self.samples = np.vstack([self.samples, self._settled(*self._draw())])

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Return fresh probes outside of V, and their products."""
        width = min(self.budget.width, self.left)
        vectors, products = self._vectors[:width], self._products[:width]
        kernels.fill_probes(vectors, self._seed, first_probe=self.drawn, kind=self._kind)
        self.deflation.project(vectors)
        multiply(self.operator, vectors, products)
        self.drawn += width
        return vectors, products

    def _settled(self, vectors: Tensor, products: Tensor) -> Array:
        """Return what probes say now that V stays as it is."""
        self.pending = None
        if self._on_probes is not None:
            self._on_probes(self.drawn - len(products), products)
        return self._sampled(vectors, products)

    def _sampled(self, vectors: Tensor, products: Tensor) -> Array:
        if self._kind != "gaussian":
            kernels.fill_probes(self._raw[: len(vectors)], self._seed, first_probe=self.drawn - len(vectors))
            return self._sums(self._raw[: len(vectors)], products)
        squares = as_array(kernels.panel_gram(vectors, vectors)).diagonal()
        outside = self.operator.size - len(self.deflation.basis)
        lengths = np.divide(outside, squares, out=np.zeros_like(squares), where=squares > 0.0)
        return self._sums(vectors, products) * lengths[:, None]

    def _deflate(self, vectors: Tensor, products: Tensor, *, at_random: bool) -> None:
        """Let V grow by a block, and take it out of the probes that were drawn before it."""
        room = min(BLOCK, self.deflation.room, self.left - 1)
        directions, images = self.deflation.grow(room, at_random=at_random)
        if not len(directions):
            return
        sums = self._sums(directions, images)
        self.inside = self.inside + sums.sum(axis=0)
        self.rounded = self.rounded + np.abs(sums).sum(axis=0)
        if self._on_basis is not None:
            self._on_basis(directions, images)
        inside = kernels.panel_gram(directions, vectors)
        kernels.panel_project(vectors, directions, inside, gram=False, self_gram=False)
        kernels.panel_project(products, images, inside, gram=False, self_gram=False)

    def _next_growth(self, vectors: Tensor, products: Tensor, factor: float) -> bool | None:
        """Return whether V should grow at random, or by its products; None where one more probe is worth more.

        With R the square of the norm that is left and p probes in the end, the variance is 2 R / p. One product more
        lowers it by 2 g / p in V, where g is what it takes off R, and by 2 R / p^2 as a probe. Few probes tell R, and
        fewer probes make a wider interval, so V has to be better by a margin.
        """
        width = min(BLOCK, self.deflation.room, self.left - 1)
        if width < 1 or len(vectors) < 2:
            return None
        rest = _rest_of(self.deflation, vectors, products, self._of_squares)
        if rest.left <= self._noise:
            return None
        probes = self.drawn + min(self.left, self.drawn * max(factor - 1.0, 1.0))
        gain = rest.expected_gain if rest.gain is None else rest.gain
        by_products = gain / MARGIN if self.deflation.goes_on else 0.0
        # Random directions gain nothing yet, their products do: twice as many vectors, for which there has to be room.
        can_follow = min(self.deflation.room, self.left - 1) >= 2 * width
        at_random = rest.expected_gain / (2.0 * MARGIN_AT_RANDOM) if can_follow else 0.0
        if max(by_products, at_random) * probes <= rest.left:
            return None
        return at_random > by_products


class _Rest(NamedTuple):
    """What is left outside of V of the matrix whose trace is wanted, but for its mean eigenvalue.

    The mean is a multiple of the identity, which does not disturb samples. ``left`` is the square of the norm, half
    the variance of a sample; ``gain`` what each of the last vectors of V took off it, if that is known; and
    ``expected_gain`` what the product with a random direction would take off, being a direction itself.
    """

    left: float
    gain: float | None
    expected_gain: float


def _rest_of(deflation: Deflation, vectors: Tensor, products: Tensor, of_squares: bool) -> _Rest:
    """Return what is left, from inner products of probes outside of V and of products with them.

    For different probes y, z, ``(y' A z)^2`` has the mean |A|_F^2, ``|A y|^2`` too, and ``(A y . A z)^2`` has tr A^4.
    """
    scale = float(products.abs().max()) or 1.0  # so that high powers do not overflow
    apart = ~np.eye(len(vectors), dtype=bool)
    gram = as_array(kernels.panel_gram(vectors, vectors))
    forms = as_array(kernels.panel_gram(vectors, products)) / scale
    images = as_array(kernels.panel_gram(products, products)) / scale**2
    wanted = images if of_squares else forms
    mean = float(wanted.trace() / gram.trace()) if gram.any() else 0.0
    left = float(((wanted - mean * gram)[apart] ** 2).mean())
    if of_squares:
        square, fourth = float(images.trace()) / len(images), float((images[apart] ** 2).mean())
        expected = (fourth / square - mean) ** 2 if square > 0.0 else 0.0
        return _Rest(left * scale**4, deflation.gain_of_square(mean * scale**2), expected * scale**4)
    within = as_array(kernels.panel_gram(deflation.basis, products)) / scale
    images = images - within.T @ within - mean * (forms + forms.T) + mean**2 * gram
    square, fourth = float(images.trace()) / len(images), float((images[apart] ** 2).mean())
    expected = 2.0 * fourth / square if square > 0.0 else 0.0
    return _Rest(left * scale**2, deflation.gain(mean * scale), expected * scale**2)
