"""Small float64 problems of every kind that a user may bring, each with its total loss written out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from models import (
    Applied,
    Attention,
    Autocast,
    Block,
    Branching,
    Checkpointed,
    Convolutional,
    Cube,
    Experts,
    Fourier,
    JvpCube,
    JvpVmapCube,
    KeptReference,
    Labelled,
    LowRank,
    MixedPrecision,
    NestedCube,
    OnceCube,
    OnceSplitCube,
    Padded,
    Recurrent,
    ScaledByBuffer,
    SmallTransformer,
    SplitCube,
    SwiGLU,
    TiedAutoencoder,
    VmapCube,
    Wrapped,
    bags,
    bert,
    dropout_mlp,
    gpt2,
    images,
    labelled_tokens,
    llama,
    mlp,
    rounded,
    sequences,
    tokens,
    vectors,
)
from torch import Tensor, nn
from torch.nn import functional
from totals import (
    batch_classification,
    batch_next_token,
    by_inner_parts,
    by_layers,
    cells_by_hand,
    classification,
    in_eager_attention,
    next_labelled_token,
    next_token,
    per_batch,
    scaled_by_hand,
    seeded,
    slopes,
    slopes_by_hand,
    without_sparse_gradients,
)

from hesd_fast import losses

ROUNDING = 64 * torch.finfo(torch.float64).eps
"""A product is a sum over the terms of backpropagation, each rounded: 64 epsilon of its norm."""

CROSS_ENTROPY = losses.supervised(nn.CrossEntropyLoss())


@dataclass(frozen=True)
class Case:
    """A model, a loss and data; ``total`` is the same loss over all data, written without the library.

    ``tolerance`` is how far a product may be from that of the dense Hessian, as a share of its norm.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Any, list[Any]]]
    total: Callable[[nn.Module, list[Any]], Tensor]
    mode: str = "eval"
    tolerance: float = ROUNDING

    def __str__(self) -> str:
        return self.name


def linear_term(model: nn.Module, batch: Any) -> Tensor:
    """Return cross-entropy plus a term in which one parameter is linear."""
    return functional.cross_entropy(model(batch[0]), batch[1]) + model.linear.sum()


def _frozen() -> nn.Module:
    model = mlp(nn.Tanh)
    model[0].requires_grad_(False)
    return model


def _case(
    name: str,
    model: Callable[[], nn.Module],
    loss: Any,
    data: Callable[[], list[Any]],
    total: Any,
    double: bool = True,
    **kw: Any,
) -> Case:
    def build() -> tuple[nn.Module, Any, list[Any]]:
        torch.manual_seed(1)
        made = model()
        return made.double() if double else made, loss, data()

    return Case(name, build, total, **kw)


def _classifier(name: str, model: Callable[[], nn.Module], total: Any = classification, **kw: Any) -> Case:
    return _case(name, model, CROSS_ENTROPY, lambda: vectors(5, 3), total, **kw)


def _two_layers(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 10), activation, nn.Linear(5 if isinstance(activation, nn.GLU) else 10, 3))


def _depthwise() -> nn.Module:
    """Return convolutions of every grouping, with group norm and pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Tanh(),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.GroupNorm(2, 8),
        nn.Conv2d(8, 4, 1, groups=2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def _strided() -> nn.Module:
    """Return strided, dilated and transposed convolutions, with instance norm and maximum pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.GELU(),
        nn.ConvTranspose2d(4, 2, 3, groups=2),
        nn.InstanceNorm2d(2, affine=True),
        nn.Conv2d(2, 3, 2, dilation=2),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


def _attention_block(heads: int, shared_heads: int, form: str, dropout: float = 0.0) -> nn.Module:
    return Block(nn.LayerNorm, Attention(8, heads, shared_heads, form, dropout), nn.Sequential(nn.Linear(8, 8)))


def _encoder_layer() -> nn.Module:
    """Return PyTorch's own transformer layer, which has a fast path in eval mode."""
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.2, activation="gelu", batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Linear(4, 8), layer, nn.Flatten(), nn.Linear(16, 3))


def _spectral_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 10)), nn.Tanh(), nn.Linear(10, 3))


def _half_frozen_norm() -> nn.Module:
    model = Convolutional()
    model.features[0].requires_grad_(False)
    return model


_ACTIVATIONS = [
    nn.SiLU(),
    nn.Mish(),
    nn.ELU(),
    nn.SELU(),
    nn.CELU(),
    nn.Softplus(),
    nn.LogSigmoid(),
    nn.Hardswish(),
    nn.LeakyReLU(),
    nn.PReLU(),
    nn.Softmax(1),
    nn.GELU("tanh"),
    nn.GLU(),
]

CASES = [
    _case("mlp-tanh", lambda: mlp(nn.Tanh), CROSS_ENTROPY, lambda: vectors(8, 2), classification),
    _case("mlp-gelu", lambda: mlp(nn.GELU), CROSS_ENTROPY, lambda: vectors(8, 2), classification),
    _case("mlp-relu", lambda: mlp(nn.ReLU), CROSS_ENTROPY, lambda: vectors(8, 2), classification),
    _case("frozen", _frozen, CROSS_ENTROPY, lambda: vectors(8, 2), classification),
    _case("cnn-eval", Convolutional, CROSS_ENTROPY, lambda: images(6, 3), classification),
    _case("cnn-train", Convolutional, CROSS_ENTROPY, lambda: images(6, 3), per_batch, mode="train"),
    _case("unused", Wrapped, CROSS_ENTROPY, lambda: vectors(5, 3), classification),
    _case("linear", Wrapped, linear_term, lambda: vectors(5, 3), lambda m, b: classification(m, b) + m.linear.sum()),
    _case("tuple-output", lambda: Wrapped("tuple"), CROSS_ENTROPY, lambda: vectors(5, 3), classification),
    _case("dict-output", lambda: Wrapped("dict"), CROSS_ENTROPY, lambda: vectors(5, 3), classification),
    _case("transformer", SmallTransformer, losses.causal_lm(), lambda: tokens(13, 3, 1), next_token),
    _case("gpt2", gpt2, losses.causal_lm(), lambda: tokens(13, 2, 1), next_token),
    _case("padding", Padded, CROSS_ENTROPY, lambda: bags(4, 2), classification),
    _case("sparse-gradient", lambda: Padded(sparse=True), CROSS_ENTROPY, lambda: bags(4, 2), without_sparse_gradients),
    _classifier("adapters", lambda: nn.Sequential(LowRank(8, 24), nn.Tanh(), LowRank(24, 3))),
    _classifier("tied-autoencoder", TiedAutoencoder),
    _classifier("kept-reference", KeptReference, by_layers),
    _classifier("kept-reference-later", lambda: KeptReference(later=True), by_layers),
    _classifier("spectral-norm", _spectral_norm),
    _classifier("dropout-train", dropout_mlp, seeded(batch_classification), mode="train"),
    _case("frozen-cnn-train", _half_frozen_norm, CROSS_ENTROPY, lambda: images(5, 2), per_batch, mode="train"),
    _case("depthwise", _depthwise, CROSS_ENTROPY, lambda: images(4, 2), classification),
    _case("strided", _strided, CROSS_ENTROPY, lambda: images(4, 2), classification),
    *(
        _case(
            f"attention-{form}-{name}",
            lambda form=form, shared_heads=shared_heads: _attention_block(4, shared_heads, form),
            losses.causal_lm(),
            lambda: tokens(9, 2, 1),
            in_eager_attention(next_token),
        )
        for form in ("sdpa", "eager")
        for name, shared_heads in (("full", 4), ("grouped", 2))
    ),
    _case(
        "attention-dropout-train",
        lambda: _attention_block(2, 2, "sdpa", 0.3),
        losses.causal_lm(),
        lambda: tokens(9, 2, 1),
        seeded(batch_next_token),
        mode="train",
    ),
    _classifier("encoder-layer", _encoder_layer),
    _classifier("encoder-layer-train", _encoder_layer, seeded(batch_classification), mode="train"),
    *(
        _case(
            f"swiglu{end}",
            lambda plain=plain: Block(nn.RMSNorm, Attention(8, 2, 1, "sdpa"), SwiGLU(8, 12, plain)),
            losses.causal_lm(),
            lambda: tokens(9, 2, 1),
            in_eager_attention(next_token),
        )
        for end, plain in (("", False), ("-plain", True))
    ),
    *(
        _case(name, lambda layer=layer, kw=kw: Recurrent(layer(), **kw), CROSS_ENTROPY, data, cells_by_hand)
        for name, layer, kw, data in (
            ("rnn", lambda: nn.RNN(5, 6, batch_first=True), {}, lambda: sequences(3, 2)),
            ("gru", lambda: nn.GRU(5, 4, batch_first=True), {}, lambda: sequences(3, 2)),
            ("lstm", lambda: nn.LSTM(5, 4, batch_first=True), {}, lambda: sequences(3, 2)),
            (
                "lstm-bidirectional",
                lambda: nn.LSTM(5, 2, 2, batch_first=True, bidirectional=True),
                {},
                lambda: sequences(3, 2),
            ),
            ("lstm-packed", lambda: nn.LSTM(5, 4, batch_first=True), {"packed": True}, lambda: sequences(3, 4)),
        )
    ),
    *(
        _classifier(which, lambda which=which: Branching(which), seeded(batch_classification))
        for which in ("branch", "loop", "masked-rows")
    ),
    _classifier("experts", Experts),
    _classifier(
        "checkpoint",
        lambda: Checkpointed(nn.Sequential(nn.Linear(8, 10), nn.Tanh()), nn.Linear(10, 3)),
        by_inner_parts,
    ),
    _classifier(
        "checkpoint-dropout-train",
        lambda: Checkpointed(nn.Sequential(nn.Linear(8, 10), nn.Dropout(0.4), nn.Tanh()), nn.Linear(10, 3)),
        seeded(lambda model, batch: batch_classification(nn.Sequential(model.inner, model.last), batch)),
        mode="train",
    ),
    _classifier(
        "checkpoint-norm-train",
        lambda: Checkpointed(nn.Sequential(nn.Linear(8, 10), nn.BatchNorm1d(10), nn.Tanh()), nn.Linear(10, 3)),
        by_inner_parts,
        mode="train",
    ),
    _classifier("buffer", lambda: ScaledByBuffer(False), scaled_by_hand),
    _classifier("checkpoint-buffer", lambda: ScaledByBuffer(True), scaled_by_hand),
    _classifier("in-place", lambda: _two_layers(nn.LeakyReLU(inplace=True))),
    _classifier("fourier", Fourier),
    _case("slopes", lambda: _two_layers(nn.Tanh()), slopes, lambda: vectors(5, 3), slopes_by_hand),
    _classifier("model-output", Labelled, seeded(batch_classification)),
    _case(
        "bert-train",
        bert,
        CROSS_ENTROPY,
        lambda: bags(3, 2),
        seeded(batch_classification),
        mode="train",
    ),
    *(
        _classifier(
            f"function-{name}",
            lambda function=function, later=later: Applied(function, later),
            lambda model, batches: by_layers(model, batches, lambda hidden: hidden**3),
        )
        for name, function, later in (
            ("old", Cube, False),
            ("nested", NestedCube, False),
            ("split", SplitCube, False),
            ("vmap", VmapCube, False),
            ("jvp", JvpCube, False),
            ("jvp-vmap", JvpVmapCube, False),
            ("split-later", SplitCube, True),
        )
    ),
    *(
        _classifier(
            f"activation-{type(activation).__name__.lower()}",
            lambda activation=activation: _two_layers(copy.deepcopy(activation)),
        )
        for activation in _ACTIVATIONS
    ),
]

# Batches that are mappings.
LABELLED = [
    _case(
        "llama",
        llama,
        losses.causal_lm(),
        lambda: labelled_tokens(11, 2, 2, 1),
        next_labelled_token,
        # transformers takes norms and rotary positions in float32, whatever the model's precision.
        tolerance=64 * torch.finfo(torch.float32).eps,
    )
]

# Products are as good as bfloat16, whose roundings pass through some ten operations.
LOW_PRECISION = [
    _case(
        name,
        model,
        CROSS_ENTROPY,
        lambda: rounded(vectors(5, 3)),
        classification,
        double=False,
        tolerance=16 * torch.finfo(torch.bfloat16).eps,
    )
    for name, model in (("mixed-precision", MixedPrecision), ("autocast", Autocast))
]

# Nothing to compare with: no strategy may give a product.
WITHOUT_SECOND_DERIVATIVE = [
    _classifier("once-differentiable", lambda: Applied(OnceCube)),
    _classifier("once-differentiable-split", lambda: Applied(OnceSplitCube)),
    _classifier("once-differentiable-later", lambda: Applied(OnceCube, later=True)),
]

CATALOGUE = [*CASES, *LABELLED, *LOW_PRECISION, *WITHOUT_SECOND_DERIVATIVE]
