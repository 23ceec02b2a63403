"""The network and the data that ship with the package: handwritten digits and a small trained classifier.

Made by ``examples/make_demo_data.py``.
"""

from __future__ import annotations

from importlib import resources
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from hesd_fast.problem.losses import supervised
from hesd_fast.problem.problem import Problem

ARCHIVE = "demo_digits.npz"
BATCH_SIZE = 250

Split = Literal["train", "test"]


def demo_network() -> nn.Sequential:
    """Return the untrained demo network, 8 x 8 images to 10 classes, 3,466 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 10))


def demo_problem(split: Split = "train") -> Problem:
    """Return the trained demo network on its training or its test images."""
    with resources.as_file(resources.files(__package__) / ARCHIVE) as path, np.load(path) as archive:
        model = demo_network()
        model.load_state_dict({name: torch.from_numpy(archive[name]) for name in model.state_dict()})
        images = scale_pixels(archive[f"{split}_images"])
        labels = torch.from_numpy(archive[f"{split}_labels"]).long()
    batches = list(zip(torch.split(images, BATCH_SIZE), torch.split(labels, BATCH_SIZE), strict=True))
    return Problem(model, supervised(nn.CrossEntropyLoss()), batches)


def scale_pixels(images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Tensor:
    """Return images of values 0 ... 16 as float32 in [-1, 1]."""
    return torch.from_numpy(images).float() / 8.0 - 1.0
