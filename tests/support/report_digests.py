"""Digests of a set of reports: the same before and after a change that should change no number.

    python tests/support/report_digests.py > before     # then change the code
    python tests/support/report_digests.py | diff before -

Each line is a digest of all that a saved report holds except seconds and bytes. Numbers depend on the processor and on
the libraries, so digests of two machines say nothing. Takes about a minute on two cores; Fashion-MNIST, from Debian's
package dataset-fashion-mnist, is left out where it is missing.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hesd_fast as hesd
from hesd_fast.cli.demo_problem import demo_problem

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import fashion_mnist

FIXED = {"hvp": "double_backward", "progress": False}
"""What makes a report the same at every run: "auto" chooses by time."""


def fashion_problem() -> hesd.Problem:
    """Return LeNet-5 as it is drawn, on 400 test images."""
    torch.manual_seed(0)
    model = fashion_mnist.LeNet5()
    images, labels = (tensor[:400] for tensor in fashion_mnist.load(fashion_mnist.DEBIAN_FOLDER, "test"))
    loss = hesd.losses.supervised(nn.CrossEntropyLoss())
    return hesd.Problem(model, loss, list(zip(images.split(200), labels.split(200), strict=True)))


def reports() -> Iterator[tuple[str, hesd.Report]]:
    """Yield reports of every kind by name."""
    for split in ("train", "test"):
        yield f"demo, {split}", hesd.analyze(demo_problem(split), max_steps=40, **FIXED)
    problem = demo_problem()
    for operator in ("gauss_newton", "empirical_fisher"):
        yield operator, hesd.analyze(problem, operator=operator, max_steps=25, progress=False)
    for protocol in ("lla",):
        yield f"protocol {protocol}", hesd.analyze(problem, protocol=protocol, **FIXED)
    for mode in ("partial", "window", "none"):
        yield mode, hesd.analyze(problem, reorthogonalization=mode, max_steps=30, **FIXED)
    for place in ("memory", "disk"):
        options = {"max_steps": 20, "block_size": 3, "basis": place, "basis_dtype": "bfloat16", "seed": 3}
        yield f"bfloat16, {place}", hesd.analyze(problem, **options, **FIXED)
    for strategy in ("double_backward_batched", "kept_graph", "forward_over_reverse", "finite_differences"):
        yield strategy, hesd.analyze(problem, hvp=strategy, max_steps=10, progress=False)
    small = hesd.Problem(problem.model, problem.loss, problem.data, parameters=r"1\.bias")
    yield "all unit vectors", hesd.analyze(small, block_size=32, **FIXED)
    for groups in ("modules", {"biases": r".*bias", "first": r"1\..*", "tenths": r"5\.bias"}):
        named = hesd.analyze_groups(problem, groups=groups, max_steps=15, **FIXED)
        yield from ((f"group {name} of {len(named)}", report) for name, report in named.items())
    if fashion_mnist.DEBIAN_FOLDER.is_dir():
        yield "fashion", hesd.analyze(fashion_problem(), max_steps=15, **FIXED)


def digest(report: hesd.Report) -> str:
    """Return the digest of a report as it is saved, less what is another at every run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.hesd.json"
        report.save(path)
        content: Any = json.loads(path.read_text())
    text = json.dumps(without_measurements(content), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def without_measurements(content: Any) -> Any:
    """Return content without seconds and bytes."""
    if isinstance(content, Mapping):
        kept = content.keys() - {"seconds", "peak_bytes"}
        return {key: without_measurements(content[key]) for key in kept}
    return [without_measurements(each) for each in content] if isinstance(content, list) else content


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, report in reports():
        print(f"{digest(report)}  {name}", flush=True)
