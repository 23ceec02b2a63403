"""The packages that products are compared with, each called as its own spectral density calls it.

A peer multiplies by the Hessian of the same workload: a copy of its model in eval mode, its data as one batch, and its
loss. ``make bench`` installs both, at the versions pinned in pyproject.toml and constraints.txt.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from workloads import Workload

PACKAGES = {"hessian_eigenthings": "hessian-eigenthings", "curvlinops": "curvlinops-for-pytorch"}
"""Name of the distribution of each module."""

WRONG = {
    (
        "curvlinops",
        "gpt-s",
    ): "PyTorch's jvp of jacrev through layer_norm is wrong in its weight (in 2.13, in float64 too; "
    "jvp of grad is right)",
}
"""Peers whose products on a workload are wrong, and why. They take no part; a bench checks that it is still so."""


@dataclass(frozen=True)
class Density:
    """A smoothed density on a grid, and the quadrature behind it: nodes and weights of each probe."""

    grid: Tensor
    values: Tensor
    rules: list[tuple[Tensor, Tensor]]


def why_missing() -> str | None:
    """Return why the peers cannot be used here, or None if they can."""
    for module, package in PACKAGES.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # a package that does not fit this PyTorch may raise anything
            return f"{package} cannot be imported ({type(error).__name__}: {error}); `make bench` installs it"
    return None


class Peer:
    """What peers have in common.

    Attributes
    ----------
    name : str
        Module and version.
    workload : str
        Whose Hessian it multiplies by.
    size : int
        n, the number of parameters.
    """

    module: str
    call: str

    def __init__(self, workload: Workload) -> None:
        self.name = f"{self.module} {importlib.metadata.version(PACKAGES[self.module])}"
        self.workload = workload.name
        self.model = copy.deepcopy(workload.model)
        self.size = sum(parameter.numel() for parameter in self.model.parameters())

    def matvec(self, vector: Tensor) -> Tensor:
        """Return H times a vector (n,)."""
        raise NotImplementedError

    @property
    def wrong(self) -> str | None:
        """Why the products of this workload are wrong, or None if they are right."""
        return WRONG.get((self.module, self.workload))

    def one_by_one(self, panel: Tensor) -> list[Tensor]:
        """Return H times each row of a panel (b, n)."""
        return [self.matvec(vector) for vector in panel]

    def density(self, probes: int, steps: int, seed: int, points: int, ends: tuple[float, float]) -> Density:
        """Return the density by the package's own routine, from so many products for each of so many probes.

        ``ends`` are the extreme eigenvalues, for a routine that would otherwise spend further products on them.
        """
        raise NotImplementedError

    def probes(self, probes: int, seed: int) -> Iterator[Tensor]:
        """Yield the probes that ``density`` draws."""
        raise NotImplementedError


class Eigenthings(Peer):
    """hessian-eigenthings: ``spectral_density`` calls ``HessianOperator.matvec``, double backward from the start.

    There is no call for several vectors. Its Lanczos orthogonalizes against all vectors, once.
    """

    module, call = "hessian_eigenthings", "matvec(v)"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        from hessian_eigenthings import HessianOperator

        self.operator = HessianOperator(
            self.model, [(workload.inputs, workload.targets)], lambda model, batch: workload.loss(model, *batch)
        )

    def matvec(self, vector: Tensor) -> Tensor:
        return self.operator.matvec(vector)

    def density(self, probes: int, steps: int, seed: int, points: int, ends: tuple[float, float]) -> Density:  # noqa: ARG002
        from hessian_eigenthings.algorithms.spectral_density import spectral_density

        found = spectral_density(self.operator, num_runs=probes, lanczos_steps=steps, num_grid_points=points, seed=seed)
        return Density(found.grid, found.density, list(zip(found.raw_eigenvalues, found.raw_weights, strict=True)))

    def probes(self, probes: int, seed: int) -> Iterator[Tensor]:
        from hessian_eigenthings.linalg import SingleDeviceBackend

        for run in range(probes):
            generator = torch.Generator().manual_seed(seed + run)
            yield SingleDeviceBackend().rademacher_like(torch.empty(self.size), generator=generator)


class Curvlinops(Peer):
    """curvlinops: ``fast_lanczos`` calls ``operator @ v``, vmap of jvp of the gradient; a matrix goes the same way.

    Its Lanczos is the three-term recurrence alone. What it checks when an operator is made is left out.
    """

    module, call = "curvlinops", "operator @ v"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        from curvlinops import HessianLinearOperator

        self.operator = HessianLinearOperator(
            self.model,
            _Loss(workload),
            list(self.model.parameters()),
            [(workload.inputs, workload.targets)],
            check_deterministic=False,
        )

    def matvec(self, vector: Tensor) -> Tensor:
        return self.operator @ vector

    def batched(self, columns: Tensor, width: int) -> list[Tensor]:
        """Return H times the columns of a matrix (n, b), so many at a time."""
        return [self.operator @ piece for piece in columns.split(width, dim=1)]

    def density(self, probes: int, steps: int, seed: int, points: int, ends: tuple[float, float]) -> Density:
        from curvlinops import LanczosApproximateSpectrumCached

        torch.manual_seed(seed)
        spectrum = LanczosApproximateSpectrumCached(self.operator, steps, boundaries=ends)
        grid, values = spectrum.approximate_spectrum(num_repeats=probes, num_points=points)
        return Density(grid, values, [(nodes, vectors[0] ** 2) for nodes, vectors in spectrum._lanczos_iters])

    def probes(self, probes: int, seed: int) -> Iterator[Tensor]:
        torch.manual_seed(seed)
        for _ in range(probes):
            yield torch.randn(self.size)


class _Loss(nn.Module):
    """The loss of a workload as the module with a ``reduction`` that curvlinops wants."""

    reduction = "mean"

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.criterion = workload.criterion

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(outputs, targets)


def of(workload: Workload) -> list[Peer]:
    """Return all peers for a workload."""
    return [Eigenthings(workload), Curvlinops(workload)]


def left_out(workload: Workload) -> str:
    """Return words about the peers that take no part, or nothing."""
    reasons = [f"; {module} left out: {why}" for (module, name), why in WRONG.items() if name == workload.name]
    return "".join(reasons)
