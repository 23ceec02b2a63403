"""Peak memory as `hesd plan` predicts it, next to that of the run itself, each in a process of its own.

.venv/bin/python bench/peak_memory.py                  # all workloads, about ten minutes on two cores
.venv/bin/python bench/peak_memory.py gpt-s resnet20
"""

from __future__ import annotations

import subprocess
import sys

import torch
import workloads

import hesd_fast as hesd
from hesd_fast.engine.memory import peak_memory

RUNS = {
    # workload: block size, steps
    "mlp": (4, 100),
    "lenet": (4, 100),
    "resnet20": (4, 25),
    "gpt-s": (4, 25),
    "gpt2": (1, 4),
}


def problem(name: str) -> hesd.Problem:
    if name != "gpt2":
        return workloads.build(name).problem()
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(attn_implementation="eager")).eval()
    tokens = torch.randint(model.config.vocab_size, (4, 128))
    return hesd.Problem(model, hesd.losses.causal_lm(), {"input_ids": tokens, "labels": tokens})


def plan(name: str) -> None:
    block, steps = RUNS[name]
    print(hesd.plan(problem(name), block_size=block, max_steps=steps).peak_bytes)


def analyze(name: str) -> None:
    block, steps = RUNS[name]
    hesd.analyze(problem(name), block_size=block, max_steps=steps, tolerance=None, progress=False)
    print(peak_memory())


def measured(what: str, name: str) -> int:
    done = subprocess.run([sys.executable, __file__, what, name], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main(names: list[str]) -> None:
    print(f"{'workload':10} {'run':>9} {'predicted, MiB':>15} {'measured, MiB':>14} {'ratio':>6}")
    for name in names or RUNS:
        block, steps = RUNS[name]
        predicted, found = measured("plan", name), measured("analyze", name)
        row = f"{name:10} {f'{steps} x {block}':>9} {predicted / 2**20:15.0f} {found / 2**20:14.0f}"
        print(f"{row} {predicted / found:6.3f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] in (["plan"], ["analyze"]):
        globals()[sys.argv[1]](sys.argv[2])
    else:
        main(sys.argv[1:])
