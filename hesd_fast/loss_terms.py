"""How many terms the loss of a batch has, where that can be told, and whether the loss is what it is taken for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from hesd_fast import data as _data
from hesd_fast.errors import HESDWarning, ProblemError
from hesd_fast.losses import IGNORED, divides_a_sum

Count = Callable[[Any], Any]

Evaluate = Callable[[int, Any], tuple[Tensor, Any]]
"""Of (index, batch): the loss, and the count if the loss returned one."""

REMEDIES = (
    "return (sum, count) from the loss, or give count=, a function of the batch that returns the number of terms of "
    "its mean, as in count=lambda batch: len(batch[1])"
)


@dataclass(frozen=True)
class Leaf:
    """One leaf of a batch, as far as its shape matters."""

    path: str
    kind: str
    shape: tuple[int, ...] | None
    is_data: bool
    """Whether it is a tensor or array with dimensions; a list of plain values has a shape, too."""
    in_list: bool
    """Whether it sits in a list that may be one of samples."""


class BatchShape:
    """The structure of a batch and the shapes of its leaves.

    A packed sequence is one leaf of the shape (sequences, steps of all, ...), and a list of plain values one of the
    shape (length,).
    """

    def __init__(self, index: int, batch: Any) -> None:
        self.index = index
        self.leaves: list[Leaf] = []
        self._open: set[int] = set()
        self.unknown = ""
        """Path and type of an object that is neither tensor, container nor plain value."""
        self.ignored = ""
        """Path of an integer tensor that holds PyTorch's label of a target that does not count."""
        self._enter(batch, "batch", listed=False, in_list=False)
        self.leaves.sort(key=lambda leaf: leaf.path)  # the order of a mapping's keys means nothing
        if not self.data:
            self.leaves += [Leaf(path, "unknown", (index,), False, False) for path in _unseen(batch)]

    @cached_property
    def data(self) -> list[Leaf]:
        """The tensors and arrays that have dimensions."""
        return [leaf for leaf in self.leaves if leaf.is_data]

    @property
    def structure(self) -> list[tuple[str, str]]:
        """Path and type of every leaf."""
        return [(leaf.path, leaf.kind) for leaf in self.leaves]

    @property
    def leading(self) -> int:
        """The leading dimension, of a batch without an ambiguity."""
        shape = self.data[0].shape
        return shape[0] if shape else 0

    @cached_property
    def ambiguity(self) -> str:
        """Why the leading dimension of this batch cannot be told; empty if it can."""
        if self.unknown:
            return f"{self.unknown} is neither a tensor, a container nor a plain value"
        if not self.data:
            return "no tensor has a leading dimension"
        if listed := [leaf.path for leaf in self.data if leaf.in_list]:
            return f"{listed[0]} sits in a list, which may be one of samples"
        if len({leaf.shape[0] for leaf in self.data if leaf.shape}) > 1:
            return "the leading dimensions of its tensors differ"
        return ""

    def __str__(self) -> str:
        shown = ", ".join(f"{leaf.path} {leaf.shape}" for leaf in self.data[:6])
        return f"batch {self.index} has {shown or 'no tensor'}{', ...' if len(self.data) > 6 else ''}"

    def _enter(self, value: Any, path: str, listed: bool, in_list: bool) -> None:
        """Note the leaves; ``listed``: all containers around are lists, as those that a DataLoader makes."""
        if id(value) in self._open:
            return  # it holds itself
        inside = _data.items(value)
        if isinstance(value, PackedSequence):
            self._add(path, value.data, (int(value.batch_sizes[0]), *value.data.shape), in_list)
        elif isinstance(value, Tensor | np.ndarray):
            self._add(path, value, _data.shape_of(value), in_list)
        elif isinstance(value, list | tuple) and value and all(map(_is_plain, value)):
            self.leaves.append(Leaf(path, "plain values", (len(value),), False, in_list))
        elif inside is not None:
            is_list = isinstance(value, list)
            only_lists = is_list and (listed or path == "batch")
            self._open.add(id(value))
            for suffix, item in inside:
                self._enter(item, path + suffix, only_lists, in_list or (is_list and not only_lists))
            self._open.discard(id(value))
        else:
            self.leaves.append(Leaf(path, type(value).__name__, None, False, in_list))
            if not _is_plain(value):
                self._enter_object(value, path)

    def _enter_object(self, value: Any, path: str) -> None:
        """Note the tensors that an object holds, so that batches of the same shapes are known as such."""
        self.unknown = self.unknown or f"{path} of type {type(value).__name__}"
        for inner, leaf in _data.leaves(value, path):
            if isinstance(leaf, Tensor | np.ndarray):
                self._add(inner, leaf, _data.shape_of(leaf), in_list=False)

    def _add(self, path: str, value: Tensor | np.ndarray, shape: tuple[int, ...], in_list: bool) -> None:
        self.leaves.append(Leaf(path, type(value).__name__, shape, bool(shape), in_list))
        if not self.ignored and _holds_ignored(value):
            self.ignored = path


def _unseen(batch: Any) -> list[str]:
    """Return the paths of what may hold any number of terms that nothing shows: texts, and objects of other types."""
    return [
        path
        for path, leaf in _data.leaves(batch)
        if isinstance(leaf, str | bytes) or not (isinstance(leaf, Tensor | np.ndarray) or _is_plain(leaf))
    ]


def _is_plain(value: Any) -> bool:
    return isinstance(value, _data.PlainValue | torch.dtype | torch.device)


def _holds_ignored(value: Tensor | np.ndarray) -> bool:
    """Whether a tensor may be one of labels, as which narrower integers do not serve, and some do not count."""
    if isinstance(value, np.ndarray):
        return value.dtype in (np.int64, np.int32) and bool((value == IGNORED).any())
    if value.dtype not in (torch.int64, torch.int32):
        return False
    return any(bool((part == IGNORED).any()) for part in _data.strided_parts(value))


def difference(first: BatchShape, other: BatchShape) -> str:
    """Return how two batches differ in more than the leading dimension; empty if they do not."""
    if odd := set(first.structure) ^ set(other.structure):
        return f"their structures differ: {min(odd)[0]} is not the same in both"
    for one, two in zip(first.leaves, other.leaves, strict=True):
        if one.shape is None or two.shape is None or one.shape == two.shape:
            continue
        if one.shape[1:] != two.shape[1:]:
            return (
                f"{one.path} differs in more than its leading dimension, {one.shape} and {two.shape}, and a mean over "
                "tokens, pixels or steps cannot be told from one over samples"
            )
        if not one.is_data and (one.shape[0], two.shape[0]) != (first.leading, other.leading):
            return f"{one.path} has {one.shape[0]} items and {two.shape[0]}, unlike the leading dimension"
    return ""


class TermCounter:
    """Counts the loss terms of batch after batch.

    A loss that returns (sum, count) counts them itself. Otherwise it is a mean, of as many terms as ``count(batch)``
    says, or else as the leading dimension of the batch, where it cannot be anything else; where all batches are of the
    same shapes, or there is one alone, their weights are the same whatever is counted.

    Parameters
    ----------
    loss : callable
        The problem's loss.
    count : callable, optional
        The number of terms of a batch's mean.
    """

    def __init__(self, loss: Any, count: Count | None = None) -> None:
        self._loss, self._count = loss, count
        self._numbers: list[float] = []
        self._shapes: list[BatchShape] = []
        self._returned: bool | None = None

    def add(self, index: int, batch: Any, returned: Any) -> bool:
        """Count the terms of the next batch; return whether it has any.

        Raises
        ------
        ProblemError
            If the count is none, or the terms of a mean cannot be told.
        """
        if self._returned is None:
            self._returned = returned is not None
        elif self._returned != (returned is not None):
            raise ProblemError(
                f"the loss of batch {index} is {'a mean' if self._returned else '(sum, count)'}, unlike that of "
                "batch 0; return the same kind for every batch"
            )
        if self._returned and self._count is not None:
            raise ProblemError(
                "the loss returns (sum, count), and count= is given as well; leave count= out, or return the mean alone"
            )
        if self._returned or self._count is not None:
            number = returned if self._count is None else self._count(batch)
            self._numbers.append(checked_count(number, index, given=self._count is not None))
            return self._numbers[-1] > 0
        self._add_shape(BatchShape(index, batch))
        return bool(self._shapes[-1].ambiguity) or self._shapes[-1].leading > 0

    def _add_shape(self, shape: BatchShape) -> None:
        first = self._shapes[0] if self._shapes else shape
        self._shapes.append(shape)
        if len(self._shapes) == 1:
            return
        if ignored := next((one for one in (first, shape) if one.ignored), None):
            raise ProblemError(
                f"the loss returns a mean, and {ignored.ignored} of batch {ignored.index} holds {IGNORED}, the label "
                "of targets that PyTorch leaves out of a mean, so the number of its terms cannot be told from the "
                "shapes; use hesd_fast.losses.causal_lm() for the next-token loss of a language model and "
                f"supervised() for other criteria, which count what is left, or {REMEDIES}"
            )
        if shape.leaves == first.leaves:
            return
        if reason := shape.ambiguity or first.ambiguity or difference(first, shape):
            raise ProblemError(
                "the loss returns a mean, and batches of different shapes are weighted by their numbers of loss terms, "
                f"which cannot be told here: {reason}. {first}; {shape}. For a loss like this {REMEDIES}"
            )

    @property
    def counts(self) -> list[float]:
        """The number of terms of each batch."""
        if self._by_shape and (self._shapes[0].ambiguity or self._shapes[0].ignored):
            return [1.0] * len(self._shapes)
        return [float(shape.leading) for shape in self._shapes] if self._by_shape else self._numbers

    @property
    def total(self) -> float:
        """The number of terms of all batches."""
        try:
            return math.fsum(self.counts)
        except OverflowError:
            return math.inf

    @property
    def weights(self) -> list[float]:
        """The factor of each batch's loss in L; not finite where the total is none to divide by."""
        total = self.total
        if not math.isfinite(total):
            return [math.nan] * len(self.counts)
        return [(1.0 if self._returned and count else count) / total for count in self.counts]

    @property
    def description(self) -> str:
        """Which function of how many terms L is."""
        total = self.total
        terms = f"{total:,.0f} terms" if total == int(total) else f"{total:,.4g} terms"
        if divides_a_sum(self._loss):
            return f"the criterion's sum divided by its {terms}"
        if not self._by_shape:
            return f"the mean over {terms}, counted by {'the loss, (sum, count)' if self._returned else 'count='}"
        known = not (self._shapes[0].ambiguity or self._shapes[0].ignored)
        if len(self._shapes) == 1:  # be it a mean or a sum
            return f"the loss of one batch, as returned{f', of {terms}' if known else ''}"
        if known:
            return f"the mean over {terms}, counted by the batches' leading dimension"
        return f"the mean of the mean losses of {len(self._shapes):,} batches of the same shapes"

    @property
    def _by_shape(self) -> bool:
        return bool(self._shapes)


def checked_count(count: Any, index: int, given: bool = False) -> float:
    """Return a count as a number; a ProblemError if it is none that counts, saying who has to return what."""
    wanted = "return a number from count=" if given else "return (sum, count) with a number as count"
    if isinstance(count, Tensor) and count.ndim == 0 and not (count.is_complex() or count.dtype == torch.bool):
        number = float(count.detach())
    elif isinstance(count, int | float | np.integer | np.floating) and not isinstance(count, bool):
        try:
            number = float(count)
        except OverflowError:
            number = math.inf
    else:
        got = f"is of type {type(count).__name__}"
        if isinstance(count, Tensor):
            got = f"has shape {tuple(count.shape)}" if count.ndim else f"has dtype {count.dtype}"
        raise ProblemError(f"the count of batch {index} {got}; {wanted}")
    if not (math.isfinite(number) and number >= 0):
        raise ProblemError(f"the count of batch {index} is {number}; return a finite count that is not negative")
    return number


def warn_of_fraction(index: int, batch: Any, count: Any) -> bool:
    """Warn of a returned count that hardly is one, as where a loss returns (loss, accuracy); return whether it did."""
    if count is None or not 0 < float(count) < 1:
        return False
    if not any(leaf.shape and leaf.shape[0] > 1 for leaf in BatchShape(index, batch).data):
        return False
    warnings.warn(
        f"the loss of batch {index} is a pair, which means (sum, count): the sum of the batch's loss terms and their "
        f"number, but this count is {float(count):g}; if it is something else, as an accuracy is, return the mean loss "
        "alone",
        HESDWarning,
        stacklevel=2,
    )
    return True


# Whether a loss is the mean or the sum that it is taken for


def halves(batch: Any) -> tuple[Any, Any] | None:
    """Return copies of the two halves of a batch along its leading dimension; None if it cannot be cut for certain.

    Single numbers in a batch may depend on its size, and so may be what objects hold.
    """
    shape = BatchShape(0, batch)
    if shape.ambiguity or shape.leading < 2:
        return None
    if any(leaf.shape is None or leaf.shape == () for leaf in shape.leaves if leaf.kind not in ("str", "NoneType")):
        return None
    if any(isinstance(leaf, Tensor) and leaf.layout is not torch.strided for _, leaf in _data.leaves(batch)):
        return None
    samples = shape.leading
    try:
        return _cut(batch, slice(0, samples // 2), samples), _cut(batch, slice(samples // 2, None), samples)
    except (TypeError, ValueError, NotImplementedError, RecursionError):
        return None


def _cut(value: Any, part: slice, samples: int) -> Any:
    if isinstance(value, Tensor) and not value.is_nested and not value.is_quantized:
        return value[part].clone()
    if isinstance(value, np.ndarray):
        return value[part].copy()
    if isinstance(value, list | tuple) and value and all(_is_plain(item) for item in value):
        if len(value) != samples:
            raise TypeError("a list of other things than samples")
        return value[part]
    if not isinstance(value, PackedSequence) and _data.items(value) is not None:
        return _data.rebuilt(value, lambda item: _cut(item, part, samples))
    if value is None or isinstance(value, str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be cut")


@dataclass(frozen=True)
class Reading:
    """The loss of a batch and of its two halves, with the numbers of their terms."""

    index: int
    value: float
    count: float
    values: list[float]
    counts: list[float]

    def is_sum(self, near: float, far: float) -> bool:
        """Whether it is additive, to rounding, and clearly not a mean."""
        return self._fits(sum(self.values), near) and not self._fits(self._mean, far)

    def is_mean(self, near: float, far: float) -> bool:
        """Whether it is the mean of its halves, to rounding, and clearly not their sum."""
        return self._fits(self._mean, near) and not self._fits(sum(self.values), far)

    @property
    def _mean(self) -> float:
        return sum(n * v for n, v in zip(self.counts, self.values, strict=True)) / self.count

    def _fits(self, expected: float, tolerance: float) -> bool:
        return abs(self.value - expected) <= tolerance * max(sum(map(abs, self.values)), abs(self.value))

    def __str__(self) -> str:
        return (
            f"the loss of batch {self.index} is {self.value:.6g}, and of its two halves, of {self.counts[0]:g} and "
            f"{self.counts[1]:g} terms, {self.values[0]:.6g} and {self.values[1]:.6g}"
        )


class ReadingCheck:
    """Compares the loss of one batch with those of its halves: a sum is additive, a mean is their mean.

    Cost: two forward passes of half a batch, once. Only a clear contradiction counts: one reading fits to rounding and
    the one that the loss is taken for is far off. What fails on halves is not held against it.

    Parameters
    ----------
    evaluate : callable
        The problem's loss, of (index, batch).
    count : callable, optional
        The problem's ``count``.
    epsilon : float
        Of the precision that the loss is computed in.
    """

    FAR = 0.1
    """The relative difference from which a reading is wrong for certain."""

    def __init__(self, evaluate: Evaluate, count: Count | None, epsilon: float) -> None:
        self._evaluate, self._count = evaluate, count
        self._tolerances = min(max(64 * epsilon, 1e-5), 1e-3), self.FAR
        self._cut: tuple[int, tuple[Any, Any], float, float] | None = None
        self._done = False

    def see(self, index: int, batch: Any, value: float, returned: Any) -> None:
        """Look at the next batch; a single batch needs no weight, so its loss may be either.

        Raises
        ------
        ProblemError
            If the loss is clearly a sum where a mean is wanted, or a mean for (sum, count).
        """
        if self._done:
            return
        if self._cut is None and math.isfinite(value) and (cut := halves(batch)) is not None:
            self._cut = index, cut, value, self._number_of(batch, returned)
        if self._cut is None or (returned is None and index == 0):
            return
        reading = self._read()
        if reading is not None and returned is not None and reading.is_mean(*self._tolerances):
            raise ProblemError(
                f"{reading}: that is their mean, but (sum, count) was returned, so the Hessian would be "
                f"{reading.count:g} times too small; return the sum of the terms, as in (mean * count, count), or the "
                "mean alone"
            )
        if reading is not None and returned is None and reading.is_sum(*self._tolerances):
            raise ProblemError(
                f"{reading}: that is their sum, also if it is divided by a fixed number, but a loss without a count is "
                f"taken for the mean of its terms; return the mean, or (sum, count), here ({reading.value:.6g}, "
                f"{reading.count:g})"
            )

    def _read(self) -> Reading | None:
        """Evaluate the loss on the halves; None if that fails, or if the counts do not add up."""
        if self._cut is None:
            return None
        (index, cut, value, count), self._cut, self._done = self._cut, None, True
        values, counts = [], []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for half in cut:
                    loss, returned = self._evaluate(index, half)
                    values.append(float(loss.detach()))
                    counts.append(self._number_of(half, returned))
        except Exception:  # the loss need not take halves, and fails at them in its own way
            return None
        finite = all(map(math.isfinite, [*values, *counts, count]))
        if not finite or count <= 0 or abs(sum(counts) - count) > 1e-3 * count:
            return None
        return Reading(index, value, count, values, counts)

    def _number_of(self, batch: Any, returned: Any) -> float:
        if returned is not None:
            return float(returned)
        return float(BatchShape(0, batch).leading if self._count is None else self._count(batch))
