"""A model, a loss and data as one fixed function of the selected parameters."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.loss import _Loss as CriterionModule
from torch.utils.data import DataLoader
from torch.utils.weak import WeakTensorKeyDictionary

from hesd_fast.choices import is_one_of
from hesd_fast.errors import HESDError, OperatorError, ProblemError, first_line, raised_outside_of_libraries
from hesd_fast.problem import batches as _data
from hesd_fast.problem.exact_operations import ExactOperations, operations_in
from hesd_fast.problem.losses import is_ready_made
from hesd_fast.problem.model_state import (
    SESSIONS,
    ModelState,
    RandomStreams,
    alone,
    borrowed,
    first_written,
    version_of,
)
from hesd_fast.problem.parameters import (
    ParameterLayout,
    Selection,
    as_real,
    check_hooks,
    check_model,
    norm_of,
    select_parameters,
)
from hesd_fast.problem.signatures import refusal, signature_of
from hesd_fast.problem.term_counts import Count, ReadingCheck, TermCounter, warn_of_fraction

if TYPE_CHECKING:
    from hesd_fast.hvp.derivative_check import DerivativeCheck

Loss = Callable[[Any, Any], Any]

_SAME_IN_EVERY_MODE = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm)

MODES = ("eval", "train", "as_is")


class LossTerm:
    """One batch's part of the loss, which is L = sum over terms of ``weight`` times ``evaluate()``.

    Attributes
    ----------
    index : int
        Position of the batch in the data.
    batch : Any
        The batch itself.
    weight : float
        Share of the batch: count / total count for a mean loss, 1 / total count for a ``(sum, count)`` loss.
    """

    def __init__(self, problem: Problem, index: int, batch: Any, weight: float, alone: bool = False) -> None:
        self._problem = problem
        self._alone = alone
        self.index = index
        self.batch = batch
        self.weight = weight
        self.value: Tensor | None = None

    def evaluate(self) -> Tensor:
        """Return the batch's loss, a scalar with its graph; cost: one forward pass.

        Raises
        ------
        OperatorError
            If the loss is not that of the first pass: now for a term of :meth:`Problem.first_term`, else at the end of
            the pass.
        """
        loss, _ = self._problem._batch_loss(self.index, self.batch)
        self.note(loss)
        return loss

    def note(self, value: Tensor) -> None:
        """Take a value of the loss that was computed in another way, to be compared with that of the first pass."""
        self.value = value.detach()
        if self._alone:
            self._problem._check_evaluated([(self.index, self.value)])

    def evaluate_moved(self) -> Tensor:
        """Return the batch's loss where the caller has moved the weights; it is not compared with that of before."""
        return self._problem._batch_loss(self.index, self.batch)[0]

    def evaluate_at(self, weights: Sequence[Tensor]) -> Tensor:
        """Return the batch's loss with other tensors in the place of the selected parameters.

        For function transforms of PyTorch, whose tensors must not outlive them: :meth:`note` is left to the caller. A
        loss that requires gradients outside of the transform has reached a parameter by another way than its module.
        """
        with self._problem.replaced(weights):
            return self._problem._batch_loss(self.index, self.batch)[0]

    def outputs(self, weights: Sequence[Tensor] | None = None) -> Any:
        """Return what ``loss.outputs(model, batch)`` does, with other tensors as the selected parameters if given."""
        problem = self._problem
        with nullcontext() if weights is None else problem.replaced(weights):
            return problem._call(problem.loss.outputs, self.index, self.batch)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Facts:
    """What the first pass over the data found."""

    values: list[float]
    dtype: torch.dtype
    weights: list[float]
    digests: list[int]
    sizes: list[int]
    total_count: float
    description: str


class Problem:
    """The loss of a model over data, L(theta) = sum of all loss terms / their number.

    Parameters
    ----------
    model : torch.nn.Module
        Given back after every use exactly as it was: modes, ``.grad``, ``requires_grad``, buffers, weights,
        random state. What its forward pass puts into attributes that are not tensors (lists, dictionaries, numbers)
        stays.
    loss : callable
        ``loss(model, batch)`` returns the mean loss of a batch, or ``(sum, count)``. A mean loss of one batch, and of
        batches of the same shapes, needs no count. Batches of other shapes are weighted by their leading dimension
        where all of a batch's tensors agree on it and nothing else differs; elsewhere (lists of samples, padding,
        steps before samples, graphs, one sample a batch) return ``(sum, count)``, or give ``count``. So do where
        values decide what counts (masks, ignored labels), which shapes do not tell; and for lists of bare tensors if
        they are samples, as a DataLoader collates tuples into such lists. Only the selected parameters require
        gradients while it runs.
    data
        A re-iterable of batches, one batch, or a dataset of samples; see :func:`hesd_fast.problem.batches.as_batches`.
        Every pass starts from the same random state, so a shuffling DataLoader yields the same batches each time.
    parameters
        Which parameters the Hessian is of: None for all that require gradients, a regular expression that must match a
        whole name, exact names, or a predicate ``(name, parameter) -> bool``. A tied parameter counts once. A complex
        one is taken for the pairs of reals that ``torch.view_as_real`` shows.
    mode : {"eval", "train", "as_is"}
        The training flag of every module meanwhile (an overridden ``train`` method is not called). In train mode every
        batch has its own fixed random seed, so dropout draws the same mask at every pass.
    batch_size : int, optional
        Samples per batch, 256 by default; only for a dataset.
    count : callable, optional
        ``count(batch)`` is the number of terms that a mean loss is the mean of; only for a loss without a count.

    Attributes
    ----------
    replaced_operations : tuple of str
        Operations of PyTorch without a second derivative, or with a wrong one, that sessions replace by the same in
        ordinary operations; found when the problem is prepared.

    Raises
    ------
    ProblemError
        If the model, the loss, the data or an option cannot be used.
    """

    @alone
    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Any,
        parameters: Selection = None,
        mode: str = "eval",
        batch_size: int | None = None,
        count: Count | None = None,
    ) -> None:
        if count is not None and not callable(count):
            raise ProblemError(
                f"count is of type {type(count).__name__}; give a function count(batch) that returns the number of "
                "terms of a batch's mean loss"
            )
        if count is not None:
            _check_arguments("count", count, "(batch)", 1)
        if not is_one_of(mode, MODES):
            raise ProblemError(f"mode is {mode!r}; give one of {', '.join(map(repr, MODES))}")
        check_model(model)
        _check_loss_function(loss)
        self.model = model
        self.loss = loss
        self.count = count
        self.mode = mode
        self.data = _data.as_batches(data, batch_size)
        self.parameters = select_parameters(model, parameters)
        check_hooks(model, self.parameters)
        self._layout = ParameterLayout(self.parameters)
        self._streams = RandomStreams(_data.loader_generators(self.data))
        self._state: ModelState | None = None
        self.replaced_operations: tuple[str, ...] = ()
        self._operations = ExactOperations()
        self._facts: _Facts | None = None
        self._digests: MutableMapping[Tensor, tuple[int, int]] = WeakTensorKeyDictionary()  # of tensors on a device
        self._versions: list[tuple[str, Tensor, int]] = []
        self._modules: dict[str, nn.Module] | None = None
        self._values: list[tuple[str, int]] = []
        self._altered: dict[int, str] = {}
        self.derivative_check: DerivativeCheck | None = None
        """What :func:`hesd_fast.hvp.derivative_check.check_derivatives` has found, once it has looked."""
        self.derivative_warning_given = False

    def restricted(self, names: Iterable[str]) -> Problem:
        """Return the same problem for some of its parameters; what reading the data has found holds for it too.

        Prepares the problem first, so that the data is read for all parts at once.

        Raises
        ------
        ProblemError
            If a name is not that of a selected parameter, or there is none.
        """
        chosen = set(names)
        if unknown := sorted(chosen - self.parameters.keys()):
            raise ProblemError(f"{unknown[0]!r} is none of the problem's selected parameters")
        if not chosen:
            raise ProblemError("no parameter is left; give the name of one at least")
        self.prepare()
        _ = self.weights  # read once for all parts
        part = copy.copy(self)
        part.__dict__.pop("fingerprint", None)
        part.parameters = {name: parameter for name, parameter in self.parameters.items() if name in chosen}
        part._layout = ParameterLayout(part.parameters)
        part._state = None
        part._operations = ExactOperations()
        part.derivative_check, part.derivative_warning_given = None, False
        return part

    @property
    def size(self) -> int:
        """n, the number of selected parameters; a complex one counts as two real ones."""
        return self._layout.size

    @property
    def offsets(self) -> list[int]:
        """First panel column of each parameter."""
        return self._layout.offsets

    @property
    def dtype(self) -> torch.dtype:
        """Precision of panels: float64 if any selected parameter is float64 or complex128, else float32."""
        return self._layout.dtype

    @property
    def device(self) -> torch.device:
        """Where the selected parameters, and so the panels, are."""
        return next(iter(self.parameters.values())).device

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the coarsest selected parameter, which limits the accuracy of products."""
        return max(torch.finfo(parameter.dtype).eps for parameter in self.parameters.values())

    @property
    @alone
    def parameter_norm_squared(self) -> float:
        """Squared Euclidean norm of the selected parameters, summed in float64."""
        return norm_of(parameter.detach() for parameter in self.parameters.values()) ** 2

    def describe(self, column: int) -> str:
        """Return the name of the parameter that a panel column belongs to."""
        return self._layout.describe(column)

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return one vector (n,) from one tensor per parameter."""
        return self._layout.flatten(tensors)

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Return one view of a vector (n,) per parameter, in the parameter's shape; a complex one may be a copy."""
        return self._layout.unflatten(vector)

    @property
    def loss_value(self) -> float:
        """L at the current parameters, summed in float64."""
        facts = self._prepared()
        return math.fsum(w * v for w, v in zip(facts.weights, facts.values, strict=True) if w)

    def loss_of(self, term: LossTerm) -> float:
        """Return the loss of a term's batch that the first pass found."""
        return self._prepared().values[term.index]

    @property
    def total_count(self) -> float:
        """Number of loss terms in the data."""
        return self._prepared().total_count

    @property
    def loss_description(self) -> str:
        """Which function of how many loss terms L is, in words."""
        return self._prepared().description

    @property
    def batch_count(self) -> int:
        """Number of batches in the data."""
        return len(self._prepared().weights)

    @property
    def batch_bytes(self) -> list[int]:
        """Bytes of the tensors of each batch that has loss terms."""
        facts = self._prepared()
        return [size for size, weight in zip(facts.sizes, facts.weights, strict=True) if weight]

    @functools.cached_property
    @alone
    def weights(self) -> str:
        """Hexadecimal digest of all parameters and buffers, with their names; cost: one reading of the weights."""
        self.prepare()  # from then on a change of the weights is noticed
        self._check_unchanged()
        code = hashlib.blake2b(digest_size=16)
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            code.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            for part in _data.strided_parts(tensor):
                code.update(_data.tensor_bytes(part))
        return code.hexdigest()

    @functools.cached_property
    @alone
    def fingerprint(self) -> str:
        """Hexadecimal digest of the weights, the selection, the mode and the data; cost: that of `weights`."""
        digests = self._prepared().digests
        self._check_unchanged()
        text = f"{self.weights}|{list(self.parameters)}|{self.mode}|{digests}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def prepare(self) -> None:
        """Read the data once, check every batch and its loss, and note what later passes must find again.

        Does nothing the second time. Cost: one forward pass per batch, a backward pass on the first, and for a loss of
        one's own one more forward pass of a batch, in halves, and up to three in thirds where halves say too little.

        Raises
        ------
        ProblemError
            If data or loss cannot be used.
        """
        self._prepared()

    def __getstate__(self) -> dict[str, Any]:
        # What was read of tensors is about these tensors, which another process does not have.
        return {**vars(self), "_digests": None, "_operations": ExactOperations(), "_state": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _digests=WeakTensorKeyDictionary())
        self._versions = [(name, tensor, version_of(tensor)) for name, tensor, _ in self._versions]

    @alone
    def _prepared(self) -> _Facts:
        if self._facts is None:
            with self.session():
                facts = self._first_pass()
                state = self._borrowed_state()
                state.check_unwritten()  # an outer session would tell only when all the work is done
                self._facts, self._versions, self._values = facts, state.versions, state.digests
                self._modules = dict(self.model.named_modules(remove_duplicate=False))
        return self._facts

    @contextmanager
    def session(self) -> Iterator[None]:
        """Borrow the model while terms are evaluated; on leaving, also by an exception, it is exactly as before.

        Sessions nest, and an inner one costs next to nothing. Gradients are enabled whatever the caller has set. A
        session sets what belongs to the whole process (random streams, precision, attention), so there is one at a
        time: another thread waits for its end, whatever the problem.

        Raises
        ------
        ProblemError
            If the weights have been changed since the problem was prepared, or hooks been added that may change
            derivatives.
        OperatorError
            If the forward pass wrote to the weights.
        """
        with SESSIONS, torch.inference_mode(False), torch.enable_grad():
            if self._state is not None:
                yield
                return
            self._check_unchanged()
            check_hooks(self.model, self.parameters)
            selected, unread = list(self.parameters.values()), self._facts is None
            try:
                with (
                    borrowed(self.model, selected, self.mode, self._streams, copies=unread) as self._state,
                    self._operations.replacing(self.replaced_operations),
                ):
                    self._check_values(self._state)
                    yield
            finally:
                self._state = None

    @contextmanager
    def moved(self, directions: Sequence[Tensor], step: float) -> Iterator[float]:
        """Let the selected parameters be at w + step v meanwhile, in place and past autograd.

        Gives the step that rounding has left, in units of v. In place, since a backward pass may run the model again
        (activation checkpoints, adjoint methods), and layers may hold their weights in lists. Cost: copies of the
        parameters.
        """
        parameters = list(self.parameters.values())
        with self._borrowed_state().moved(parameters) as originals:
            products = []
            for parameter, original, direction in zip(parameters, originals, directions, strict=True):
                target = (original.to(direction.dtype) + step * direction).to(original.dtype)
                parameter.data.copy_(target)
                gone = as_real(target.to(direction.dtype) - original.to(direction.dtype)).double()
                along = as_real(direction).double()
                products.append(torch.stack([(gone * along).sum(), along.square().sum()]))
            gone_along, squares = torch.stack(products).sum(0).tolist()
            yield gone_along / squares if squares else 0.0

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
        facts = self._prepared()
        evaluated: list[tuple[int, Tensor]] = []
        index = -1
        for index, batch in self._batches():
            if index >= len(facts.digests) or _data.digest(batch, self._digests) != facts.digests[index]:
                raise ProblemError(self._data_changed(f"batch {index} differs from that of the first pass", index))
            if facts.weights[index] == 0:
                continue
            term = LossTerm(self, index, batch, facts.weights[index])
            yield term
            if term.value is not None:
                evaluated.append((index, term.value))
        if index + 1 != len(facts.digests):
            counts = f"this pass has {index + 1} batches, the first had {len(facts.digests)}"
            raise ProblemError(self._data_changed(counts))
        if evaluated:
            self._check_evaluated(evaluated)

    def first_term(self) -> LossTerm:
        """Return the first loss term, in a session, for trials; its losses are compared as soon as they are there.

        A fresh one each time, since a loss may write to its batch.
        """
        facts = self._prepared()
        for index, batch in self._batches():
            if _data.digest(batch, self._digests) != facts.digests[index]:
                raise ProblemError(self._data_changed(f"batch {index} differs from that of the first pass", index))
            if facts.weights[index]:
                return LossTerm(self, index, batch, facts.weights[index], alone=True)
        raise ProblemError(self._data_changed("no batch of this pass has loss terms"))

    def _batches(self) -> Iterator[tuple[int, Any]]:
        # The data has a random stream of its own, so that what a forward pass draws does not decide what comes next.
        self._streams.seed(0)
        try:
            iterator = iter(self.data)
        except Exception as error:
            self._refuse_unreadable(0, error)
            raise
        stream = self._streams.state()
        for index in itertools.count():
            self._streams.set_state(stream)
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                self._refuse_unreadable(index, error)
                raise
            stream = self._streams.state()
            yield index, batch

    def _refuse_unreadable(self, index: int, error: Exception) -> None:
        """Raise a ProblemError if the data could be read once; what else it raises tells its owner most as it is."""
        if self._facts is None or isinstance(error, HESDError | MemoryError | torch.cuda.OutOfMemoryError):
            return
        raise ProblemError(
            f"the data could be read once, but raised {type(error).__name__} at batch {index} of a later pass: "
            f"{error}; give data that can be read again and again, as list(data) is"
        ) from error

    def _batch_loss(self, index: int, batch: Any) -> tuple[Tensor, Any]:
        """Return the loss of one batch, and its count if the loss returned one."""
        result = self._call(self.loss, index, batch)
        if isinstance(result, tuple) and len(result) == 2:
            return _checked_loss(result[0], index), result[1]
        return _checked_loss(result, index), None

    def _call(self, function: Callable[[Any, Any], Any], index: int, batch: Any) -> Any:
        """Return function(model, batch), with buffers and random streams as at every evaluation of the batch."""
        self._borrowed_state().begin_evaluation()
        self._streams.seed(index + 1)
        before = [(path, leaf, version_of(leaf)) for path, leaf in _data.leaves(batch) if isinstance(leaf, Tensor)]
        try:
            result = function(self.model, batch)
        except StopIteration as error:  # which the generators around would take for their own end
            raise ProblemError(
                f"forward or loss raised StopIteration at batch {index}, as next() does for an iterator that is used "
                "up; give it a default, or an iterator that starts afresh at every call"
            ) from error
        except RuntimeError as error:
            elsewhere = next(((path, leaf) for path, leaf, _ in before if leaf.device != self.device), None)
            if elsewhere is None or "same device" not in str(error):
                raise
            raise ProblemError(
                f"{elsewhere[0]} of batch {index} of the data is on {elsewhere[1].device} and the parameters on "
                f"{self.device}; give batches that are there, or let the loss move them, as those of hesd_fast.losses "
                f"do. PyTorch says: {str(error).splitlines()[0]}"
            ) from error
        if (altered := _altered_leaf(before, batch)) is not None:
            self._altered.setdefault(index, altered)  # harmless where the data makes every batch afresh
        return result

    @contextmanager
    def replaced(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Let modules find other tensors in the place of the selected parameters, under every name they have."""
        replacements = {id(p): weight for p, weight in zip(self.parameters.values(), weights, strict=True)}
        changed = []
        try:
            for module in self.model.modules():
                for name, parameter in module._parameters.items():
                    if id(parameter) in replacements:
                        changed.append((module._parameters, name, parameter))
                        module._parameters[name] = replacements[id(parameter)]  # type: ignore[assignment]
            yield
        finally:
            for parameters, name, parameter in changed:
                parameters[name] = parameter

    def _borrowed_state(self) -> ModelState:
        if self._state is None:
            raise RuntimeError("a loss term was evaluated outside of a session; use `with problem.session():`")
        return self._state

    def _first_pass(self, before: Sequence[float] = ()) -> _Facts:
        """Read the data; ``before`` has the first losses of a pass that ended where an operation was to be replaced."""
        values: list[float] = []
        digests: list[int] = []
        sizes: list[int] = []
        dtype = self.dtype
        counter = TermCounter(self.loss, self.count)
        reading = None if is_ready_made(self.loss) else self._reading_check()
        depends = warned = False
        for index, batch in self._batches():
            _data.check_batch(batch, index)
            digests.append(_data.digest(batch, self._digests))
            sizes.append(_data.size_in_bytes(batch))
            loss, count = self._batch_loss(index, batch)
            self._borrowed_state().check_members()
            check_hooks(self.model, self.parameters)  # forward or loss may have registered some
            values.append(float(loss.detach()))
            dtype = loss.dtype
            if counter.add(index, batch, values[-1], count):
                self._check_first_value(loss, values[-1], index, first=not depends)
                if found := operations_in(loss).keys() - self.replaced_operations:
                    self.replaced_operations += tuple(sorted(found))
                    self._operations.add(found)
                    del loss  # its graph
                    return self._first_pass(values)  # anew, so that all values are those of one function
                del loss  # its graph
                if not depends:
                    self._check_selection(index, batch, values[-1], dtype)
                depends = True
            if index < len(before):
                self._check_replaced_value(before[index], values[-1], index, dtype)
            if reading is not None:
                warned = warned or warn_of_fraction(index, batch, count)
                if index not in self._altered:
                    reading.see(index, batch, values[-1], count)
        if not digests:
            raise ProblemError("the data yields no batch; give at least one (a used-up iterator yields none)")
        counter.shapes_suffice = reading is None or reading.counts_samples
        total = counter.total
        if total <= 0:
            raise ProblemError(f"the {len(values)} batches hold {total:g} loss terms; at least one is wanted")
        weights = counter.weights
        if not all(map(math.isfinite, weights)):
            raise ProblemError(
                f"the {len(values)} batches hold {total:g} loss terms, too few or too many to divide by; give the "
                "number of terms as count"
            )
        return _Facts(values, dtype, weights, digests, sizes, total, counter.description)

    def _reading_check(self) -> ReadingCheck:
        return ReadingCheck(self._batch_loss, self.count, self.epsilon, self.device)

    def _check_first_value(self, loss: Tensor, value: float, index: int, first: bool) -> None:
        if not math.isfinite(value):
            raise ProblemError(f"the loss of batch {index} is {value}; a finite loss is wanted, check model and data")
        parameters = list(self.parameters.values())
        frozen = next((name for name, parameter in self.parameters.items() if not parameter.requires_grad), None)
        if frozen is not None:
            raise ProblemError(
                f"forward or loss turned requires_grad of {frozen!r} off, which is selected; let them leave it, or "
                "select other parameters"
            )
        # The data may require gradients too, so that only a backward pass shows what the loss depends on.
        if not loss.requires_grad or (first and all(g is None for g in _gradients(loss, parameters))):
            raise ProblemError(
                f"the loss of batch {index} does not depend on the selected parameters "
                f"({', '.join(list(self.parameters)[:3])}{', ...' if len(parameters) > 3 else ''}); "
                "select others, and do not hide them behind torch.no_grad, .detach(), .item() or a reentrant checkpoint"
            )

    def _check_selection(self, index: int, batch: Any, value: float, dtype: torch.dtype) -> None:
        """Raise an OperatorError if the loss is another one with all parameters that the user differentiates by.

        Code that asks whether a parameter requires gradients is another function for every selection. Cost: one forward
        pass of one batch, where the selection leaves something out.
        """
        with self._borrowed_state().as_the_user_has_it() as differs:
            if not differs:
                return
            whole = float(self._batch_loss(index, batch)[0].detach())
        if not self._is_same(whole, value, dtype):
            raise OperatorError(
                f"the loss depends on which parameters are selected: batch {index} gives {value!r} where only the "
                f"selected ones require gradients, and {whole!r} with all that did; model or loss take another path "
                "where a parameter does not require gradients. Take that out, or select all parameters and look at "
                "some of them by hesd_fast.analyze_groups"
            )

    def _check_replaced_value(self, before: float, value: float, index: int, dtype: torch.dtype) -> None:
        """Raise an OperatorError unless a loss is the same to rounding as before operations were replaced."""
        if not abs(value - before) <= 16.0 * math.sqrt(torch.finfo(dtype).eps) * abs(before):
            raise OperatorError(
                f"the loss of batch {index} is {before!r}, and {value!r} with {', '.join(self.replaced_operations)} in "
                "ordinary operations, as exact products need them; if forward or loss draw random numbers of their own "
                "or change the batch, mend that; else write these operations in ordinary ones yourself"
            )

    def _check_unchanged(self) -> None:
        present = dict(self.model.named_parameters())
        stale = next((name for name, parameter in self.parameters.items() if present.get(name) is not parameter), None)
        if stale is None:
            stale = first_written(self._versions)
        if stale is None and self._modules is not None:
            modules = dict(self.model.named_modules(remove_duplicate=False))
            differing = (name for name in modules | self._modules if modules.get(name) is not self._modules.get(name))
            stale = next(differing, None)
        if stale is not None:
            raise ProblemError(f"{stale!r} of the model has changed since the problem was made; make a new Problem")

    def _check_values(self, state: ModelState) -> None:
        """Raise a ProblemError if weights are other ones than at the first pass, also where autograd did not see it."""
        now = dict(state.digests)
        changed = next((name for name, value in self._values if now.get(name, value) != value), None)
        if changed is not None:
            raise ProblemError(f"{changed!r} of the model has changed since the problem was made; make a new Problem")

    def _data_changed(self, what: str, index: int | None = None) -> str:
        found = f"the data changed between two passes: {what}; "
        if index in self._altered:
            return (
                f"{found}forward or loss changed {self._altered[index]} of it in place, so the data is no longer as it "
                "was; reload it, and let them work on a copy, as in x = x.clone()"
            )
        likely = (
            "likely shuffling or random augmentation with its own random source, forward or loss that change the batch "
            "in place, or an iterable that can be read only once"
        )
        if isinstance(self.data, DataLoader) and self.data.persistent_workers:
            likely = (
                "likely shuffling or random augmentation in a DataLoader with persistent_workers=True, which carries "
                "random state from pass to pass (leave it out)"
            )
        return f"{found}{likely}; give data that is the same each time, as list(data) is"

    def likely_causes(self) -> str:
        """Return what may make the loss change from one evaluation to the next, as words of a message."""
        suspects = [
            f"{name} ({type(module).__name__})"
            for name, module in self.model.named_modules()
            if (module.training if self.mode == "as_is" else self.mode == "train")
            and any(word in type(module).__name__ for word in ("Drop", "Norm"))
            and not isinstance(module, _SAME_IN_EVERY_MODE)
        ]
        causes = "likely causes are a random generator of its own, or a counter that forward or loss keeps; remove them"
        # The dropout and norms of PyTorch are the same at every pass: streams and buffers are put back.
        return f"{causes}, or use mode='eval' for {', '.join(suspects[:3])}" if suspects else causes

    def _check_evaluated(self, evaluated: list[tuple[int, Tensor]]) -> None:
        """Raise an OperatorError if a loss is not that of the first pass, or weights were written to."""
        self._borrowed_state().check_unwritten()
        facts = self._prepared()
        found = torch.stack([value.double() for _, value in evaluated]).tolist()
        for (index, _), value in zip(evaluated, found, strict=True):
            wanted = facts.values[index]
            if not self._is_same(value, wanted, facts.dtype):
                raise OperatorError(
                    f"the loss is not deterministic: batch {index} gave {wanted!r} at first and now {value!r}, "
                    f"from the same data and random seed; {self.likely_causes()}"
                )

    def _is_same(self, value: float, wanted: float, dtype: torch.dtype) -> bool:
        """Whether two values of a loss differ by no more than two evaluations of one function may."""
        epsilon = torch.finfo(dtype).eps
        # A GPU's atomic additions come in any order. Many ulps of a half-precision loss would let everything pass.
        ulps = 2 if epsilon > 1e-6 else 64 if self.device.type == "cpu" else 1024
        return abs(value - wanted) <= ulps * epsilon * abs(wanted)


def _check_loss_function(loss: Any) -> None:
    if not callable(loss):
        raise ProblemError(
            f"loss of type {type(loss).__name__} is not callable; give a function loss(model, batch), "
            "or build one with hesd_fast.losses"
        )
    function = loss.func if isinstance(loss, functools.partial) else loss
    if isinstance(function, CriterionModule) or getattr(function, "__module__", None) == functional.__name__:
        name = getattr(function, "__name__", type(function).__name__)
        raise ProblemError(
            f"loss is the criterion {name}, a function of (output, targets), but a function of (model, batch) is "
            "wanted; give hesd_fast.losses.supervised(criterion), or write a loss that calls it"
        )
    _check_arguments("loss", loss, "(model, batch)", 2)


def _check_arguments(name: str, function: Any, arguments: str, number: int) -> None:
    signature = signature_of(function)
    if signature is not None and (reason := refusal(signature, *[None] * number)):
        raise ProblemError(
            f"{name} has the arguments {signature}, and cannot be called with {arguments}: {reason}; give a function "
            f"{name}{arguments}"
        )


def _altered_leaf(before: list[tuple[str, Tensor, int]], batch: Any) -> str | None:
    """Return the path of the first tensor of a batch that was written to, replaced or taken out, or None."""
    after = dict(_data.leaves(batch))
    return next((path for path, leaf, _ in before if after.get(path) is not leaf), first_written(before))


def _checked_loss(loss: Any, index: int) -> Tensor:
    if not isinstance(loss, Tensor):
        raise ProblemError(
            f"the loss of batch {index} is of type {type(loss).__name__}; return a scalar tensor with its graph "
            "(no .item()), or (sum, count)"
        )
    if loss.ndim != 0:
        raise ProblemError(
            f"the loss of batch {index} has shape {tuple(loss.shape)}; return a scalar, for example its .mean()"
        )
    if not loss.is_floating_point():
        raise ProblemError(f"the loss of batch {index} has dtype {loss.dtype}; return a real floating-point scalar")
    return loss


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(loss, parameters, allow_unused=True)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if raised_outside_of_libraries(error):
            raise
        raise OperatorError(
            f"the gradient of the loss cannot be computed with torch.autograd.grad: {first_line(error)}; return a loss "
            "with its whole graph: no .backward() in forward or loss (or one with retain_graph=True), and nothing "
            "changed in place that the graph needs"
        ) from error
