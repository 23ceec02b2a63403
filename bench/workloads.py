"""The models that the benches analyse, with their data: seeded weights, one batch."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

import hesd_fast as hesd
from hesd_fast.operators.base import OperatorBase

sys.path.append(str(Path(__file__).parent.parent / "examples"))

from fashion_mnist import DEBIAN_FOLDER, FILES, LeNet5
from fashion_mnist import load as load_fashion_mnist

SIZES = {"mlp": 669_706, "lenet": 61_706, "resnet20": 272_474, "gpt-s": 3_438_080}
"""Number of parameters of each workload."""


class Diagonal(OperatorBase):
    """A diagonal matrix: Lanczos without a model. Each eigenvector sits on one coordinate."""

    def __init__(self, diagonal: Tensor) -> None:
        super().__init__(len(diagonal), diagonal.dtype, diagonal.device)
        self.diagonal = diagonal

    def _multiply(self, panel: Tensor, out: Tensor) -> None:
        torch.mul(panel, self.diagonal, out=out)


@dataclass(frozen=True)
class Workload:
    """A model in eval mode, one batch of inputs and targets, and the mean loss over its terms."""

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    data: str

    @staticmethod
    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of the model's outputs over all targets."""
        return cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy over all targets."""
        return self.criterion(model(inputs), targets)

    def in_double(self) -> Workload:
        """Return a copy in float64."""
        inputs = self.inputs.double() if self.inputs.is_floating_point() else self.inputs
        return Workload(self.name, copy.deepcopy(self.model).double(), inputs, self.targets, self.data)

    def problem(self) -> hesd.Problem:
        """Return the workload as a problem."""

        def loss(model: Any, batch: Any) -> tuple[Tensor, int]:
            inputs, targets = batch
            return self.loss(model, inputs, targets) * targets.numel(), targets.numel()

        return hesd.Problem(self.model, loss, [(self.inputs, self.targets)])


def build(name: str, samples: int | None = None, tiny: bool = False) -> Workload:
    """Return a workload by name; if asked with fewer samples than its own number, or a tiny model of its kind."""
    maker, default = WORKLOADS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        workload = maker(default if samples is None else samples, tiny)
    workload.model.eval()
    return workload


def mlp(samples: int, tiny: bool = False) -> Workload:
    """784-512-512-10 with ReLU on Fashion-MNIST."""
    width = 16 if tiny else 512
    layers = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return Workload("mlp", nn.Sequential(nn.Flatten(), *layers), *_fashion_mnist(samples))


def lenet(samples: int, tiny: bool = False) -> Workload:  # noqa: ARG001
    """LeNet-5 on Fashion-MNIST, tiny as it is."""
    return Workload("lenet", LeNet5(), *_fashion_mnist(samples))


def resnet20(samples: int, tiny: bool = False) -> Workload:
    """ResNet-20 for 3 x 32 x 32 images, with projections where the shape changes; tiny with 6 layers."""
    side = 8 if tiny else 32
    images, labels = torch.randn(samples, 3, side, side), torch.randint(10, (samples,))
    return Workload("resnet20", ResNet20(1, 2) if tiny else ResNet20(), images, labels, "random images")


def gpt_s(samples: int, tiny: bool = False) -> Workload:
    """A decoder of 4 layers, width 256, 4 heads, on sequences of 64 tokens."""
    decoder = Decoder(1, 32, 2, 16, 64) if tiny else Decoder()
    length, words = len(decoder.positions.weight), len(decoder.words.weight)
    tokens = torch.randint(words, (samples, length + 1))
    return Workload("gpt-s", decoder, tokens[:, :-1], tokens[:, 1:], "random tokens")


WORKLOADS: dict[str, tuple[Callable[[int, bool], Workload], int]] = {
    "mlp": (mlp, 256),
    "lenet": (lenet, 512),
    "resnet20": (resnet20, 64),
    "gpt-s": (gpt_s, 8),
}


def _fashion_mnist(samples: int) -> tuple[Tensor, Tensor, str]:
    if all((DEBIAN_FOLDER / name).is_file() for name in FILES["train"]):
        images, labels = load_fashion_mnist(DEBIAN_FOLDER, "train")
        return images[:samples], labels[:samples], "Fashion-MNIST"
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(samples, 1, 28, 28, generator=generator)
    return images, torch.randint(10, (samples,), generator=generator), "random images"


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm, and a 1 x 1 projection beside them where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after))
        self.second = nn.Sequential(nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after))
        self.beside: nn.Module = nn.Identity()
        if before != after:
            self.beside = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.second(relu(self.first(x))) + self.beside(x))


class ResNet20(nn.Module):
    """He et al., Deep Residual Learning for Image Recognition, section 4.2, n = 3 blocks of each of 3 widths."""

    def __init__(self, blocks: int = 3, widths: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        shapes = [(16, 16, 1), (16, 32, 2), (32, 64, 2)][:widths]
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(before if first else after, after, stride if first else 1)
                for before, after, stride in shapes
                for first in [True] + [False] * (blocks - 1)
            )
        )
        self.head = nn.Linear(shapes[-1][1], 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


class DecoderLayer(nn.Module):
    """Causal self-attention and a feed-forward net, layer norm before each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        # Written out: PyTorch's fused attention on the CPU has no second derivative.
        scores = query @ key.transpose(-1, -2) / (width // self.heads) ** 0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        attended = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed(self.norm2(x))


class Decoder(nn.Module):
    """A small GPT with learned positions and an output layer of its own."""

    def __init__(self, layers: int = 4, width: int = 256, heads: int = 4, length: int = 64, words: int = 512) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(DecoderLayer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.layers(x)))
