"""Train LeNet-5 on Fashion-MNIST and analyse its Hessian on training and on test images.

    apt-get install dataset-fashion-mnist
    python examples/fashion_mnist.py

prints the reports and the assessment, and writes reports and pictures into the folder given by --out.
"""

from __future__ import annotations

import argparse
import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hesd_fast as hesd

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


class LeNet5(nn.Module):
    """LeNet-5 with padding 2 in its first layer, for 28 x 28 images: 61,706 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.Tanh(),
            nn.AvgPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, 10) of images (N, 1, 28, 28)."""
        return self.classifier(self.features(images))


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes."""
    with gzip.open(path, "rb") as file:
        _, kind, dimensions = struct.unpack(">HBB", file.read(4))
        if kind != 8:
            raise ValueError(f"{path} holds elements of IDX type {kind}; wanted 8, unsigned bytes")
        shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
        return np.frombuffer(file.read(), dtype=np.uint8).reshape(shape)


def load(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return standardized images (N, 1, 28, 28) and labels (N,)."""
    paths = [folder / name for name in FILES[split]]
    for path in paths:
        if not path.is_file():
            sys.exit(
                f"Fashion-MNIST is not in {folder}: there is no {path.name}. On Debian or Ubuntu run "
                "'apt-get install dataset-fashion-mnist', or name its folder with --data."
            )
    images, labels = (read_idx(path) for path in paths)
    pixels = torch.from_numpy(images.copy()).float().unsqueeze(1) / 255.0
    return (pixels - 0.2860) / 0.3530, torch.from_numpy(labels.copy()).long()


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Train with momentum and a learning rate that falls as a cosine."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            loss = cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        scheduler.step()
        print(f"epoch {epoch + 1}/{epochs}: training loss {total / len(images):.4f}", flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images classified rightly."""
    right = sum(
        (model(x).argmax(1) == y).sum().item() for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    )
    return right / len(labels)


def main(argv: list[str] | None = None) -> None:
    """Train, analyse, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of the four gzipped IDX files")
    parser.add_argument("--out", type=Path, default=Path("fashion-mnist"), help="folder for reports and pictures")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--training-images", type=int, default=60_000, help="images to train on")
    parser.add_argument("--images", type=int, default=1000, help="images of each split to analyse")
    parser.add_argument("--block-size", type=int, default=4, help="probes")
    parser.add_argument("--max-steps", type=int, default=60, help="block Lanczos steps")
    arguments = parser.parse_args(argv)

    splits = {split: load(arguments.data, split) for split in FILES}
    torch.manual_seed(0)
    model = LeNet5()
    train(model, *(tensor[: arguments.training_images] for tensor in splits["train"]), arguments.epochs)
    print(", ".join(f"{split} accuracy {accuracy(model, *splits[split]):.1%}" for split in splits))

    arguments.out.mkdir(parents=True, exist_ok=True)
    reports = {}
    for split, (images, labels) in splits.items():
        batches = list(zip(images[: arguments.images].split(500), labels[: arguments.images].split(500), strict=True))
        reports[split] = hesd.analyze(
            model,
            hesd.losses.supervised(nn.CrossEntropyLoss()),
            batches,
            block_size=arguments.block_size,
            max_steps=arguments.max_steps,
        )
        print(f"\n{split}: {reports[split]}")
        reports[split].save(arguments.out / f"{split}.hesd.json")
        reports[split].plot(arguments.out / f"{split}.png")
    print(f"\n{hesd.compare(reports)}")
    hesd.plot_densities(reports, arguments.out / "fashion_mnist.png")
    print(f"\nwrote reports and pictures into {arguments.out}")


if __name__ == "__main__":
    main()
