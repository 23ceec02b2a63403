"""Strategies of hypothesis that compose small problems of odd models, losses, batches, data and selections.

Each comes with the same loss over all data, written without the library: of the outputs of all batches together.
"""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

from hesd_fast import losses

SMOOTH = (nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU, nn.Mish, nn.LogSigmoid, nn.Tanhshrink, nn.Identity)
KINKED = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.ELU, nn.CELU, nn.SELU, nn.Softsign)
INPUTS, STEPS, VOCABULARY = 2, 3, 5


@dataclass(frozen=True)
class Network:
    """A model and what it takes: ``draw(n, generator)`` makes the inputs of n samples.

    ``alone``: whether a sample's outputs do not depend on the other samples, nor on random numbers.
    """

    name: str
    model: nn.Module
    draw: Callable[[int, torch.Generator], Tensor]
    outputs: int
    is_smooth: bool = True
    alone: bool = True
    time_first: bool = False


@dataclass
class OddProblem:
    """What a user gives, and what should come out."""

    name: str
    model: nn.Module
    loss: Any
    data: Any
    total: Callable[[nn.Module], Tensor]
    terms: float | None
    mode: str
    selected: list[str]
    parameters: Any = None
    count: Any = None
    is_smooth: bool = True
    warns: str = ""
    """Part of a warning that has to come; none may come where it is empty."""
    outputs: Callable[[nn.Module], Tensor] | None = None
    of_outputs: Callable[[Tensor], Tensor] | None = None
    """The same loss in two parts, for ready-made ones: what the model computes of all data, and the loss of that."""

    @property
    def arguments(self) -> dict[str, Any]:
        """What analyze takes."""
        return {name: getattr(self, name) for name in ("model", "loss", "data", "parameters", "mode", "count")}

    @property
    def is_float32(self) -> bool:
        return all(parameter.dtype in (torch.float32, torch.complex64) for parameter in self.model.parameters())

    def reference(self) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """A copy of the model in float64, in its mode, and its selected parameters."""
        model = widened(copy.deepcopy(self.model))
        if self.mode != "as_is":
            model.train(self.mode == "train")
        parameters = dict(model.named_parameters())
        return model, {name: parameters[name] for name in self.selected}


def widened(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
                    tensor.data = wide(tensor.data)
    return model


def wide(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


# Models


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, 2)
        self.again = self.first

    def forward(self, input: Tensor) -> Tensor:
        return self.last(functional.linear(self.again(self.first(input).tanh()).sigmoid(), self.first.weight.T))


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.last = nn.Linear(4, 2)

    def forward(self, input: Tensor) -> Tensor:
        hidden = torch.fft.rfft(input.repeat(1, 2)) * self.kernel
        return self.last(torch.fft.irfft(hidden, 4).tanh())


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1))

    def forward(self, input: Tensor) -> Tensor:
        return (self.weight * input.sum(1, keepdim=True)).tanh()


class Scalars(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor([[0.3]]))
        self.unused, self.shift = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        return (self.a * input).sin() * self.b + self.shift


class Lookup(nn.Module):
    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(VOCABULARY, 2, padding_idx=padding), nn.Linear(2, 2)

    def forward(self, input: Tensor) -> Tensor:
        return self.last(self.embedding(input).tanh().mean(1))


class Steps(nn.Module):
    """A recurrent network's last state; sequences that end in zeros are packed if ``packed``."""

    def __init__(self, kind: type[nn.RNNBase], time_first: bool, packed: bool) -> None:
        super().__init__()
        self.cells, self.last = kind(1, 2, batch_first=not time_first), nn.Linear(2, 2)
        self.time_first, self.packed = time_first, packed

    def forward(self, input: Tensor) -> Tensor:
        if self.packed:
            lengths = torch.full((input.shape[int(self.time_first)],), STEPS - 1)
            input = pack_padded_sequence(input, lengths, batch_first=not self.time_first, enforce_sorted=False)
        state = self.cells(input)[1]
        return self.last((state[0] if isinstance(state, tuple) else state)[-1])


class Attending(nn.Module):
    """An encoder layer that does not see the last step of a sequence that begins with a positive number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(2, 1, 2, dropout=0.0, activation="gelu", batch_first=True)
        self.last = nn.Linear(2, 2)

    def forward(self, input: Tensor) -> Tensor:
        mask = torch.zeros(input.shape[:2], dtype=torch.bool)
        mask[:, -1] = input[:, 0, 0] > 0
        return self.last(self.layer(input, src_key_padding_mask=mask)[:, 0])


class Dressed(nn.Module):
    """A network whose output comes in another form."""

    def __init__(self, inner: nn.Module, form: str) -> None:
        super().__init__()
        self.inner, self.form = inner, form

    def forward(self, input: Any) -> Any:
        output = self.inner(input)
        return {"tuple": (output, input), "list": [output], "mapping": {"logits": output, "more": None}}[self.form]


def _vectors(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, INPUTS, generator=generator)


def _images(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, generator: torch.randn(n, *shape, generator=generator)


def _tokens(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(VOCABULARY, (n, STEPS), generator=generator)


def _perceptron(draw: Any) -> Network:
    activation = draw(st.sampled_from(SMOOTH + KINKED))
    width, outputs = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    model = nn.Sequential(nn.Linear(INPUTS, width, bias=draw(st.booleans())), activation(), nn.Linear(width, outputs))
    return Network(f"mlp-{activation.__name__}-{width}-{outputs}", model, _vectors, outputs, activation in SMOOTH)


def _normed(draw: Any) -> Network:
    norm = draw(st.sampled_from([nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.AlphaDropout]))
    layer = norm(3) if norm not in (nn.Dropout, nn.AlphaDropout) else norm(0.3)
    if norm is nn.BatchNorm1d:
        layer = nn.BatchNorm1d(3, track_running_stats=draw(st.booleans()), affine=draw(st.booleans()))
    model = nn.Sequential(nn.Linear(INPUTS, 3), layer, nn.Tanh(), nn.Linear(3, 2))
    return Network(f"{norm.__name__}", model, _vectors, 2, alone=norm in (nn.LayerNorm, nn.RMSNorm))


def _convolution(draw: Any) -> Network:
    kind = draw(st.sampled_from(["1d", "2d", "transposed", "strided", "pooled", "grouped"]))
    layers = {
        "1d": (nn.Conv1d(1, 2, 2), (1, 4)),
        "2d": (nn.Conv2d(1, 2, 2, padding=1), (1, 2, 2)),
        "transposed": (nn.ConvTranspose1d(1, 2, 2), (1, 3)),
        "strided": (nn.Conv1d(1, 2, 2, stride=2, padding_mode="circular", padding=1), (1, 4)),
        "pooled": (nn.Sequential(nn.Conv1d(1, 2, 2), nn.AvgPool1d(2)), (1, 5)),
        "grouped": (nn.Conv1d(2, 2, 2, groups=2, dilation=2), (2, 4)),
    }
    layer, shape = layers[kind]
    with torch.no_grad():
        width = layer(torch.zeros(1, *shape)).numel()
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, 2))
    return Network(f"conv-{kind}", model, _images(*shape), 2)


def _recurrent(draw: Any) -> Network:
    kind = draw(st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]))
    time_first, packed = draw(st.booleans()), draw(st.booleans())

    def sequences(n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, STEPS, 1, generator=generator)

    name = f"{kind.__name__}{'-time-first' if time_first else ''}{'-packed' if packed else ''}"
    return Network(name, Steps(kind, time_first, packed), sequences, 2, time_first=time_first)


def _other(draw: Any) -> Network:
    empty = nn.Sequential(nn.Linear(INPUTS, 2), nn.Tanh())
    empty.register_parameter("nothing", nn.Parameter(torch.zeros(0, 3)))
    frozen = nn.Sequential(nn.Linear(INPUTS, 3), nn.Tanh(), nn.Linear(3, 2))
    frozen[0].requires_grad_(False)
    made: dict[str, tuple[nn.Module, Any, int]] = {
        "tied": (Tied(), _vectors, 2),
        "complex": (Spectral(), _vectors, 2),
        "scalars": (Scalars(), _vectors, 2),
        "one": (One(), _vectors, 1),
        "padded": (Lookup(0), _tokens, 2),
        "lookup": (Lookup(None), _tokens, 2),
        "empty": (empty, _vectors, 2),
        "frozen": (frozen, _vectors, 2),
        "attention": (Attending(), _images(STEPS, 2), 2),
    }
    name = draw(st.sampled_from(sorted(made)))
    return Network(name, *made[name])


@st.composite
def networks(draw: Any) -> Network:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return draw(st.sampled_from([_perceptron, _perceptron, _normed, _convolution, _recurrent, _other, _other]))(draw)


# Losses


@dataclass(frozen=True)
class Criterion:
    """A loss module of PyTorch with targets for it, and what has to come before it.

    ``terms(targets, elements, samples)`` is what its mean is of.
    """

    name: str
    module: nn.Module
    targets: Callable[[int, int, torch.Generator], Tensor]
    terms: Callable[[Tensor, int, int], float]
    last: Callable[[], nn.Module] | None = None
    is_smooth: bool = True


def _classes(n: int, outputs: int, generator: torch.Generator) -> Tensor:
    return torch.randint(outputs, (n,), generator=generator)


def _some_ignored(n: int, outputs: int, generator: torch.Generator) -> Tensor:
    ignored = torch.rand(n, generator=generator) < 0.3
    ignored[:1] = False
    return _classes(n, outputs, generator).masked_fill(ignored, -100)


def _numbers(n: int, outputs: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, outputs, generator=generator)


def _shares(n: int, outputs: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, outputs, generator=generator)


def _probabilities(n: int, outputs: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, outputs, generator=generator).softmax(-1)


def _signs(n: int, outputs: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (n, outputs), generator=generator) * 2.0 - 1.0


def _elements(targets: Tensor, elements: int, samples: int) -> float:
    return float(elements)


def _samples(targets: Tensor, elements: int, samples: int) -> float:
    return float(samples)


def _counted(targets: Tensor, elements: int, samples: int) -> float:
    return float((targets != -100).sum())


def _log_softmax() -> nn.Module:
    return nn.LogSoftmax(-1)


CRITERIA = (
    Criterion("cross-entropy", nn.CrossEntropyLoss(), _classes, _samples),
    Criterion("cross-entropy-ignored", nn.CrossEntropyLoss(), _some_ignored, _counted),
    Criterion("cross-entropy-smoothed", nn.CrossEntropyLoss(label_smoothing=0.2), _some_ignored, _counted),
    Criterion("cross-entropy-sum", nn.CrossEntropyLoss(reduction="sum"), _some_ignored, _samples),
    Criterion("cross-entropy-soft", nn.CrossEntropyLoss(), _probabilities, _samples),
    Criterion("nll", nn.NLLLoss(), _classes, _samples, _log_softmax),
    Criterion("mse", nn.MSELoss(), _numbers, _elements),
    Criterion("mse-sum", nn.MSELoss(reduction="sum"), _numbers, _samples),
    Criterion("l1", nn.L1Loss(), _numbers, _elements, is_smooth=False),
    Criterion("smooth-l1", nn.SmoothL1Loss(beta=0.5), _numbers, _elements, is_smooth=False),
    Criterion("huber", nn.HuberLoss(delta=0.7), _numbers, _elements, is_smooth=False),
    Criterion("bce-logits", nn.BCEWithLogitsLoss(), _shares, _elements),
    Criterion("bce", nn.BCELoss(), _shares, _elements, nn.Sigmoid),
    Criterion("poisson", nn.PoissonNLLLoss(), lambda n, k, g: _signs(n, k, g) + 2, _elements),
    Criterion("kl", nn.KLDivLoss(reduction="mean"), _probabilities, _elements, _log_softmax),
    Criterion("kl-batchmean", nn.KLDivLoss(reduction="batchmean"), _probabilities, _samples, _log_softmax),
    Criterion("hinge-embedding", nn.HingeEmbeddingLoss(), _signs, _elements, is_smooth=False),
    Criterion("soft-margin", nn.SoftMarginLoss(), _signs, _elements),
    Criterion("multilabel-soft-margin", nn.MultiLabelSoftMarginLoss(), _shares, _samples),
)

COUNTS = (int, float, torch.tensor, np.int64, np.float32, lambda n: torch.tensor(float(n), dtype=torch.float64))

VALUES = {
    "square": lambda y, t: (y - t).square().sum(-1),
    "log-cosh": lambda y, t: (functional.softplus(2 * (y - t)) - (y - t)).sum(-1),
    "cubic": lambda y, t: ((y - t) ** 3).sum(-1) / 3,
    "wave": lambda y, t: (y.sum(-1) - t.sum(-1)).sin(),
    "linear": lambda y, t: (y * t).sum(-1),
}
"""Losses of one's own, one for each sample."""

EXTRAS = ("nothing", "decay", "stopped", "penalty", "random")


def output_of(result: Any) -> Tensor:
    if isinstance(result, dict):
        return result["logits"]
    return result[0] if isinstance(result, tuple | list) else result


def squared_norm(model: nn.Module) -> Tensor:
    return sum(((torch.view_as_real(p) if p.is_complex() else p) ** 2).sum() for p in model.parameters())


# Batches and data

Pair = namedtuple("Pair", ["input", "labels"])


@dataclass
class Sample:
    input: Tensor
    labels: Tensor


PACK = {
    "tuple": lambda x, t: (x, t),
    "list": lambda x, t: [x, t],
    "mapping": lambda x, t: {"input": x, "labels": t},
    "named tuple": Pair,
    "dataclass": Sample,
    "object": lambda x, t: SimpleNamespace(input=x, labels=t),
    "samples": lambda x, t: list(zip(x, t, strict=True)),
    "sparse": lambda x, t: (x.to_sparse(), t),
    "nested": lambda x, t: {"deep": [(x,), {"t": t, "name": "n"}], "nothing": None, "number": 3},
}
"""Forms of a batch; the first three serve ready-made losses, the first five tell the number of samples."""


def unpack(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, dict):
        if "deep" in batch:
            return batch["deep"][0][0], batch["deep"][1]["t"]
        return batch["input"], batch["labels"]
    if isinstance(batch, Sample | SimpleNamespace):
        return batch.input, batch.labels
    if isinstance(batch, list) and batch and isinstance(batch[0], tuple):
        return torch.stack([x for x, _ in batch]), torch.stack([t for _, t in batch])
    x, t = batch
    return (x.to_dense() if x.layout is torch.sparse_coo else x), t


class Again:
    """Makes its batches anew at every pass."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(copy.deepcopy(self.batches))


def _split(tensor: Tensor, sizes: list[int]) -> list[Tensor]:
    return list(tensor.split(sizes))


@st.composite
def sizes_of_batches(draw: Any, even: bool, with_empty: bool) -> list[int]:
    if even:
        return [draw(st.integers(2, 4))] * draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(0 if with_empty else 2, 5), min_size=1, max_size=4))
    return sizes if sum(sizes) > 1 else [*sizes, 3]


# Problems


@st.composite
def problems(draw: Any, ready_made: bool | None = None) -> OddProblem:
    """A problem that has a right answer."""
    network = draw(networks())
    is_ready = draw(st.booleans()) if ready_made is None else ready_made
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float64, torch.float32]))
    if not network.alone:
        dtype = torch.float64  # dropout draws other masks in other precisions
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    mode = draw(st.sampled_from(["eval", "train", "as_is"]))
    made = _ready_made if is_ready else _of_ones_own
    problem = made(draw, network, dtype, generator, mode)
    _freeze_some(draw, problem)
    _select(draw, problem)
    return problem


def _in(dtype: torch.dtype, model: nn.Module) -> nn.Module:
    return widened(model) if dtype == torch.float64 else model


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _outputs(model: nn.Module, network: Network, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs batch by batch, each from the random seed that a pass gives it."""
    found = []
    for index, x in enumerate(inputs):
        torch.manual_seed(index + 1)
        found.append(output_of(model(wide(x))))
    return found


def _ready_made(draw: Any, network: Network, dtype: torch.dtype, generator: torch.Generator, mode: str) -> OddProblem:
    criterion = draw(st.sampled_from(CRITERIA))
    sizes = draw(sizes_of_batches(even=False, with_empty=network.name.startswith("mlp")))
    n, outputs = sum(sizes), network.outputs
    x = _cast(network.draw(n, generator), dtype)
    t = _cast(criterion.targets(n, outputs, generator), dtype)
    model = nn.Sequential(network.model, criterion.last()) if criterion.last else network.model
    form = draw(st.sampled_from(["tensor", "tuple", "list", "mapping"])) if not criterion.last else "tensor"
    if form != "tensor":
        model = Dressed(model, form)
    model = _in(dtype, model)
    inputs = [part.transpose(0, 1) if network.time_first else part for part in _split(x, sizes)]
    pack = draw(st.sampled_from(["tuple", "list", "mapping"]))
    batches = [PACK[pack](*pair) for pair in zip(inputs, _split(t, sizes), strict=True)]
    data = _data(draw, batches, network, x, t, sizes, pack)

    def of_outputs(found: Tensor) -> Tensor:
        value = criterion.module(found, wide(t))
        return value / n if criterion.module.reduction == "sum" else value

    def outputs_of_all(reference: nn.Module) -> Tensor:
        return torch.cat(_outputs(reference, network, inputs))

    return OddProblem(
        f"{network.name}, {criterion.name}, {form}, {pack}, {sizes}, {dtype}, {mode}, {type(data).__name__}",
        model,
        losses.supervised(criterion.module),
        data,
        lambda reference: of_outputs(outputs_of_all(reference)),
        criterion.terms(t, n * outputs, n),
        mode,
        [],
        is_smooth=network.is_smooth and criterion.is_smooth,
        outputs=outputs_of_all,
        of_outputs=of_outputs,
    )


def _data(draw: Any, batches: list[Any], network: Network, x: Tensor, t: Tensor, sizes: list[int], pack: str) -> Any:
    kinds = ["list", "list", "again"]
    if network.alone and not network.time_first and pack in ("tuple", "list"):
        kinds.append("loader")
    if len(batches) == 1 and pack in ("tuple", "mapping", "named tuple", "dataclass"):
        kinds.append("one")
    kind = draw(st.sampled_from(kinds))
    if kind == "loader":
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99))) if draw(st.booleans()) else None
        size = max(draw(st.integers(1, len(x))), 1)
        return DataLoader(TensorDataset(x, t), size, shuffle=draw(st.booleans()), generator=generator)
    if kind == "one":
        return batches[0]
    return Again(batches) if kind == "again" else batches


def _of_ones_own(draw: Any, network: Network, dtype: torch.dtype, generator: torch.Generator, mode: str) -> OddProblem:
    value = draw(st.sampled_from(sorted(VALUES)))
    extra = draw(st.sampled_from(EXTRAS))
    is_integer = network.draw(1, torch.Generator()).dtype == torch.int64
    # PyTorch gets derivatives of gradients through fused norms and attention wrong, and has none of some others.
    if extra == "penalty" and (is_integer or not network.alone or not network.name.startswith(("mlp", "conv"))):
        extra = "nothing"
    counting = draw(st.sampled_from(["mean", "pair", "count="]))
    forms = [name for name in PACK if not (network.time_first and name == "samples")]
    pack = draw(st.sampled_from(forms))
    tells = pack in ("tuple", "list", "mapping", "named tuple", "dataclass") and not network.time_first
    even = counting == "mean" and not tells
    with_empty = network.name.startswith("mlp") and pack in ("tuple", "mapping")
    sizes = draw(sizes_of_batches(even=even, with_empty=with_empty))
    n = sum(sizes)
    x, t = _cast(network.draw(n, generator), dtype), _cast(_numbers(n, network.outputs, generator), dtype)
    form = draw(st.sampled_from(["tensor", "tuple", "mapping"]))
    model = _in(dtype, network.model if form == "tensor" else Dressed(network.model, form))
    inputs = [part.transpose(0, 1) if network.time_first else part for part in _split(x, sizes)]
    targets = _split(t, sizes)
    batches = [PACK[pack](*pair) for pair in zip(inputs, targets, strict=True)]
    data = _data(draw, batches, network, x, t, sizes, pack)
    as_count = draw(st.sampled_from(COUNTS))
    decay = 0.1 if extra == "decay" else 0.0

    def values(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        """The loss of each sample."""
        if extra == "penalty":
            x = x.detach().clone().requires_grad_()
        y = output_of(model(x))
        found = VALUES[value](y, t)
        if extra == "penalty":
            (slope,) = torch.autograd.grad(found.sum(), x, create_graph=True)
            found = found + slope.flatten(1).square().sum(1) if not network.time_first else found
        if extra == "stopped":
            found = found + (y * y.detach().sigmoid()).sum(-1)
        return found

    def scale() -> Any:
        return 1 + torch.rand(()) if extra == "random" else 1.0

    def loss(model: nn.Module, batch: Any) -> Any:
        x, t = unpack(batch)
        found = values(model, x, t)
        number = len(t)
        if counting == "pair":
            pair_sum = found.sum() * scale() + number * decay * squared_norm(model)
            return pair_sum, as_count(number)
        return found.mean() * scale() + decay * squared_norm(model)

    def total(reference: nn.Module) -> Tensor:
        parts = []
        for index, (x, t) in enumerate(zip(inputs, targets, strict=True)):
            torch.manual_seed(index + 1)
            parts.append(values(reference, wide(x), wide(t)).sum() * scale())
        return sum(parts) / n + decay * squared_norm(reference)

    if isinstance(data, DataLoader) and extra == "random":
        data = batches
    return OddProblem(
        f"{network.name}, {value} {extra}, {counting}, {form}, {pack}, {sizes}, {dtype}, {mode}, {type(data).__name__}",
        model,
        loss,
        data,
        total,
        float(n) if counting != "mean" or tells else None,
        mode,
        [],
        count=(lambda batch: as_count(len(unpack(batch)[1]))) if counting == "count=" else None,
        is_smooth=network.is_smooth,
        warns="is not the derivative of its first" if extra == "stopped" else "",
    )


def _freeze_some(draw: Any, problem: OddProblem) -> None:
    problem.model.train(draw(st.booleans()))
    parameters = list(problem.model.parameters())
    if len(parameters) > 1 and draw(st.booleans()):
        parameters[draw(st.integers(0, len(parameters) - 1))].requires_grad_(False)
    if draw(st.booleans()):
        parameters[-1].grad = torch.ones_like(parameters[-1])


def _select(draw: Any, problem: OddProblem) -> None:
    """Draw a selection in one of its forms, and list what it means."""
    names = [name for name, _ in problem.model.named_parameters()]
    free = [name for name, p in problem.model.named_parameters() if p.requires_grad]
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    kind = draw(st.sampled_from(["all", "all", "none", "names", "predicate", "expression", "tuple"]))
    problem.parameters, wanted = {
        "all": (".*", names),
        "none": (None, free),
        "names": (chosen, chosen),
        "tuple": (tuple(reversed(chosen)), chosen),
        "predicate": (lambda name, parameter: name in chosen, chosen),
        "expression": ("|".join(name.replace(".", r"\.") for name in chosen), chosen),
    }[kind]
    problem.selected = [name for name in names if name in wanted]
    problem.name += f", {kind} {problem.selected}"
