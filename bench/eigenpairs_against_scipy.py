"""Products and seconds of eigsh next to SciPy's (ARPACK), at the same residual norm: the table of docs/eigenpairs.md.

.venv/bin/python bench/eigenpairs_against_scipy.py

Both get the same operator. The residual norm asked of SciPy is that of ours, as its tolerance is relative to each
eigenvalue: ours over the smallest of the eigenvalues found. The answers are compared before a row is printed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import nn
from workloads import Diagonal

import hesd_fast as hesd
from hesd_fast.operators.base import OperatorBase

HEADER = (
    "| matrix | k, which | tolerance | eigsh, no check | with check and residuals | seconds | SciPy | SciPy, our ncv "
    "| seconds | largest residual: ours, SciPy's |"
)


@dataclass(frozen=True)
class Case:
    """A matrix, and what of it is wanted."""

    name: str
    operator: Callable[[], OperatorBase]
    k: int
    which: str
    tol: float | None = None


def network(dtype: torch.dtype, width: int, samples: int, steps: int) -> hesd.HessianOperator:
    """Return the Hessian of a perceptron trained on the classes of another one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs = torch.randn(samples, 784)
        targets = nn.Sequential(nn.Linear(784, 16), nn.Tanh(), nn.Linear(16, 10))(inputs).argmax(dim=1)
        model = nn.Sequential(nn.Linear(784, width), nn.Tanh(), nn.Linear(width, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    model = model.to(dtype)
    loss = hesd.losses.supervised(nn.CrossEntropyLoss())
    return hesd.HessianOperator(hesd.Problem(model, loss, (inputs.to(dtype), targets)), hvp="kept_graph")


def cases(small: bool) -> list[Case]:
    """Return all rows of the table."""
    width, samples, steps = (4, 64, 20) if small else (64, 512, 150)
    length = 300 if small else 2000
    single, double = torch.float32, torch.float64

    def trained(dtype: torch.dtype) -> Callable[[], OperatorBase]:
        return lambda: network(dtype, width, samples, steps)

    def diagonal(values: np.ndarray, dtype: torch.dtype) -> Callable[[], OperatorBase]:
        return lambda: Diagonal(torch.from_numpy(values).to(dtype))

    laplacian = 2.0 - 2.0 * np.cos(np.arange(1, length + 1) * np.pi / (length + 1))
    return [
        Case("network, float32", trained(single), 5, "LA"),
        Case("network, float32", trained(single), 10, "LA"),
        Case("network, float32", trained(single), 20, "LA"),
        Case("network, float32", trained(single), 5, "SA"),
        Case("network, float32", trained(single), 10, "LM"),
        Case("network, float32", trained(single), 10, "BE"),
        Case("network, float64", trained(double), 10, "LA"),
        Case("network, float64", trained(double), 10, "LA", 1e-6),
        Case("normal, float64", diagonal(np.random.default_rng(0).normal(size=length), double), 10, "LA"),
        Case("1/i, float64", diagonal(1.0 / np.arange(1.0, length + 1), double), 10, "LA"),
        Case("Laplacian, float64", diagonal(laplacian, double), 10, "LA", 1e-8),
    ]


def by_scipy(operator: OperatorBase, case: Case, result: hesd.EigenResult, ncv: int | None) -> tuple[int, float, float]:
    """Return products, seconds and the largest residual norm of SciPy; an error if its eigenvalues are not ours."""
    tol = result.tolerance / float(np.abs(result.values).min())
    before, start = operator.products, time.perf_counter()
    v0 = np.random.default_rng(0).normal(size=operator.size)
    wrapped = operator.to_scipy()
    try:
        values, vectors = scipy_eigsh(wrapped, case.k, which=case.which, tol=tol, ncv=ncv, v0=v0)
    except ArpackNoConvergence:
        return -1, float("nan"), float("nan")
    seconds, products = time.perf_counter() - start, operator.products - before
    residuals = np.linalg.norm(np.asarray(wrapped @ vectors) - vectors * values, axis=0)
    difference = np.abs(np.sort(values) - np.sort(result.values)).max()
    if difference > 2 * max(result.tolerance, residuals.max()):
        raise AssertionError(f"{case}: eigenvalues differ by {difference:.2g}")
    return products, seconds, float(residuals.max())


def row(case: Case) -> str:
    """Measure one row of the table."""
    operator = case.operator()
    operator.matmat(torch.ones(1, operator.size, dtype=operator.dtype))  # prepares the problem
    plain = hesd.eigsh(operator, case.k, case.which, case.tol, check_missed=False)
    start = time.perf_counter()
    result = hesd.eigsh(operator, case.k, case.which, case.tol)
    seconds = time.perf_counter() - start
    if not (result.converged.all() and result.complete):
        raise AssertionError(f"{case}: not converged, or not complete")
    ncv = min(max(4 * case.k, case.k + 90), operator.size)
    default, default_seconds, residual = by_scipy(operator, case, result, None)
    same, same_seconds, _ = by_scipy(operator, case, result, ncv)
    tolerance = result.tolerance / float(np.abs(result.values).max())
    return (
        f"| {case.name}, n = {operator.size:,} | {case.k}, {case.which} | {tolerance:.1e} "
        f"| {plain.products - case.k} | {result.products} | {seconds:.1f} | {default} | {same} "
        f"| {default_seconds:.1f}, {same_seconds:.1f} | {result.residuals.max():.1e}, {residual:.1e} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="small sizes, to see that it runs")
    small = parser.parse_args().small
    print(HEADER)
    print("| --- " * (HEADER.count("|") - 1) + "|")
    for case in cases(small):
        print(row(case), flush=True)


if __name__ == "__main__":
    main()
