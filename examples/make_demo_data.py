"""Make the data of ``hesd demo``: scikit-learn's handwritten digits and a small network trained on them.

    pip install scikit-learn
    python examples/make_demo_data.py

writes hesd_fast/cli/demo_digits.npz. The seeds are fixed; another PyTorch build may train to slightly other weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import hesd_fast
from hesd_fast.cli.demo_problem import ARCHIVE, demo_network, scale_pixels

TRAINING_IMAGES = 1000
EPOCHS = 60


def main() -> None:
    """Train the network and write the archive."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    images, labels = digits.images[order].astype(np.uint8), digits.target[order].astype(np.uint8)
    inputs, targets = scale_pixels(images), torch.from_numpy(labels).long()
    torch.manual_seed(0)
    model = demo_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAINING_IMAGES).split(50):
            optimizer.zero_grad()
            cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        right = (model(inputs).argmax(1) == targets).double()
    train, test = right[:TRAINING_IMAGES].mean(), right[TRAINING_IMAGES:].mean()
    print(
        f"accuracy {train:.1%} on {TRAINING_IMAGES} training images, "
        f"{test:.1%} on {len(labels) - TRAINING_IMAGES} others"
    )
    path = Path(hesd_fast.__file__).parent / ARCHIVE
    np.savez_compressed(
        path,
        train_images=images[:TRAINING_IMAGES],
        train_labels=labels[:TRAINING_IMAGES],
        test_images=images[TRAINING_IMAGES:],
        test_labels=labels[TRAINING_IMAGES:],
        **{name: tensor.numpy() for name, tensor in model.state_dict().items()},
    )
    print(f"wrote {path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
