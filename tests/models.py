"""Small float64 problems of every kind a user may bring, each with its total loss written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hesd_fast import losses


@dataclass(frozen=True)
class Case:
    """A model, a loss and data; ``total`` is the same loss over all data, written without the library."""

    name: str
    build: Callable[[], tuple[nn.Module, Any, list[Any]]]
    total: Callable[[nn.Module, list[Any]], Tensor]
    mode: str = "eval"

    def __str__(self) -> str:
        return self.name


class SmallTransformer(nn.Module):
    """One attention block whose output weights are the embedding's."""

    def __init__(self, vocabulary: int = 13, width: int = 12, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.attention = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        n, t, d = hidden.shape
        query, key, value = self.attention(self.norm(hidden)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.head(hidden + self.projection(mixed.transpose(1, 2).reshape(n, t, d)))


class Convolutional(nn.Module):
    """Convolution, batch norm and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Softplus(), nn.Flatten())
        self.classifier = nn.Linear(6 * 36, 3)
        self.features[1].running_mean.uniform_(-0.1, 0.1)
        self.features[1].running_var.uniform_(0.5, 1.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


class Wrapped(nn.Module):
    """A network with its output in another form, and parameters that are unused or enter linearly."""

    def __init__(self, output: str = "tensor") -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 3))
        self.unused = nn.Parameter(torch.randn(5))
        self.linear = nn.Parameter(torch.randn(7))
        self.output = output

    def forward(self, x: Tensor) -> Any:
        logits = self.body(x)
        return {"tensor": logits, "tuple": (logits, x), "dict": {"logits": logits, "hidden": x}}[self.output]


class Padded(nn.Module):
    """A bag of embeddings in which index 0 is padding."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 12, padding_idx=0, sparse=sparse)
        self.classifier = nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.classifier(self.embedding(ids).tanh().sum(1))


def mlp(activation: type[nn.Module]) -> nn.Module:
    """Return a network of 1,000 parameters."""
    return nn.Sequential(nn.Linear(8, 32), activation(), nn.Linear(32, 20), activation(), nn.Linear(20, 3))


def vectors(*sizes: int) -> list[Any]:
    """Return one classification batch of each size."""
    return [(torch.randn(size, 8, dtype=torch.float64), torch.randint(3, (size,))) for size in sizes]


def images(*sizes: int) -> list[Any]:
    """Return one batch of images of each size."""
    return [(torch.randn(size, 1, 8, 8, dtype=torch.float64), torch.randint(3, (size,))) for size in sizes]


def tokens(high: int, *sizes: int) -> list[Any]:
    """Return one batch of token ids of each size, as 1-tuples."""
    return [(torch.randint(high, (size, 6)),) for size in sizes]


def gpt2() -> nn.Module:
    """Return a GPT-2 of one layer, with its tied embeddings."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def linear_term(model: nn.Module, batch: Any) -> Tensor:
    """Return cross-entropy plus a term in which one parameter is linear."""
    return functional.cross_entropy(model(batch[0]), batch[1]) + model.linear.sum()


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


def _frozen() -> nn.Module:
    model = mlp(nn.Tanh)
    model[0].requires_grad_(False)
    return model


def _case(
    name: str, model: Callable[[], nn.Module], loss: Any, data: Callable[[], list[Any]], total: Any, **kw
) -> Case:
    def build() -> tuple[nn.Module, Any, list[Any]]:
        torch.manual_seed(1)
        return model().double(), loss, data()

    return Case(name, build, total, **kw)


_CROSS_ENTROPY = losses.supervised(nn.CrossEntropyLoss())

CASES = [
    _case("mlp-tanh", lambda: mlp(nn.Tanh), _CROSS_ENTROPY, lambda: vectors(8, 2), classification),
    _case("mlp-gelu", lambda: mlp(nn.GELU), _CROSS_ENTROPY, lambda: vectors(8, 2), classification),
    _case("mlp-relu", lambda: mlp(nn.ReLU), _CROSS_ENTROPY, lambda: vectors(8, 2), classification),
    _case("frozen", _frozen, _CROSS_ENTROPY, lambda: vectors(8, 2), classification),
    _case("cnn-eval", Convolutional, _CROSS_ENTROPY, lambda: images(6, 3), classification),
    _case("cnn-train", Convolutional, _CROSS_ENTROPY, lambda: images(6, 3), per_batch, mode="train"),
    _case("unused", Wrapped, _CROSS_ENTROPY, lambda: vectors(5, 3), classification),
    _case("linear", Wrapped, linear_term, lambda: vectors(5, 3), lambda m, b: classification(m, b) + m.linear.sum()),
    _case("tuple-output", lambda: Wrapped("tuple"), _CROSS_ENTROPY, lambda: vectors(5, 3), classification),
    _case("dict-output", lambda: Wrapped("dict"), _CROSS_ENTROPY, lambda: vectors(5, 3), classification),
    _case("transformer", SmallTransformer, losses.causal_lm(), lambda: tokens(13, 3, 1), next_token),
    _case("gpt2", gpt2, losses.causal_lm(), lambda: tokens(13, 2, 1), next_token),
    _case(
        "padding", Padded, _CROSS_ENTROPY, lambda: [(ids, ids[:, 0] % 3) for (ids,) in tokens(40, 4, 2)], classification
    ),
    _case(
        "sparse-gradient",
        lambda: Padded(sparse=True),
        _CROSS_ENTROPY,
        lambda: [(ids, ids[:, 0] % 3) for (ids,) in tokens(40, 4, 2)],
        without_sparse_gradients,
    ),
]


def dropout_mlp() -> nn.Module:
    """Return a network with dropout."""
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Dropout(0.4), nn.Linear(32, 3)).double()
