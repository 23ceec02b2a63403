"""Which parameters are analysed, and where each one lies in a vector of length n."""

from __future__ import annotations

import difflib
import itertools
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals
from torch.nn.parameter import is_lazy

from hesd_fast.errors import ProblemError
from hesd_fast.problem.signatures import refusal, signature_of
from hesd_fast.problem.tensor_digests import has_plain_memory

Selection = str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None


def check_model(model: nn.Module) -> None:
    """Raise a ProblemError unless the model is a module whose tensors all exist and are finite."""
    if not isinstance(model, nn.Module):
        raise ProblemError(f"model is of type {type(model).__name__}; give a torch.nn.Module")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ProblemError(f"module {name or 'model'!r} is a TorchScript module; give the original Python module")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ProblemError(f"{name!r} is not initialized (lazy module); run one forward pass first")
        if tensor.is_meta:
            raise ProblemError(f"{name!r} is on the meta device and has no values; load the weights first")
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ProblemError(f"parameter {name!r} was made in inference mode; build the model outside of it")
        if not _is_finite(parameter):
            raise ProblemError(f"parameter {name!r} holds NaN or Inf; give a model with finite weights")


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.itemsize == 1:
        tensor = tensor.float()  # the formats of 8 bits have no such function
    return bool(torch.isfinite(tensor).all())


def select_parameters(model: nn.Module, selection: Selection = None) -> dict[str, nn.Parameter]:
    """Return the selected parameters by name, in the order of the model.

    Parameters
    ----------
    model
        Its parameters are seen under every name they have. A tied parameter can be selected by any of its names,
        counts once, and is listed under the first.
    selection
        None for all with ``requires_grad``; a regular expression that must match a whole name; exact names; or a
        predicate ``(name, parameter) -> bool``. All but None may pick frozen parameters.

    Raises
    ------
    ProblemError
        If nothing matches, a name does not exist, or a selected parameter cannot be differentiated.
    """
    everything = list(model.named_parameters(remove_duplicate=False))
    names = [name for name, _ in everything]
    if not names:
        raise ProblemError(f"the model ({type(model).__name__}) has no parameters; give one that has")
    chosen = _chosen_names(everything, selection)
    identities = {id(parameter) for name, parameter in everything if name in chosen}
    selected = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in identities}
    if not selected:
        raise ProblemError(_nothing_selected(names, selection))
    for name, parameter in selected.items():
        _check_parameter(name, parameter)
    if not any(parameter.numel() for parameter in selected.values()):
        raise ProblemError(f"the selected parameters have no elements: {', '.join(selected)}; select others")
    _check_memory(selected, dict(model.named_parameters()))
    devices = {parameter.device: name for name, parameter in selected.items()}
    if len(devices) > 1:
        places = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ProblemError(f"the selected parameters are on several devices ({places}); move them to one device")
    return selected


def restrict(parameters: dict[str, nn.Parameter], names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the parameters that are named; a ProblemError if a name is not that of one, or there is none."""
    chosen = set(names)
    if unknown := sorted(chosen - parameters.keys()):
        raise ProblemError(f"{unknown[0]!r} is none of the problem's selected parameters")
    if not chosen:
        raise ProblemError("no parameter is left; give the name of one at least")
    return {name: parameter for name, parameter in parameters.items() if name in chosen}


def _chosen_names(everything: list[tuple[str, nn.Parameter]], selection: Selection) -> set[str]:
    if selection is None:
        return {name for name, parameter in everything if parameter.requires_grad}
    if isinstance(selection, str):
        try:
            pattern = re.compile(selection)
        except re.error as error:
            raise ProblemError(f"parameters={selection!r} is not a regular expression: {error}") from error
        return {name for name, _ in everything if pattern.fullmatch(name)}
    if callable(selection):
        _check_predicate(selection, everything[0])
        return {name for name, parameter in everything if selection(name, parameter)}
    if not isinstance(selection, Iterable):
        raise ProblemError(
            f"parameters is of type {type(selection).__name__}; give None, a regular expression, names or a predicate"
        )
    known = [name for name, _ in everything]
    chosen = set()
    for name in selection:
        if not isinstance(name, str):
            raise ProblemError(f"parameters holds an item of type {type(name).__name__}; give names (strings)")
        if name not in known:
            raise ProblemError(f"parameter {name!r} does not exist; the closest names are {_closest(name, known)}")
        chosen.add(name)
    return chosen


def _nothing_selected(names: list[str], selection: Selection) -> str:
    if selection is None:
        return "no parameter has requires_grad=True; select frozen ones by name, as in parameters='.*'"
    if isinstance(selection, str):
        return (
            f"parameters={selection!r} matches no parameter name in full; "
            f"the closest names are {_closest(selection, names)}"
        )
    return f"parameters={selection!r} selects no parameter; the first names are {', '.join(map(repr, names[:3]))}"


def _closest(name: str, known: list[str]) -> str:
    return ", ".join(map(repr, difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]))


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if not (parameter.is_floating_point() or parameter.is_complex()):
        raise ProblemError(
            f"parameter {name!r} has dtype {parameter.dtype}; only floating-point parameters have a Hessian, leave it "
            "out of the selection"
        )
    if parameter.is_floating_point() and parameter.itemsize == 1:
        raise ProblemError(
            f"parameter {name!r} has dtype {parameter.dtype}, in which there are no gradients; convert it, as in "
            "model.bfloat16(), or leave it out of the selection"
        )


def _check_memory(selected: Mapping[str, nn.Parameter], everything: Mapping[str, nn.Parameter]) -> None:
    """Raise a ProblemError if an element of a selected parameter lies where another element of some parameter does.

    To autograd these are two variables, and to all that writes to weights, as optimizers and differences do, they are
    one, so there is no telling which Hessian is meant.
    """
    for name, parameter in selected.items():
        if has_plain_memory(parameter) and _overlap_within(parameter):
            raise ProblemError(
                f"elements of parameter {name!r}, of shape {tuple(parameter.shape)} and stride {parameter.stride()}, "
                f"share memory, as those of an expanded tensor do; give it memory of its own, as in "
                "parameter.data = parameter.data.clone(memory_format=torch.contiguous_format), or expand it in forward"
            )
    plain = {name: parameter for name, parameter in everything.items() if has_plain_memory(parameter)}
    for one, other in _neighbours(plain):
        if (one in selected or other in selected) and _overlap(plain[one], plain[other]):
            raise ProblemError(
                f"parameters {one!r} and {other!r} share memory, but are two parameters to autograd; tie them by "
                "giving both modules the same parameter, as in head.weight = embedding.weight (not .data), or give "
                "each memory of its own, as in parameter.data = parameter.data.clone()"
            )


def _neighbours(parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of parameters the memory of which lies, from first to last element, one in the other."""
    ends = sorted((*memory_ends(parameter), name) for name, parameter in parameters.items() if parameter.numel())
    for position, (_, end, name) in enumerate(ends):
        for start, _, other in itertools.islice(ends, position + 1, None):
            if start >= end:
                break
            if parameters[name].device == parameters[other].device:
                yield name, other


def memory_ends(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses where the first element of a tensor begins and the last one ends."""
    last = sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def _overlap(one: Tensor, other: Tensor) -> bool:
    places, others = _places(one), _places(other)
    return bool(torch.isin(places, others).any())


def _overlap_within(tensor: Tensor) -> bool:
    extent = 1
    for stride, count in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if count > 1:
            if stride < extent:
                places = _places(tensor).sort().values
                return bool((places[1:] == places[:-1]).any())
            extent = stride * count
    return False


def _places(tensor: Tensor) -> Tensor:
    """Return the address of each element."""
    places = torch.full((), tensor.data_ptr(), dtype=torch.int64, device="cpu")
    for count, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = places[..., None] + torch.arange(count, device="cpu") * (stride * tensor.itemsize)
    return places.flatten()


def _check_predicate(predicate: Callable[..., object], example: tuple[str, nn.Parameter]) -> None:
    signature = signature_of(predicate)
    if signature is not None and (reason := refusal(signature, *example)):
        raise ProblemError(
            f"parameters is a predicate with the signature {signature}, which cannot be called with (name, parameter): "
            f"{reason}; give a function of both, as in lambda name, parameter: parameter.ndim > 1"
        )


def check_hooks(model: nn.Module, selected: Mapping[str, nn.Parameter]) -> None:
    """Raise a ProblemError if hooks on selected parameters or on modules could change derivatives.

    ``torch.autograd.grad`` passes gradients through them, so the product would not be the Hessian of the loss. Whether
    a hook changes them or only looks cannot be told.
    """
    for name, parameter in selected.items():
        if parameter._backward_hooks:
            raise ProblemError(
                f"parameter {name!r} has gradient hooks (register_hook), which would change its derivatives; "
                "remove them first"
            )
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise ProblemError(
                f"module {name or 'model'!r} has backward hooks (register_full_backward_hook and the like), which may "
                "change derivatives; remove them first, with the .remove() of what registering returned"
            )
    if module_globals._global_backward_hooks or module_globals._global_backward_pre_hooks:
        raise ProblemError(
            "there are backward hooks on all modules (register_module_full_backward_hook and the like), which may "
            "change derivatives; remove them first, with the .remove() of what registering returned"
        )


class ParameterLayout:
    """Where each parameter lies in a vector of length n: one after the other, each in row-major order.

    A complex parameter of k elements has 2 k columns, as ``torch.view_as_real`` lays them: the real part of an element
    and then its imaginary part.

    Parameters
    ----------
    parameters
        The parameters by name, in order.

    Attributes
    ----------
    parameters : dict
        Those given.
    offsets : list of int
        First column of each parameter; those of parameter i end where those of the next begin.
    size : int
        n, the number of columns: that of parameters, of which a complex one counts as two real ones.
    dtype : torch.dtype
        Precision of panels: float64 if any parameter is float64 or complex128, else float32.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self._shapes = [parameter.shape for parameter in parameters.values()]
        self._is_complex = [parameter.is_complex() for parameter in parameters.values()]
        widths = (p.numel() * (2 if p.is_complex() else 1) for p in parameters.values())
        ends = list(accumulate(widths, initial=0))
        self.offsets = ends[:-1]
        self.size = ends[-1]
        double = any(parameter.dtype in (torch.float64, torch.complex128) for parameter in parameters.values())
        self.dtype = torch.float64 if double else torch.float32

    def describe(self, column: int) -> str:
        """Return the name of the parameter that a column belongs to."""
        if not 0 <= column < self.size:
            raise ProblemError(f"column {column} does not exist; give one of 0 to {self.size - 1}")
        return list(self.parameters)[bisect_right(self.offsets, column) - 1]

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return one vector (n,) of the layout's dtype from one tensor per parameter."""
        shapes = [tensor.shape for tensor in tensors]
        if shapes != self._shapes:
            raise ProblemError(
                f"flatten got tensors of shapes {[tuple(s) for s in shapes]}; "
                f"give one per parameter, of shapes {[tuple(s) for s in self._shapes]}"
            )
        if [tensor.is_complex() for tensor in tensors] != self._is_complex:
            raise ProblemError(
                f"flatten got tensors of dtypes {[tensor.dtype for tensor in tensors]}; give complex ones for complex "
                "parameters and real ones for the others"
            )
        return torch.cat([as_real(tensor.detach()).reshape(-1).to(self.dtype) for tensor in tensors])

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Return one view of a vector (n,) per parameter, in the parameter's shape.

        That of a complex parameter is complex, and a copy where it begins at an odd place of memory.
        """
        if vector.shape != (self.size,):
            raise ProblemError(f"unflatten got shape {tuple(vector.shape)}; give a vector of shape ({self.size},)")
        ends = [*self.offsets[1:], self.size]
        return [
            (_as_complex(vector[start:end]) if is_complex else vector[start:end]).view(shape)
            for start, end, shape, is_complex in zip(self.offsets, ends, self._shapes, self._is_complex, strict=True)
        ]


def norm_of(tensors: Iterable[Tensor]) -> float:
    """Return the Euclidean norm of all elements of some tensors, summed in float64 so that squares do not underflow."""
    norms = [torch.linalg.vector_norm(as_real(tensor), dtype=torch.float64) for tensor in tensors]
    return float(torch.stack(norms).norm()) if norms else 0.0


def as_real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as pairs of reals in a last dimension of 2, others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _as_complex(vector: Tensor) -> Tensor:
    """Return the complex numbers (k,) whose real and imaginary parts take turns in a vector (2 k,)."""
    pairs = vector.view(-1, 2)
    return torch.view_as_complex(pairs.clone() if pairs.storage_offset() % 2 else pairs)
