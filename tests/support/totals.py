"""Total losses over all data, written out by hand and without the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import Attention, SwiGLU
from torch import Tensor, nn
from torch.nn import functional


def classification(model: nn.Module, batches: list[Any]) -> Tensor:
    """Return the cross-entropy of all samples at once."""
    output = model(torch.cat([batch[0] for batch in batches]))
    if not isinstance(output, Tensor):
        output = output["logits"] if isinstance(output, dict) else output[0]
    return functional.cross_entropy(output, torch.cat([batch[1] for batch in batches]))


def next_token(model: nn.Module, batches: list[Any]) -> Tensor:
    """Return the cross-entropy of all next tokens at once."""
    ids = torch.cat([batch[0] for batch in batches])
    output = model(ids)
    logits = output if isinstance(output, Tensor) else output.logits
    return -logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).mean()


def without_sparse_gradients(model: nn.Module, batches: list[Any]) -> Tensor:
    """Return the cross-entropy of all samples, in a form PyTorch's dense Hessian can differentiate."""
    model.embedding.sparse = False
    return classification(model, batches)


def per_batch(model: nn.Module, batches: list[Any]) -> Tensor:
    """Return the cross-entropy batch by batch, for losses that depend on how samples are grouped."""
    total = sum(len(batch[1]) for batch in batches)
    return sum(functional.cross_entropy(model(x), y, reduction="sum") for x, y in batches) / total


def seeded(total_of_batch: Callable[[nn.Module, Any], tuple[Tensor, int]]) -> Callable[[nn.Module, Any], Tensor]:
    """Return the total of a loss that draws random numbers: batch number i starts from the seed i + 1."""

    def total(model: nn.Module, batches: list[Any]) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            parts = []
            for index, batch in enumerate(batches):
                torch.manual_seed(index + 1)
                parts.append(total_of_batch(model, batch))
        return sum(part for part, _ in parts) / sum(count for _, count in parts)

    return total


def batch_classification(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """Return the summed cross-entropy of one batch and its size."""
    output = model(batch[0])
    logits = output if isinstance(output, Tensor) else output.logits
    return functional.cross_entropy(logits, batch[1], reduction="sum"), len(batch[1])


def batch_next_token(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """Return the summed cross-entropy of the next tokens of one batch and their number."""
    picked = model(batch[0]).log_softmax(-1)[:, :-1].gather(-1, batch[0][:, 1:, None])
    return -picked.sum(), picked.numel()


def next_labelled_token(model: nn.Module, batches: list[Any]) -> Tensor:
    """Return the cross-entropy of all next tokens whose label is not -100."""
    ids, labels = (torch.cat([batch[key] for batch in batches]) for key in ("input_ids", "labels"))
    wanted = labels[:, 1:].clamp(min=0)
    picked = model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, wanted[..., None])[..., 0]
    return -picked[labels[:, 1:] != -100].mean()


def in_eager_attention(total: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
    """Return ``total`` with the attention and the gates of the model in ordinary operations."""

    def plain(model: nn.Module, batches: Any) -> Any:
        for module in model.modules():
            if isinstance(module, Attention):
                module.form = "eager"
            if isinstance(module, SwiGLU):
                module.plain = True
        return total(model, batches)

    return plain


def by_layers(model: nn.Module, batches: list[Any], activation: Callable[[Tensor], Tensor] = torch.tanh) -> Tensor:
    """Return the cross-entropy of ``last(activation(first(x)))``."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return functional.cross_entropy(model.last(activation(model.first(x))), y)


def by_inner_parts(model: nn.Module, batches: list[Any]) -> Tensor:
    """Return the cross-entropy of ``last(inner(x))``, without the checkpoint between them."""
    return per_batch(nn.Sequential(model.inner, model.last), batches)


def scaled_by_hand(model: nn.Module, batches: list[Any]) -> Tensor:
    """Return the cross-entropy of ``ScaledByBuffer``, whose scale is that of each batch."""
    scales = torch.cat([(x.norm() / 4).expand(len(x), 1) for x, _ in batches])
    return by_layers(model, batches, lambda hidden: (hidden * scales).tanh())


def slopes(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean squared derivative of a network's output by its input, as physics-informed losses have."""
    x = batch[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return slope.square().sum(1).mean()


def slopes_by_hand(model: nn.Module, batches: list[Any]) -> Tensor:
    """Return the same for ``Linear, Tanh, Linear`` by the chain rule."""
    x = torch.cat([batch[0] for batch in batches])
    derivative = 1 - model[0](x).tanh().square()
    return ((derivative * model[2].weight.sum(0)) @ model[0].weight).square().sum(1).mean()


def cells_by_hand(model: nn.Module, batches: list[Any]) -> Tensor:
    """Return the cross-entropy of ``Recurrent`` with the cells of PyTorch's documentation, for the layers it has."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    layer, outputs = model.layer, x
    lengths = torch.full((len(x),), x.shape[1])
    if model.packed:
        lengths = torch.cat([1 + torch.arange(len(batch[0])) % x.shape[1] for batch in batches])
    for index in range(layer.num_layers):
        directions = [_run_cells(layer, outputs, lengths, f"l{index}{end}") for end in _ends(layer)]
        outputs = torch.cat(directions, -1)
    last = outputs.sum(1) if model.packed else outputs[:, -1]
    return functional.cross_entropy(model.classifier(last), y)


def _ends(layer: nn.RNNBase) -> tuple[str, ...]:
    return ("", "_reverse") if layer.bidirectional else ("",)


def _run_cells(layer: nn.RNNBase, x: Tensor, lengths: Tensor, end: str) -> Tensor:
    """Return the outputs (N, T, hidden) of one direction; steps after a sequence's end give zeros."""
    names = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
    input_weight, input_bias, weight, bias = (getattr(layer, f"{name}_{end}") for name in names)
    hidden = cell = x.new_zeros(len(x), layer.hidden_size)
    outputs = [hidden] * x.shape[1]
    steps = range(x.shape[1])
    for step in reversed(steps) if end.endswith("reverse") else steps:
        inner, outer = x[:, step] @ input_weight.T + input_bias, hidden @ weight.T + bias
        if layer.mode == "LSTM":
            entry, forget, candidate, exit_ = (inner + outer).chunk(4, 1)
            new_cell = forget.sigmoid() * cell + entry.sigmoid() * candidate.tanh()
            new = exit_.sigmoid() * new_cell.tanh()
        elif layer.mode == "GRU":
            (reset, update, candidate), (r, z, c) = inner.chunk(3, 1), outer.chunk(3, 1)
            mixture = (update + z).sigmoid()
            new = (1 - mixture) * (candidate + (reset + r).sigmoid() * c).tanh() + mixture * hidden
            new_cell = cell
        else:
            new, new_cell = (inner + outer).tanh(), cell
        present = (step < lengths)[:, None]
        hidden, cell = torch.where(present, new, hidden), torch.where(present, new_cell, cell)
        outputs[step] = torch.where(present, new, 0)
    return torch.stack(outputs, 1)
