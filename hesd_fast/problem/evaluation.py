"""The loss of a problem, evaluated batch by batch in sessions that borrow the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.weak import WeakTensorKeyDictionary

from hesd_fast.errors import HESDError, ProblemError, first_line
from hesd_fast.problem import batches as _data
from hesd_fast.problem.description import ProblemDescription
from hesd_fast.problem.exact_operations import ExactOperations
from hesd_fast.problem.model_state import SESSIONS, ModelState, borrowed
from hesd_fast.problem.parameters import as_real, check_hooks
from hesd_fast.problem.random_streams import RandomStreams
from hesd_fast.problem.tensor_digests import first_written, version_of, versions_of


class ModelSnapshot:
    """What a model was like in a session, to see later whether it has changed.

    Parameters
    ----------
    model : nn.Module
        The model.
    state : ModelState
        Of the session.
    """

    def __init__(self, model: nn.Module, state: ModelState) -> None:
        self._model = model
        self._versions, self._values = state.versions, state.digests
        self._modules = dict(model.named_modules(remove_duplicate=False))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._versions = versions_of((name, tensor) for name, tensor, _ in self._versions)

    @property
    def changed(self) -> str | None:
        """Name of the first tensor that was written to, as autograd sees it, or module that is another one, or None."""
        if (written := first_written(self._versions)) is not None:
            return written
        modules = dict(self._model.named_modules(remove_duplicate=False))
        return next(
            (name for name in modules | self._modules if modules.get(name) is not self._modules.get(name)), None
        )

    def changed_value(self, state: ModelState) -> str | None:
        """Return the name of the first tensor whose values are others, also where autograd did not see it, or None."""
        now = dict(state.digests)
        return next((name for name, value in self._values if now.get(name, value) != value), None)


class ProblemEvaluation(ProblemDescription):
    """A problem whose loss can be evaluated: each time from the same buffers, random streams and settings.

    Attributes
    ----------
    snapshot : ModelSnapshot or None
        The model that the loss was evaluated with first; from then on another one is an error.
    replaced_operations : tuple of str
        Operations of PyTorch that sessions replace by the same in ordinary operations.
    altered : dict of int to str
        By the index of a batch, the path of what model or loss changed in it.
    """

    def __init__(self, problem: ProblemDescription) -> None:
        super().__init__(problem.model, problem.loss, problem.data, problem.parameters, problem.mode, problem.count)
        self.snapshot: ModelSnapshot | None = None
        self.replaced_operations: tuple[str, ...] = ()
        self.altered: dict[int, str] = {}
        self._streams = RandomStreams(_data.loader_generators(self.data))
        self._state: ModelState | None = None
        self._operations = ExactOperations()
        self._known: MutableMapping[Tensor, tuple[int, int]] = WeakTensorKeyDictionary()  # of tensors on a device

    def __getstate__(self) -> dict[str, Any]:
        # A copy is in no session, and what was read of tensors is about these tensors.
        return {**vars(self), "_known": None, "_operations": ExactOperations(), "_state": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _known=WeakTensorKeyDictionary())

    @property
    def state(self) -> ModelState:
        """The borrowed model; a RuntimeError outside of a session."""
        if self._state is None:
            raise RuntimeError("a loss term was evaluated outside of a session; use `with problem.session():`")
        return self._state

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
            self.check_unchanged()
            check_hooks(self.model, self.parameters)
            selected, is_first = list(self.parameters.values()), self.snapshot is None
            try:
                with (
                    borrowed(self.model, selected, self.mode, self._streams, copies=is_first) as self._state,
                    self._operations.replacing(self.replaced_operations),
                ):
                    self._refuse_changed(None if self.snapshot is None else self.snapshot.changed_value(self._state))
                    yield
            finally:
                self._state = None

    def check_unchanged(self) -> None:
        """Raise a ProblemError if a selected parameter, or anything else of the snapshot, is another one."""
        present = dict(self.model.named_parameters())
        stale = next((name for name, parameter in self.parameters.items() if present.get(name) is not parameter), None)
        if stale is None and self.snapshot is not None:
            stale = self.snapshot.changed
        self._refuse_changed(stale)

    def _refuse_changed(self, name: str | None) -> None:
        if name is not None:
            raise ProblemError(f"{name!r} of the model has changed since the problem was made; make a new Problem")

    def replace_operations(self, names: Iterable[str]) -> None:
        """Replace further operations, in this session and those to come."""
        added = tuple(sorted(names))
        self.replaced_operations += added
        self._operations.add(added)

    @contextmanager
    def moved(self, directions: Sequence[Tensor], step: float) -> Iterator[float]:
        """Let the selected parameters be at w + step v meanwhile, in place and past autograd.

        Gives the step that rounding has left, in units of v. In place, since a backward pass may run the model again
        (activation checkpoints, adjoint methods), and layers may hold their weights in lists. Cost: copies of the
        parameters.
        """
        parameters = list(self.parameters.values())
        with self.state.moved(parameters) as originals:
            products = []
            for parameter, original, direction in zip(parameters, originals, directions, strict=True):
                target = (original.to(direction.dtype) + step * direction).to(original.dtype)
                parameter.data.copy_(target)
                gone = as_real(target.to(direction.dtype) - original.to(direction.dtype)).double()
                along = as_real(direction).double()
                products.append(torch.stack([(gone * along).sum(), along.square().sum()]))
            gone_along, squares = torch.stack(products).sum(0).tolist()
            yield gone_along / squares if squares else 0.0

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

    def batches(self) -> Iterator[tuple[int, Any]]:
        """Yield each batch with its index, in a session."""
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
        if self.snapshot is None or isinstance(error, HESDError | MemoryError | torch.cuda.OutOfMemoryError):
            return
        raise ProblemError(
            f"the data could be read once, but raised {type(error).__name__} at batch {index} of a later pass: "
            f"{error}; give data that can be read again and again, as list(data) is"
        ) from error

    def digest(self, batch: Any) -> int:
        """Return a number for a batch that is another one where anything in it is."""
        return _data.digest(batch, self._known)

    def data_changed(self, what: str, index: int | None = None) -> ProblemError:
        """Return the error that says how a pass differs from the first one, and what may be why."""
        found = f"the data changed between two passes: {what}; "
        if index in self.altered:
            return ProblemError(
                f"{found}forward or loss changed {self.altered[index]} of it in place, so the data is no longer as it "
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
        return ProblemError(f"{found}{likely}; give data that is the same each time, as list(data) is")

    def batch_loss(self, index: int, batch: Any) -> tuple[Tensor, Any]:
        """Return the loss of one batch, and its count if the loss returned one."""
        result = self.call(self.loss, index, batch)
        if isinstance(result, tuple) and len(result) == 2:
            return _checked_loss(result[0], index), result[1]
        return _checked_loss(result, index), None

    def call(self, function: Callable[[Any, Any], Any], index: int, batch: Any) -> Any:
        """Return function(model, batch), with buffers and random streams as at every evaluation of the batch."""
        self.state.begin_evaluation()
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
                f"do. PyTorch says: {first_line(error)}"
            ) from error
        if (altered := _altered_leaf(before, batch)) is not None:
            self.altered.setdefault(index, altered)  # harmless where the data makes every batch afresh
        return result

    def has_drawn(self, index: int) -> bool:
        """Whether the last evaluation, which was one of a batch of that index, drew from a random stream of PyTorch."""
        return self._streams.have_moved(index + 1)

    def is_same_loss(self, value: float, wanted: float, dtype: torch.dtype) -> bool:
        """Whether two values of a loss differ by no more than two evaluations of one function may."""
        epsilon = torch.finfo(dtype).eps
        # A GPU's atomic additions come in any order. Many ulps of a half-precision loss would let everything pass.
        ulps = 2 if epsilon > 1e-6 else 64 if self.device.type == "cpu" else 1024
        return abs(value - wanted) <= ulps * epsilon * abs(wanted)


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
