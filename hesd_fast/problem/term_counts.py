"""How many terms the loss of a batch has, where that can be told."""

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

from hesd_fast.errors import HESDWarning, ProblemError
from hesd_fast.problem import batches as _data
from hesd_fast.problem.criterion_sums import IGNORED
from hesd_fast.problem.losses import divides_a_sum

Count = Callable[[Any], Any]

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
    sequences: tuple[tuple[str, int], ...]
    """Type and length of each list or tuple around it that may be one of samples."""


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
        self.single = ""
        """Path of a tensor without dimensions, a number or a text, as a single sample has for its label."""
        self._enter(batch, "batch", collated=False, sequences=())
        self.leaves.sort(key=lambda leaf: leaf.path)  # the order of a mapping's keys means nothing
        if not self.data:
            self.leaves += [Leaf(path, "unknown", (index,), False, ()) for path in _unseen(batch)]
        self.samples = self._samples()
        """Which tensor sits in what may be a list of samples; empty if none does."""

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

    @property
    def ambiguity(self) -> str:
        """Why the leading dimension of this batch cannot be told; empty if it can."""
        if self.unknown:
            return f"{self.unknown} is neither a tensor, a container nor a plain value"
        if not self.data:
            return "no tensor has a leading dimension"
        if self.samples:
            return self.samples
        if len(self._leading) > 1:
            return "the leading dimensions of its tensors differ"
        if len(self.data) == 1 and (beside := self.single or self._other_list()):
            return f"{self.data[0].path} has no tensor beside it, only {beside}, so the batch may be one sample"
        return ""

    def share_evidence(self, other: BatchShape) -> None:
        """Let two batches of one structure know that what is no list of samples in one of them is none in the other."""
        if not (self.samples and other.samples) and self.structure == other.structure:
            self.samples = other.samples = ""

    def __str__(self) -> str:
        shown = ", ".join(f"{leaf.path} {leaf.shape}" for leaf in self.data[:6])
        return f"batch {self.index} has {shown or 'no tensor'}{', ...' if len(self.data) > 6 else ''}"

    @property
    def _leading(self) -> set[int]:
        return {leaf.shape[0] for leaf in self.data if leaf.shape}

    def _samples(self) -> str:
        """Return which tensor may sit in a list of samples, unless one outside shows the list to be of other things.

        That is where all tensors have one leading dimension, and it is not the length of the list.
        """
        inside = [leaf for leaf in self.data if leaf.sequences]
        lengths = {length for leaf in inside for _, length in leaf.sequences}
        told = len(inside) < len(self.data) and len(self._leading) == 1 and not lengths & self._leading
        if told or not inside:
            return ""
        return f"{inside[0].path} sits in a {inside[0].sequences[0][0]}, which may be one of samples"

    def _other_list(self) -> str:
        """Return the path of a list of plain values that are not one for each sample."""
        lists = [leaf for leaf in self.leaves if leaf.kind == "plain values"]
        return next((leaf.path for leaf in lists if leaf.shape != (self.leading,)), "")

    def _enter(self, value: Any, path: str, collated: bool, sequences: tuple[tuple[str, int], ...]) -> None:
        """Note the leaves; ``collated``: all containers around are lists, as those that a DataLoader makes."""
        if id(value) in self._open:
            return  # it holds itself
        inside = _data.items(value)
        if isinstance(value, PackedSequence):
            self._add(path, value.data, (int(value.batch_sizes[0]), *value.data.shape), sequences)
        elif isinstance(value, Tensor | np.ndarray):
            self._add(path, value, _data.shape_of(value), sequences)
        elif isinstance(value, list | tuple) and value and all(map(is_plain, value)):
            self.leaves.append(Leaf(path, "plain values", (len(value),), False, sequences))
        elif inside is not None:
            alike = _is_of_like_containers(value)
            collated = isinstance(value, list) and (collated or path == "batch") and not alike
            if alike or (isinstance(value, list) and not collated):
                sequences = (*sequences, ("list" if isinstance(value, list) else "tuple", len(value)))
            self._open.add(id(value))
            for suffix, item in inside:
                self._enter(item, path + suffix, collated, sequences)
            self._open.discard(id(value))
        else:
            self.leaves.append(Leaf(path, kind_of(value), None, False, sequences))
            if value is not None and isinstance(value, _data.PlainValue):
                self.single = self.single or path
            if not is_plain(value):
                self._enter_object(value, path)

    def _enter_object(self, value: Any, path: str) -> None:
        """Note the tensors that an object holds, so that batches of the same shapes are known as such."""
        self.unknown = self.unknown or f"{path} of type {type(value).__name__}"
        for inner, leaf in _data.leaves(value, path):
            if isinstance(leaf, Tensor | np.ndarray):
                self._add(inner, leaf, _data.shape_of(leaf), ())

    def _add(
        self, path: str, value: Tensor | np.ndarray, shape: tuple[int, ...], sequences: tuple[tuple[str, int], ...]
    ) -> None:
        self.leaves.append(Leaf(path, type(value).__name__, shape, bool(shape), sequences))
        if not shape:
            self.single = self.single or path
        if not self.ignored and _holds_ignored(value):
            self.ignored = path


def kind_of(value: Any) -> str:
    """Return what a value is as far as it matters: the type of a number, or of a text that may be missing, does not."""
    if isinstance(value, int | float | complex | np.number | np.bool_):
        return "number"
    return "plain value" if is_plain(value) else type(value).__name__


def _is_of_like_containers(value: Any) -> bool:
    """Whether a list or tuple is of containers of one structure, as of samples that are not collated.

    Containers that are lists are what a DataLoader makes of samples of several tuples.
    """
    if not isinstance(value, list | tuple) or hasattr(value, "_fields") or len(value) < 2:
        return False
    if any(isinstance(item, list) or _data.items(item) is None for item in value):
        return False
    first, *others = ([path for path, _ in _data.leaves(item, "")] for item in value)
    return all(paths == first for paths in others)


def _unseen(batch: Any) -> list[str]:
    """Return the paths of what may hold any number of terms that nothing shows: texts, and objects of other types."""
    return [
        path
        for path, leaf in _data.leaves(batch)
        if isinstance(leaf, str | bytes) or not (isinstance(leaf, Tensor | np.ndarray) or is_plain(leaf))
    ]


def is_plain(value: Any) -> bool:
    """Whether a value is neither a tensor, an array, a container nor an object of another class."""
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
        self.shapes_suffice = True
        """Whether nothing speaks against the leading dimension as the number of terms; a loss may."""

    def add(self, index: int, batch: Any, value: float, returned: Any) -> bool:
        """Count the terms of the next batch, whose loss is ``value``; return whether it has any.

        Raises
        ------
        ProblemError
            If the count is none, or 0 for a sum that is not, or the terms of a mean cannot be told.
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
            # The mean of no terms, which some multiply by their number to get the sum, is NaN.
            if self._returned and self._numbers[-1] == 0 and value != 0 and not math.isnan(value):
                raise ProblemError(
                    f"the loss of batch {index} is the sum {value:.6g} of 0 terms; return the number of the terms, or "
                    "a sum of 0 where there are none (what all batches have in common, as weight decay, belongs to the "
                    "terms: return sum + count * decay)"
                )
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
                "shapes; if these are no labels, give count=; use hesd_fast.losses.causal_lm() for the next-token loss "
                "of a language model and supervised() for other criteria, which count what is left, or "
                f"{REMEDIES}"
            )
        first.share_evidence(shape)
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
        if self._by_shape and (self._same_shapes and not self._known):
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
        if len(self._shapes) == 1:  # be it a mean or a sum
            return f"the loss of one batch, as returned{f', of {terms}' if self._known else ''}"
        if self._known:
            return f"the mean over {terms}, counted by the batches' leading dimension"
        if self._same_shapes:
            return f"the mean of the mean losses of {len(self._shapes):,} batches of the same shapes"
        return f"the mean of the mean losses of {len(self._shapes):,} batches, weighted by their leading dimension"

    @property
    def _by_shape(self) -> bool:
        return bool(self._shapes)

    @property
    def _known(self) -> bool:
        """Whether the number of terms is known, by the leading dimension."""
        return self.shapes_suffice and not (self._shapes[0].ambiguity or self._shapes[0].ignored)

    @property
    def _same_shapes(self) -> bool:
        return all(shape.leaves == self._shapes[0].leaves for shape in self._shapes)


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
