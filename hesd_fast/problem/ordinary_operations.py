"""Functions of PyTorch written in operations that can be differentiated as often as one likes.

Each has the value of PyTorch's own to rounding, and its first derivative, also where that is a choice: at kinks, at
ties and at distances of zero. Half precision is computed in float32 and rounded once. Arguments are those of PyTorch's
functions; a reduction may also be given by its number, as operators have it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

IMPOSSIBLE = -1e30
"""The logarithm of a probability of zero: finite, so that its derivatives are zeros; float32 can hold it."""


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def hardsigmoid(x: Tensor) -> Tensor:
    """Return min(max(x + 3, 0), 6) / 6, whose derivative at the kinks is 0."""
    return ((torch.nn.functional.hardtanh(_wide(x), -3.0, 3.0) + 3.0) / 6.0).to(x.dtype)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return g v / |v|, with the norm over all dimensions but ``dim``, or over all for -1."""
    others = [i for i in range(v.ndim) if dim == -1 or i != dim % v.ndim]
    wide = _wide(v)
    norm = torch.linalg.vector_norm(wide, dim=others, keepdim=True) if others else wide.abs()
    return (wide * (_wide(g) / norm)).to(v.dtype)


# Logarithms of probabilities


def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return z - log sum exp(z) over a dimension, with derivatives in which nothing cancels.

    With k the largest entry it is d - log(1 + s), where d = z - z_k and s is the sum of exp(d) over all others. So next
    to a probability of 1 the value keeps its digits, and so do the first two derivatives: entry k of them is minus the
    sum of the others, where PyTorch subtracts numbers next to 1.
    """
    z = _wide(input if dtype is None else input.to(dtype))
    if not z.numel():
        return torch.log_softmax(z, dim).to(dtype or input.dtype)
    top = z.argmax(dim, keepdim=True)
    below = (z - z.gather(dim, top)).scatter(dim, top, 0.0)
    others = below.exp().scatter(dim, top, 0.0).sum(dim, keepdim=True)
    return (below - others.log1p()).to(dtype or input.dtype)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str | int = "mean",
) -> Tensor:
    """Return -weight (pos_weight y log p + (1 - y) log(1 - p)) with p = 1 / (1 + exp(-x)), nowhere computed as 1 - p.

    Both logarithms are -log(1 + exp(-|x|)), and |x| less where the probability is the smaller one: that part is exactly
    zero, with its derivatives, where it does not count.
    """
    x, target = _wide(input), _wide(target)
    ones, zeros = target if pos_weight is None else pos_weight * target, 1 - target
    positive = x > 0
    far = ones * (-x).masked_fill(positive, 0.0) + zeros * x.masked_fill(~positive, 0.0)
    losses = far + (ones + zeros) * _log_of_the_larger(x)
    return _reduced(losses if weight is None else losses * weight, reduction)


def _log_of_the_larger(x: Tensor) -> Tensor:
    """Return log(1 + exp(-|x|)), with the derivatives of log(1 + exp(x)) at 0, where |x| has none."""
    return ((1 - 2 * (x > 0).to(x.dtype)) * x).exp().log1p()


# Bags of embeddings


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    mode: str,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Return the sum, mean or maximum (bags, d) of rows of ``weight`` (m, d), over the indices of each bag.

    Parameters
    ----------
    weight : tensor (m, d)
        The rows.
    indices : tensor (k,)
        Rows of all bags, one bag after the other.
    offsets : tensor (bags,), or (bags + 1,) with the end of the last one
        Where each bag begins. A bag of none has zeros.
    mode : {"sum", "mean", "max"}
        Of equal entries of a bag, the maximum takes the first.
    per_sample_weights : tensor (k,), optional
        Factors of the rows, for a sum.
    include_last_offset : bool
        Whether ``offsets`` has the end of the last bag.
    padding_idx : int, optional
        A row that counts as not there.
    """
    offsets = offsets[:-1] if include_last_offset else offsets
    places = torch.arange(len(indices), device=indices.device, dtype=offsets.dtype)
    bags = torch.searchsorted(offsets.contiguous(), places, right=True) - 1
    if padding_idx is not None:
        kept = (indices != padding_idx % len(weight)).nonzero().squeeze(1)
        indices, bags = indices[kept], bags[kept]
        per_sample_weights = None if per_sample_weights is None else per_sample_weights[kept]
    rows = _wide(torch.nn.functional.embedding(indices, weight))
    if per_sample_weights is not None:
        rows = rows * _wide(per_sample_weights)[:, None]
    sizes = torch.bincount(bags, minlength=len(offsets))
    if mode == "max":
        return _largest(rows, sizes).to(weight.dtype)
    sums = rows.new_zeros(len(offsets), weight.shape[1]).index_add(0, bags, rows)
    if mode == "mean":
        sums = sums / sizes.clamp(min=1).to(sums.dtype)[:, None]
    return sums.to(weight.dtype)


def _largest(rows: Tensor, sizes: Tensor) -> Tensor:
    """Return the largest entries (bags, d) of rows that lie bag after bag; zeros for a bag of none."""
    if not len(rows):
        return rows.sum(0).expand(len(sizes), -1)
    starts = sizes.cumsum(0) - sizes
    positions = starts[:, None] + torch.arange(int(sizes.max()), device=rows.device)
    there = positions < (starts + sizes)[:, None]
    values = rows[positions.clamp(max=len(rows) - 1)]  # (bags, longest, d)
    winners = values.detach().masked_fill(~there[:, :, None], -math.inf).argmax(1, keepdim=True)
    return torch.where(sizes[:, None] > 0, values.gather(1, winners).squeeze(1), 0.0)


# Connectionist temporal classification


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str | int = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """Return the loss of Graves, Fernandez, Gomez, Schmidhuber, ICML 2006, by its forward recursion (equation 6).

    Cost: a few operations on (N, 2 S + 1) for each of the T frames. Its derivatives are those of its value; PyTorch's
    own are those only behind a softmax, where the probabilities of a frame add up to one.

    Parameters
    ----------
    log_probs : tensor (T, N, C) or (T, C)
        Logarithms of the probabilities of the classes, by frame.
    targets : tensor (N, S) or (sum of target lengths,)
        Labels, padded or one sequence after the other.
    input_lengths, target_lengths : tensor or sequence of int, (N,)
        Frames and labels that count.
    blank : int
        Class of the blank.
    reduction : {"none", "mean", "sum"} or its number
        "mean" divides each loss by its number of labels before the mean is taken.
    zero_infinity : bool
        Whether a sequence that cannot be aligned has a loss of zero; else it is infinite, with derivatives of zero.
    """
    batched = log_probs.ndim == 3
    frames = _wide(log_probs if batched else log_probs[:, None])
    device, samples = log_probs.device, frames.shape[1]
    input_lengths, target_lengths = (
        torch.as_tensor(lengths, device=device).reshape(-1).long() for lengths in (input_lengths, target_lengths)
    )
    labels = _padded(targets.to(device).long(), target_lengths, samples, blank)
    scores = _forward_scores(frames, labels, input_lengths, blank)
    score = _score_of_ends(scores, target_lengths)
    impossible = score < IMPOSSIBLE / 2
    losses = torch.where(impossible, 0.0 if zero_infinity else math.inf, -score)
    reduction = _name_of(reduction)
    if reduction == "mean":
        losses = (losses / target_lengths.clamp(min=1).to(losses.dtype)).mean()
    elif reduction == "sum":
        losses = losses.sum()
    elif not batched:
        losses = losses.squeeze(0)
    return losses.to(log_probs.dtype)


def _padded(targets: Tensor, lengths: Tensor, samples: int, blank: int) -> Tensor:
    """Return labels (N, S) with blanks beyond each one's length."""
    longest = int(lengths.max()) if samples else 0
    places = torch.arange(longest, device=targets.device)
    there = places < lengths[:, None]
    if targets.ndim == 2:
        labels = targets[:, :longest]
    else:
        starts = lengths.cumsum(0) - lengths
        labels = torch.nn.functional.pad(targets, (0, 1))[(starts[:, None] + places).clamp(max=len(targets))]
    return torch.where(there, labels, blank)


def _forward_scores(frames: Tensor, labels: Tensor, input_lengths: Tensor, blank: int) -> Tensor:
    """Return the logarithms (N, 2 S + 1) of the forward variables at each sequence's last frame.

    State 2 s + 1 is label s, the others are the blanks around them.
    """
    samples, longest = labels.shape
    states = labels.new_full((samples, 2 * longest + 1), blank)
    states[:, 1::2] = labels
    may_skip = torch.zeros_like(states, dtype=torch.bool)
    may_skip[:, 3::2] = labels[:, 1:] != labels[:, :-1]
    frames = torch.where(frames == -math.inf, IMPOSSIBLE, frames)
    before = torch.full_like(states, IMPOSSIBLE, dtype=frames.dtype)
    before[:, 0] = 0.0  # without a frame there is one way to have no label
    begun = before.clone()
    begun[:, 1:2] = 0.0
    scores = before
    for time, frame in enumerate(frames):
        came_from = begun if time == 0 else torch.logsumexp(_ways(scores, may_skip), 0)
        moved = came_from + frame.gather(1, states)
        scores = torch.where((time < input_lengths)[:, None], moved, scores)
    return scores


def _ways(scores: Tensor, may_skip: Tensor) -> Tensor:
    """Return the scores (3, N, 2 S + 1) of the states that each state can be reached from."""
    one, two = (torch.nn.functional.pad(scores, (k, 0), value=IMPOSSIBLE)[:, : scores.shape[1]] for k in (1, 2))
    return torch.stack([scores, one, torch.where(may_skip, two, IMPOSSIBLE)])


def _score_of_ends(scores: Tensor, target_lengths: Tensor) -> Tensor:
    """Return the logarithm (N,) of the sum over the two states that a sequence may end in: its last label or blank."""
    last = 2 * target_lengths[:, None]
    labels = torch.where(last > 0, scores.gather(1, (last - 1).clamp(min=0)), IMPOSSIBLE)
    return torch.logsumexp(torch.cat([scores.gather(1, last), labels], 1), 1)


# Layers that normalize


def _normalized(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x - mean) / sqrt(variance + eps), mean and variance over some dimensions, which are kept."""
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    variance = centred.square().mean(dims, keepdim=True)
    return centred * (variance + eps).rsqrt(), mean, variance


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int]) -> Tensor:
    if weight is not None:
        x = x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001
) -> Tensor:
    """Return ``input`` with mean 0 and variance 1 over its last dimensions, times ``weight`` plus ``bias``."""
    shape = list(normalized_shape)
    normalized, _, _ = _normalized(_wide(input), list(range(-len(shape), 0)), eps)
    return _scaled(normalized, weight, bias, shape).to(input.dtype)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return (N, C, ...) normalized by the mean and variance of each channel over the batch, or by the running ones.

    In training the running ones are moved towards those of the batch, in place.
    """
    shape = [1, -1] + [1] * (input.ndim - 2)
    if training or running_mean is None or running_var is None:
        normalized, mean, variance = _normalized(_wide(input), [0, *range(2, input.ndim)], eps)
        _move(running_mean, running_var, mean, variance, input.numel() // input.shape[1], momentum)
    else:
        inverse = (_wide(running_var) + eps).rsqrt()
        normalized = (_wide(input) - running_mean.view(shape)) * inverse.view(shape)
    return _scaled(normalized, weight, bias, shape).to(input.dtype)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return (N, C, ...) normalized by the mean and variance of each sample's channels, or by the running ones.

    With ``use_input_stats`` the running ones are moved towards the mean over the samples, in place.
    """
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    dims = list(range(2, input.ndim))
    normalized, mean, variance = _normalized(_wide(input), dims, eps)
    count = math.prod(input.shape[2:])
    _move(running_mean, running_var, mean.mean(0, keepdim=True), variance.mean(0, keepdim=True), count, momentum)
    return _scaled(normalized, weight, bias, [1, -1] + [1] * len(dims)).to(input.dtype)


@torch.no_grad()
def _move(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    count: int,
    momentum: float,
) -> None:
    """Move running statistics towards those of a batch, whose variance is over ``count`` values."""
    unbiased = variance * (count / max(count - 1, 1))
    for running, found in ((running_mean, mean), (running_var, unbiased)):
        if running is not None:
            running.lerp_(found.detach().reshape(-1).to(running.dtype), momentum)


# Distances and margins


def cdist(x: Tensor, y: Tensor, p: float = 2.0) -> Tensor:
    """Return the distances (..., N, M) between the rows of x (..., N, d) and y (..., M, d); memory: N M d elements."""
    return _norm(x[..., :, None, :] - y[..., None, :, :], p)


def pdist(x: Tensor, p: float = 2.0) -> Tensor:
    """Return the distances (N (N - 1) / 2,) between the rows of x (N, d), those of the first row first."""
    rows, columns = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return _norm(x[rows] - x[columns], p)


def _norm(difference: Tensor, p: float) -> Tensor:
    """Return the p-norms over the last dimension; of zeros, all derivatives are zeros."""
    nothing = (difference == 0).all(-1)
    norms = torch.linalg.vector_norm(torch.where(nothing[..., None], 1.0, difference), ord=p, dim=-1)
    return torch.where(nothing, 0.0, norms)


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    reduction: str | int = "mean",
) -> Tensor:
    """Return the sum over classes i other than y of weight_y max(0, margin - x_y + x_i)^p / C."""
    scores, classes = input.reshape(-1, input.shape[-1]), target.reshape(-1, 1)
    excess = torch.relu(margin - scores.gather(1, classes) + scores) ** p
    if weight is not None:
        excess = excess * weight[classes]
    others = torch.ones_like(scores, dtype=torch.bool).scatter(1, classes, False)
    losses = torch.where(others, excess, 0.0).sum(1) / scores.shape[1]
    return _reduced(losses if input.ndim > 1 else losses.squeeze(0), reduction)


def multilabel_margin_loss(input: Tensor, target: Tensor, reduction: str | int = "mean") -> Tensor:
    """Return the sum over labels y and other classes i of max(0, 1 - x_y + x_i) / C; labels end at the first of -1."""
    scores, classes = input.reshape(-1, input.shape[-1]), target.reshape(-1, input.shape[-1])
    there = (classes < 0).cumsum(1) == 0
    chosen = torch.where(there, classes, 0)
    labels = torch.zeros_like(scores).scatter_add(1, chosen, there.to(scores.dtype)) > 0
    excess = torch.relu(1.0 - scores.gather(1, chosen)[:, :, None] + scores[:, None, :])
    counted = there[:, :, None] & ~labels[:, None, :]
    losses = torch.where(counted, excess, 0.0).sum((1, 2)) / scores.shape[1]
    return _reduced(losses if input.ndim > 1 else losses.squeeze(0), reduction)


def _reduced(losses: Tensor, reduction: str | int) -> Tensor:
    name = _name_of(reduction)
    if name == "none":
        return losses
    return losses.mean() if name == "mean" else losses.sum()


def _name_of(reduction: str | int) -> str:
    return ("none", "mean", "sum")[reduction] if isinstance(reduction, int) else reduction
