"""What is compiled, its reference in PyTorch, and the devices and the memory that it works on."""

import torch  # noqa: F401 - before the extension, which shares its OpenMP runtime
