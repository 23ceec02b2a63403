"""A problem whose data has been read once: what everything that multiplies by its derivatives needs."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hesd_fast.errors import OperatorError
from hesd_fast.problem import batches as _data
from hesd_fast.problem.description import ProblemDescription
from hesd_fast.problem.evaluation import ModelSnapshot, ProblemEvaluation
from hesd_fast.problem.first_pass import read_data
from hesd_fast.problem.loss_term import LossTerm
from hesd_fast.problem.model_state import alone
from hesd_fast.problem.parameters import ParameterLayout

T = TypeVar("T")


class PreparedProblem(ProblemEvaluation):
    """A problem, and what the first pass over its data found; :meth:`hesd_fast.Problem.prepare` makes it.

    Raises
    ------
    ProblemError, OperatorError
        If data or loss cannot be used.
    """

    def __init__(self, problem: ProblemDescription) -> None:
        super().__init__(problem)
        with self.session():
            self._first_pass = read_data(self)
            self.state.check_unwritten()  # the end of an outer session would tell only when all the work is done
            self.snapshot: ModelSnapshot = ModelSnapshot(self.model, self.state)
        self._findings: dict[type, Any] = {}

    def restricted(self, parameters: dict[str, nn.Parameter]) -> PreparedProblem:
        """Return the same problem for some of its parameters; what reading the data has found holds for it too."""
        _ = self.weights  # read once for all parts
        part = copy.copy(self)
        ParameterLayout.__init__(part, parameters)
        part.__dict__.pop("fingerprint", None)
        part._findings = {}
        return part

    def finding(self, kind: type[T]) -> T | None:
        """Return what was kept of some type by :meth:`keep_finding`, or None."""
        return self._findings.get(kind)

    def keep_finding(self, finding: object) -> None:
        """Keep what has been found out about the problem, for all that multiply by its derivatives; one of a type."""
        self._findings[type(finding)] = finding

    @property
    def loss_value(self) -> float:
        """L at the current parameters, summed in float64."""
        found = self._first_pass
        return math.fsum(w * v for w, v in zip(found.weights, found.values, strict=True) if w)

    @property
    def total_count(self) -> float:
        """Number of loss terms in the data."""
        return self._first_pass.total_count

    @property
    def loss_description(self) -> str:
        """Which function of how many loss terms L is, in words."""
        return self._first_pass.description

    @property
    def batch_count(self) -> int:
        """Number of batches in the data."""
        return len(self._first_pass.weights)

    @property
    def batch_bytes(self) -> list[int]:
        """Bytes of the tensors of each batch that has loss terms."""
        return [size for size, weight in zip(self._first_pass.sizes, self._first_pass.weights, strict=True) if weight]

    @cached_property
    @alone
    def weights(self) -> str:
        """Hexadecimal digest of all parameters and buffers, with their names; cost: one reading of the weights."""
        self.check_unchanged()
        code = hashlib.blake2b(digest_size=16)
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            code.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            for part in _data.strided_parts(tensor):
                code.update(_data.tensor_bytes(part))
        return code.hexdigest()

    @cached_property
    @alone
    def fingerprint(self) -> str:
        """Hexadecimal digest of the weights, the selection, the mode and the data; cost: that of `weights`."""
        self.check_unchanged()
        text = f"{self.weights}|{list(self.parameters)}|{self.mode}|{self._first_pass.digests}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def terms(self) -> Iterator[LossTerm]:
        """Yield the loss terms, in a session; one call is one pass over the data. Batches without terms are left out.

        Every batch is compared with the first pass: reading it again is cheap next to a forward pass. The losses are
        compared at the end of the pass, so that a GPU is waited for only once.

        Raises
        ------
        ProblemError
            If the data differs from that of the first pass.
        OperatorError
            If the loss differs although the data does not.
        """
        found = self._first_pass
        evaluated: list[tuple[int, Tensor]] = []
        index = -1
        for index, batch in self._same_batches():
            if found.weights[index] == 0:
                continue
            term = LossTerm(self, index, batch, found.weights[index], found.values[index])
            yield term
            if term.value is not None:
                evaluated.append((index, term.value))
        if index + 1 != self.batch_count:
            raise self.data_changed(f"this pass has {index + 1} batches, the first had {self.batch_count}")
        if evaluated:
            self._check_evaluated(evaluated)

    def first_term(self) -> LossTerm:
        """Return the first loss term, in a session, for trials; its losses are compared as soon as they are there.

        A fresh one each time, since a loss may write to its batch.
        """
        found = self._first_pass
        for index, batch in self._same_batches():
            if found.weights[index]:
                check = self._check_evaluated
                return LossTerm(self, index, batch, found.weights[index], found.values[index], check)
        raise self.data_changed("no batch of this pass has loss terms")

    def _same_batches(self) -> Iterator[tuple[int, Any]]:
        """Yield each batch with its index; a ProblemError where it is not that of the first pass."""
        digests = self._first_pass.digests
        for index, batch in self.batches():
            if index >= len(digests) or self.digest(batch) != digests[index]:
                raise self.data_changed(f"batch {index} differs from that of the first pass", index)
            yield index, batch

    def _check_evaluated(self, evaluated: list[tuple[int, Tensor]]) -> None:
        """Raise an OperatorError if a loss is not that of the first pass, or weights were written to."""
        self.state.check_unwritten()
        values = torch.stack([value.double() for _, value in evaluated]).tolist()
        for (index, _), value in zip(evaluated, values, strict=True):
            wanted = self._first_pass.values[index]
            if not self.is_same_loss(value, wanted, self._first_pass.dtype):
                raise OperatorError(
                    f"the loss is not deterministic: batch {index} gave {wanted!r} at first and now {value!r}, "
                    f"from the same data and random seed; {self.likely_causes()}"
                )
