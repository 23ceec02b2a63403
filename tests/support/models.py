"""Small models of every kind that a user may bring, operations of their own among them, and data for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


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


class LowRank(nn.Module):
    """A frozen linear layer plus a trained product of two thin matrices, as LoRA adapters are."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.randn(outputs, rank) / rank**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class TiedAutoencoder(nn.Module):
    """One module called twice and one weight used both ways; its parameter has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 8)
        self.again = self.encoder
        self.bias = nn.Parameter(torch.randn(8))
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.again(self.encoder(x).tanh()).sigmoid()
        return self.classifier(functional.linear(hidden, self.encoder.weight.T, self.bias))


class KeptReference(nn.Module):
    """A model that reaches one of its parameters through a plain list, where nobody can put another tensor.

    ``later``: it does so only from the second batch on, which is smaller.
    """

    def __init__(self, later: bool = False) -> None:
        super().__init__()
        self.later = later
        self.first, self.last = nn.Linear(8, 10), nn.Linear(10, 3)
        self.weights = [self.last.weight]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.last.weight if self.later and len(x) > 3 else self.weights[0]
        return functional.linear(self.first(x).tanh(), weight, self.last.bias)


class Attention(nn.Module):
    """Causal attention, by PyTorch's function or in ordinary operations (``form="eager"``)."""

    def __init__(self, width: int, heads: int, shared_heads: int, form: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.shared_heads, self.form, self.dropout = heads, shared_heads, form, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * shared_heads * (width // heads))
        self.projection = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        n, t, d = hidden.shape
        query = self.query(hidden).view(n, t, self.heads, -1).transpose(1, 2)
        key, value = self.key_value(hidden).view(n, t, 2, self.shared_heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        if self.form == "sdpa":
            mixed = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, dropout_p=dropout, enable_gqa=self.shared_heads != self.heads
            )
        else:
            key, value = (part.repeat_interleave(self.heads // self.shared_heads, 1) for part in (key, value))
            scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
            scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -torch.inf)
            mixed = functional.dropout(scores.softmax(-1), dropout) @ value
        return self.projection(mixed.transpose(1, 2).reshape(n, t, d))


class SwiGLU(nn.Module):
    """The gated feed-forward layer of Llama; ``plain`` writes silu in ordinary operations."""

    def __init__(self, width: int, inner: int, plain: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return self.down((gate * gate.sigmoid() if self.plain else functional.silu(gate)) * self.up(x))


class Block(nn.Module):
    """A language model of one layer with the parts given."""

    def __init__(self, norm: Callable[[int], nn.Module], attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.norms = nn.ModuleList([norm(8), norm(8)])
        self.attention, self.feed_forward = attention, feed_forward

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        hidden = hidden + self.attention(self.norms[0](hidden))
        return self.head(hidden + self.feed_forward(self.norms[1](hidden)))


class Recurrent(nn.Module):
    """A recurrent layer and a classifier of its last state; ``lengths`` packs sequences of unequal length."""

    def __init__(self, layer: nn.RNNBase, packed: bool = False) -> None:
        super().__init__()
        self.layer, self.packed = layer, packed
        self.classifier = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            lengths = 1 + torch.arange(len(x)) % x.shape[1]
            x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            output, _ = nn.utils.rnn.pad_packed_sequence(self.layer(x)[0], batch_first=True)
            return self.classifier(output.sum(1))
        return self.classifier(self.layer(x)[0][:, -1])


class Branching(nn.Module):
    """Python branches and loops that look at the values of tensors: ``which`` of them."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 10), nn.Linear(10, 10), nn.Linear(10, 3)
        self.which = which

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.which == "branch":
            hidden = hidden.tanh() if hidden.mean() > 0 else functional.softplus(hidden)
            scale = 1 + abs(round(x[0, 0].item()))
            hidden = self.middle(hidden) / scale if bool((x.sum() > 0).any()) else self.middle(hidden).sigmoid()
        elif self.which == "loop":
            while hidden.square().mean() > 0.05:
                hidden = 0.6 * hidden + 0.1 * self.middle(hidden).tanh()
        else:  # each row goes to the part that its sign selects, so shapes depend on values
            positive = hidden.sum(1) > 0
            rows = torch.cat([self.middle(hidden[positive]).tanh(), hidden[~positive].sin()])
            order = torch.cat([positive.nonzero()[:, 0], (~positive).nonzero()[:, 0]])
            hidden = rows[order.argsort()]
        return self.last(hidden)


class Experts(nn.Module):
    """Each sample goes to the expert of its largest gate, so that batches use different parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(1).max(1)
        output = x.new_zeros(len(x), 3)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                output = output.index_add(0, rows, weights[rows, None] * expert(x[rows]))
        return output


class Checkpointed(nn.Module):
    """A network whose inner part is computed again in the backward pass."""

    def __init__(self, inner: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False))


class ScaledByBuffer(nn.Module):
    """A network scaled by a buffer that each forward pass writes, here and not inside the checkpoint that reads it."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 10), nn.Linear(10, 3)
        self.register_buffer("scale", torch.ones(()))
        self.checkpointed = checkpointed

    def hidden(self, x: Tensor) -> Tensor:
        return (self.first(x) * self.scale).tanh()

    def forward(self, x: Tensor) -> Tensor:
        self.scale.copy_(x.detach().norm() / 4)
        if self.checkpointed:
            return self.last(torch.utils.checkpoint.checkpoint(self.hidden, x, use_reentrant=False))
        return self.last(self.hidden(x))


class Labelled(nn.Module):
    """A network that returns the ModelOutput of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 3))

    def forward(self, x: Tensor) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        return SequenceClassifierOutput(logits=self.body(x), hidden_states=(x,))


class Cube(torch.autograd.Function):
    """x^3 with a second derivative, in the form of old code: no jvp, no rule for vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x * x * gradient


class OnceCube(Cube):
    """x^3 without a second derivative."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x * x * gradient


class GraphlessCube(Cube):
    """x^3 whose backward pass leaves PyTorch, so that it leaves no graph: its derivative by the gradient is lost."""

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.detach().numpy() ** 2 * gradient.detach().numpy())


class OnContext(torch.autograd.Function):
    """x^2 that keeps 2 x as an attribute, where the second derivative does not see it."""

    @staticmethod
    def forward(ctx, x):
        ctx.double = 2 * x
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        return ctx.double * gradient


class NestedCube(Cube):
    """x^3 whose derivative is a function of the same kind."""

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * SquareTimes.apply(x, gradient)


class SquareTimes(torch.autograd.Function):
    """x^2 y, the derivative of NestedCube."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * x * y

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        return 2 * x * y * gradient, x * x * gradient


class SplitCube(torch.autograd.Function):
    """x^3 in the form torch.func wants, without a jvp and without a rule for vmap."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x * x * gradient


class OnceSplitCube(SplitCube):
    """x^3 in the form torch.func wants, without a second derivative."""

    generate_vmap_rule = True

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x * x * gradient


class VmapCube(SplitCube):
    """x^3 with a rule for vmap and without a jvp."""

    generate_vmap_rule = True


class JvpCube(SplitCube):
    """x^3 with a jvp and without a rule for vmap."""

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 3 * x * x * tangent


class JvpVmapCube(JvpCube):
    """x^3 with a jvp and a rule for vmap."""

    generate_vmap_rule = True


class Applied(nn.Module):
    """A network with a function of one's own as its activation; ``later``: only for the second batch, the smaller."""

    def __init__(self, function: type[torch.autograd.Function], later: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 10), nn.Linear(10, 3)
        self.function, self.later = function, later

    def forward(self, x: Tensor) -> Tensor:
        function = JvpVmapCube if self.later and len(x) > 3 else self.function
        return self.last(function.apply(self.first(x)))


class Fourier(nn.Module):
    """A filter in the frequency domain, and a linear system solved."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.matrix = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(8, 8) / 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        filtered = torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=8).tanh()
        system = self.matrix @ self.matrix.T + torch.eye(8, dtype=x.dtype)
        return self.last(torch.linalg.solve(system, filtered.T).T)


class MixedPrecision(nn.Module):
    """A float32 layer between bfloat16 layers; as float64 model it computes in float64 throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 12).bfloat16(), nn.Linear(12, 12), nn.Linear(12, 3).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.middle, self.last):
            x = layer(x.to(layer.weight.dtype))
            x = x if layer is self.last else x.tanh()
        return x.to(self.middle.weight.dtype)


class Autocast(nn.Module):
    """A float32 network that multiplies in bfloat16; as float64 model it computes in float64 throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.body(x.to(self.body[0].weight.dtype))
        return logits.to(self.body[0].weight.dtype)


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


def sequences(*sizes: int) -> list[Any]:
    """Return one batch of sequences of 3 vectors of each size."""
    return [(torch.randn(size, 3, 5, dtype=torch.float64), torch.randint(3, (size,))) for size in sizes]


def bags(*sizes: int) -> list[Any]:
    """Return one batch of token ids with a class of each size."""
    return [(ids, ids[:, 0] % 3) for (ids,) in tokens(40, *sizes)]


def labelled_tokens(high: int, *sizes: int) -> list[Any]:
    """Return mappings of token ids and labels, of which some, and all of the last batch, do not count (-100)."""
    batches = [{"input_ids": ids, "labels": ids.clone()} for (ids,) in tokens(high, *sizes)]
    for batch in batches:
        batch["labels"][:, :2] = -100
        batch["labels"][0, -1] = -100
    batches[-1]["labels"][:] = -100
    return batches


def rounded(batches: list[Any]) -> list[Any]:
    """Return classification batches whose inputs bfloat16 holds exactly."""
    return [(x.bfloat16().double(), y) for x, y in batches]


def gpt2() -> nn.Module:
    """Return a GPT-2 of one layer, with its tied embeddings."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    """Return a Llama of one layer: rotary positions, grouped-query attention, RMSNorm and SwiGLU."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    """Return a BERT classifier of one layer, with dropout everywhere.

    The weights are larger than usual, so that every layer curves the loss, as are those of Llama here.
    """
    import transformers

    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=6,
        max_position_embeddings=8,
        type_vocab_size=1,
        num_labels=3,
        initializer_range=0.3,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.2,
    )
    return transformers.BertForSequenceClassification(config)


def dropout_mlp() -> nn.Module:
    """Return a network with dropout."""
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Dropout(0.4), nn.Linear(32, 3)).double()
