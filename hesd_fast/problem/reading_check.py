"""Whether a loss is the mean or the sum that it is taken for."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from hesd_fast.errors import HESDWarning, ProblemError
from hesd_fast.problem import batches as _data
from hesd_fast.problem.term_counts import REMEDIES, BatchShape, Count, is_plain, kind_of

Evaluate = Callable[[int, Any], tuple[Tensor, Any]]
"""Of (index, batch): the loss, and the count if the loss returned one."""

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def halves(batch: Any, device: torch.device | None = None) -> list[Any] | None:
    """Return copies of the two halves of a batch along its leading dimension; None if it cannot be cut for certain.

    Single numbers in a batch may depend on its size, and so may be what objects hold. Integers may be indices into the
    batch, that are out of range in a half: an exception on the CPU, and elsewhere the end of the process's device.
    """
    samples = BatchShape(0, batch).leading if _can_be_cut(batch, 2) else 0
    if samples == 0 or (device is not None and device.type != "cpu" and _may_hold_indices(batch, samples)):
        return None
    return _parts(batch, [(0, samples // 2), (samples // 2, samples)], samples)


def _thirds(batch: Any) -> list[Any] | None:
    """Return copies of the three thirds of a batch, of the first two together, and of the last two together."""
    if not _can_be_cut(batch, 3):
        return None
    n = BatchShape(0, batch).leading
    one, two = n // 3, 2 * n // 3
    return _parts(batch, [(0, one), (one, two), (two, n), (0, two), (one, n)], n)


def _can_be_cut(batch: Any, least: int) -> bool:
    shape = BatchShape(0, batch)
    if shape.ambiguity or shape.leading < least:
        return False
    if any(leaf.shape is None or leaf.shape == () for leaf in shape.leaves if leaf.kind != "plain value"):
        return False
    tensors = [leaf for _, leaf in _data.leaves(batch) if isinstance(leaf, Tensor)]
    return all(tensor.layout is torch.strided for tensor in tensors)


def _may_hold_indices(batch: Any, samples: int) -> bool:
    """Whether integers of a batch are in range for its samples and not for half of them."""
    for _, leaf in _data.leaves(batch):
        tensor = torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "iu" else leaf
        holds_integers = isinstance(tensor, Tensor) and tensor.dtype in INTEGERS and tensor.numel() > 0
        if holds_integers and samples // 2 <= int(tensor.max()) < samples:
            return True
    return False


def _parts(batch: Any, bounds: list[tuple[int, int]], samples: int) -> list[Any] | None:
    try:
        return [_cut(batch, slice(*part), samples) for part in bounds]
    except Exception:  # containers of a class of their own can refuse a copy in any way
        return None


def _cut(value: Any, part: slice, samples: int) -> Any:
    if isinstance(value, Tensor) and not value.is_nested and not value.is_quantized:
        return value[part].clone()
    if isinstance(value, np.ndarray):
        return value[part].copy()
    if isinstance(value, list | tuple) and value and all(is_plain(item) for item in value):
        if len(value) != samples:
            raise TypeError("a list of other things than samples")
        return value[part]
    if isinstance(value, MutableMapping):  # of its own class, whose attributes the loss may read
        made = copy.copy(value)
        for key, item in value.items():
            made[key] = _cut(item, part, samples)
        return made
    if not isinstance(value, PackedSequence) and _data.items(value) is not None:
        return _data.rebuilt(value, lambda item: _cut(item, part, samples))
    if kind_of(value) == "plain value":
        return value
    raise TypeError(f"a {type(value).__name__} cannot be cut")


@dataclass(frozen=True)
class Reading:
    """The loss of a batch and of its two halves, with the numbers of their terms, and of the halves' samples."""

    index: int
    value: float
    count: float
    values: list[float]
    counts: list[float]
    samples: list[float]

    def is_sum(self, near: float, far: float) -> bool:
        """Whether it is additive, to rounding, and clearly not a mean."""
        # A mean of what only one half has is additive as well.
        in_both = min(map(abs, self.values)) > far * abs(self.value)
        fits = self._fits(sum(self.values), near) and not self._fits(_mean(self.values, self.counts), far)
        return in_both and self._counts_add_up and fits

    def is_mean(self, near: float, far: float) -> bool:
        """Whether it is the mean of its halves, to rounding, and clearly not their sum.

        The number of targets that were met adds up, too, so samples are tried as well; and a share of them, in percent
        or not, shows in being a mean itself.
        """
        weights = [self.counts, self.samples] if self._counts_add_up else [self.samples] if self._count_is_mean else []
        fits = any(self._fits(_mean(self.values, each), near) for each in weights)
        return fits and not self._fits(sum(self.values), far)

    def is_mean_over_samples(self, near: float) -> bool:
        """Whether each sample counts as much as another."""
        return all(map(math.isfinite, self.values)) and self._fits(_mean(self.values, self.samples), near)

    @property
    def _counts_add_up(self) -> bool:
        return abs(sum(self.counts) - self.count) <= 1e-3 * self.count

    @property
    def _count_is_mean(self) -> bool:
        tolerance = 1e-3 * self.count
        differ = abs(self.counts[0] - self.counts[1]) > tolerance
        return differ and abs(_mean(self.counts, self.samples) - self.count) <= tolerance

    def _fits(self, expected: float, tolerance: float) -> bool:
        return abs(self.value - expected) <= tolerance * max(sum(map(abs, self.values)), abs(self.value))

    def __str__(self) -> str:
        return (
            f"the loss of batch {self.index} is {self.value:.6g}, and of its two halves, of {self.counts[0]:g} and "
            f"{self.counts[1]:g} terms, {self.values[0]:.6g} and {self.values[1]:.6g}"
        )


def _mean(values: list[float], weights: list[float]) -> float:
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def is_mean_of_some_weights(value: float, parts: list[float], samples: list[float], epsilon: float) -> bool:
    """Whether a loss is a mean of terms of which each third of the batch has some number, which may be any.

    Two unknown ratios of these numbers follow from the losses of the first two thirds together and of the last two, and
    predict the loss of all. A root of a mean and its like come near to that, but as near as this only by chance: to
    rounding, or a thousand times nearer than the mean over samples.

    Parameters
    ----------
    value : float
        The loss of the whole batch.
    parts : list of float
        Those of the parts that :func:`_thirds` gives.
    samples : list of float
        How many samples each third has.
    epsilon : float
        Of the precision of the losses.
    """
    first, second, third, front, back = parts
    try:
        to_second, to_third = (second - front) / (front - first), (third - back) / (back - second)
    except ZeroDivisionError:
        return False
    weight = (to_second + 1.0) * to_third  # of the first two thirds, relative to the last one
    if not (to_second > 0.0 and to_third > 0.0 and math.isfinite(weight)):
        return False
    error = abs(_mean([front, third], [weight, 1.0]) - value)
    return error <= max(4 * epsilon * max(map(abs, parts)), 1e-3 * abs(_mean(parts[:3], samples) - value))


class ReadingCheck:
    """Compares the loss of one batch with those of its halves: a sum is additive, a mean is their mean.

    Cost: two forward passes of half a batch, once, and seven of a third where the loss is not the mean of its halves.
    Only a clear contradiction is an error: one reading fits to rounding and the one that the loss is taken for is far
    off. What fails on parts is not held against it.

    Parameters
    ----------
    evaluate : callable
        The problem's loss, of (index, batch).
    count : callable, optional
        The problem's ``count``.
    epsilon : float
        Of the precision that the loss is computed in.
    device : torch.device, optional
        Where it is computed.
    """

    FAR = 0.1
    """The relative difference from which a reading is wrong for certain."""

    def __init__(
        self, evaluate: Evaluate, count: Count | None, epsilon: float, device: torch.device | None = None
    ) -> None:
        self._evaluate, self._count, self._device = evaluate, count, device
        self._tolerances = min(max(64 * epsilon, 1e-5), 1e-3), self.FAR
        self._epsilon = epsilon
        self._close = max(64 * epsilon, 1e-3)
        self._cut: tuple[int, list[Any], float, float] | None = None
        self._done = False
        self.counts_samples = True
        """Whether the samples of a batch count alike, as far as its halves show."""

    def see(self, index: int, batch: Any, value: float, returned: Any) -> None:
        """Look at the next batch; a single batch needs no weight, so its loss may be either.

        Warns where batches may count differently for what they hold, which their shapes do not tell.

        Raises
        ------
        ProblemError
            If the loss is clearly a sum where a mean is wanted, or a mean for (sum, count).
        """
        if self._done:
            return
        if self._cut is None and math.isfinite(value) and (cut := halves(batch, self._device)) is not None:
            self._cut = index, cut, value, self._number_of(batch, returned)
        if self._cut is None or (returned is None and index == 0):
            return
        reading = self._read()
        if reading is None:
            return
        if returned is not None and reading.is_mean(*self._tolerances):
            raise ProblemError(
                f"{reading}: that is their mean, but (sum, count) was returned, so the Hessian would be "
                f"{reading.count:g} times too small; return the sum of the terms, as in (mean * count, count), or the "
                "mean alone"
            )
        if returned is None and reading.is_sum(*self._tolerances):
            raise ProblemError(
                f"{reading}: that is their sum, also if it is divided by a fixed number, but a loss without a count is "
                "taken for the mean of its terms; return the mean, or (sum, count) with the undivided sum; where every "
                "batch is to count as it is, give count=lambda batch: 1"
            )
        if returned is None and self._count is None and not reading.is_mean_over_samples(self._close):
            self.counts_samples = False
            self._warn_of_weights(index, batch, value)

    def _warn_of_weights(self, index: int, batch: Any, value: float) -> None:
        """Warn if the loss is a mean of terms of which samples of the same shape have different numbers."""
        parts = _thirds(batch)
        losses = None if parts is None else self._losses(index, parts)
        if losses is None:
            return
        values, samples = map(list, zip(*losses, strict=True))
        if not is_mean_of_some_weights(value, values, samples[:3], self._epsilon):
            return
        warnings.warn(
            "the loss returns a mean, of terms of which some samples have more than others, as with a mask, ignored "
            "labels or class weights; so may batches, which are weighted by their shapes alone. If the terms of all "
            f"batches are to count alike, {REMEDIES}",
            HESDWarning,
            stacklevel=2,
        )

    def _read(self) -> Reading | None:
        """Evaluate the loss on the halves; None if that fails."""
        if self._cut is None:
            return None
        (index, cut, value, count), self._cut, self._done = self._cut, None, True
        losses = self._losses(index, cut)
        if losses is None or not all(map(math.isfinite, [*(number for _, number in losses), count])) or count <= 0:
            return None
        samples = [float(BatchShape(0, half).leading) for half in cut]
        return Reading(index, value, count, [loss for loss, _ in losses], [number for _, number in losses], samples)

    def _losses(self, index: int, parts: list[Any]) -> list[tuple[float, float]] | None:
        """Return the loss of each part and the number of its terms; None if that fails."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return [self._loss(index, part) for part in parts]
        except Exception:  # the loss need not take parts, and fails at them in its own way
            return None

    def _loss(self, index: int, part: Any) -> tuple[float, float]:
        loss, returned = self._evaluate(index, part)
        return float(loss.detach()), self._number_of(part, returned)

    def _number_of(self, batch: Any, returned: Any) -> float:
        if returned is not None:
            return float(returned)
        return float(BatchShape(0, batch).leading if self._count is None else self._count(batch))
