"""All that a run may not change: a model with its tensors, and the settings and random streams of the process."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def snapshot(model: nn.Module) -> dict[str, object]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors},
        "identities": {name: id(tensor) for name, tensor in tensors},
        "versions": {name: tensor._version for name, tensor in tensors},
        "memory": {name: (tensor.data_ptr(), tensor.stride()) for name, tensor in tensors},
        "modules": {name: id(module) for name, module in model.named_modules(remove_duplicate=False)},
        "buffers": {name: sorted(module._buffers) for name, module in model.named_modules()},
        "state_dict": list(model.state_dict()),
        "training": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "grad": {
            name: (id(p.grad), None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()
        },
        "hooks": {name: [len(getattr(module, kind)) for kind in HOOKS] for name, module in model.named_modules()},
        "gradient_hooks": {
            name: [len(p._backward_hooks or ()), len(p._post_accumulate_grad_hooks or ())]
            for name, p in model.named_parameters()
        },
        "cache": id(getattr(model, "cache", None)),
        "has_new_attribute": hasattr(model, "new_attribute"),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1:],  # noqa: NPY002
        "python": random.getstate(),
        **settings_of_torch(),
    }


def settings_of_torch() -> dict[str, object]:
    return {
        "grad_mode": torch.is_grad_enabled(),
        "inference_mode": torch.is_inference_mode_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "fast_path": torch.backends.mha.get_fastpath_enabled(),
        "cudnn": torch.backends.cudnn.enabled,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "default_dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "function_modes": torch._C._len_torch_function_stack(),
        "backward_engine": id(torch.autograd._engine_run_backward),
        "register_hook": id(torch.Tensor.register_hook),
    }


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) or (a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    changed = [key for key in before if not equal(before[key], after[key])]
    assert not changed, changed
