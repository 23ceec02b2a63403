"""Lanczos end to end: the engine next to the loop over lists of vectors that peers write, same number of products.

make bench
.venv/bin/python -m pytest bench -k lanczos
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import pytest
import torch
import workloads
from contest import Contestant

import hesd_fast as hesd
from hesd_fast import kernels
from hesd_fast.engine import reference

SEED = 5
ENGINE_MULTIPLE, BASELINE_MULTIPLE = 64, 4096
"""Rounding errors allowed to a moment, see `check_moments`."""


class Timed:
    """Passes calls on to a function and adds up the seconds spent there."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, *arguments, **options):
        before = time.perf_counter()
        result = self.function(*arguments, **options)
        self.seconds += time.perf_counter() - before
        return result

    def reset(self) -> None:
        self.seconds = 0.0


def engine_contestant(operator, steps, block, check):
    """The engine on an operator; answers with one pair of nodes and weights per probe, as the baseline does."""
    products = operator.matmat = Timed(operator.matmat)

    def run():
        tridiagonal = hesd.block_lanczos(operator, steps, block, seed=SEED, probe_kind="rademacher")
        nodes, vectors, _ = tridiagonal.ritz()
        seen = tridiagonal.start @ vectors[: tridiagonal.start.shape[1]]
        return [(torch.from_numpy(nodes), torch.from_numpy(row**2 / tridiagonal.size)) for row in seen]

    return Contestant("block_lanczos", run, check, "engine", products.reset, lambda: products.seconds)


def baseline_contestant(name, matvec, probes, steps, check, group="PyTorch"):
    """The peers' loop, one run per probe."""
    products = Timed(matvec)

    def run():
        return [reference.lanczos_quadrature(products, probe, steps) for probe in probes]

    return Contestant(name, run, check, group, products.reset, lambda: products.seconds)


def probes(count, n):
    panel = kernels.empty_panel(count, n)
    kernels.fill_probes(panel, SEED)
    return list(panel)


def check_moments(moments, steps, multiple):
    """A check that each probe's rule integrates powers as the probe itself does, exactly up to degree 2 steps - 1.

    Products that are off by e times the largest eigenvalue L move the moment p by at most about e p L mean|x|^(p - 1).
    The check allows for e = ``multiple`` epsilons of float32. The peers' loop sums n terms in float32, which costs it
    two to three digits that the engine's sums in float64 keep; so each has a multiple of its own.
    """
    allowance = multiple * torch.finfo(torch.float32).eps

    def check(rules):
        assert len(rules) == len(moments)
        for (nodes, weights), truths in zip(rules, moments, strict=True):
            assert len(nodes) >= steps
            assert abs(float(weights.sum()) - 1) <= allowance
            sizes = nodes.abs()
            for power, truth in enumerate(truths[1:], start=1):
                got = float(weights @ nodes**power)
                allowed = allowance * power * float(sizes.max() * (weights @ sizes ** (power - 1)))
                assert abs(got - truth) <= allowed, f"moment {power} is {got:.9g}; wanted {truth:.9g} +- {allowed:.1g}"

    return check


# Without a model.


@pytest.mark.parametrize("block", [1, 4], ids=["b1", "b4"])
def test_lanczos_of_a_diagonal(hold, sizes, block):
    """All the work is orthogonalization. The peers' loop keeps its probes apart, so at b = 4 it does less of it."""
    n, steps = sizes.diagonal_length, sizes.diagonal_steps
    diagonal = torch.linspace(-1.0, 1.0, n)
    exact = diagonal.double()
    # Rademacher probes have squares of 1, so every probe has the moments of the diagonal itself.
    moments = [[float((exact**power).mean()) for power in range(2 * steps)]] * block
    precise, rough = (check_moments(moments, steps, multiple) for multiple in (ENGINE_MULTIPLE, BASELINE_MULTIPLE))
    hold(
        engine_contestant(workloads.Diagonal(diagonal), steps, block, precise),
        [baseline_contestant("list of vectors", lambda v: diagonal * v, probes(block, n), steps, rough)],
        sizes.long_rounds if block == 1 else sizes.end_to_end_rounds,
        about=f"diagonal matrix, n = {n:,}, {steps} steps, {block} probe{'s' if block > 1 else ''}, float32",
    )


# With a model.


def double_backward(workload, keep_graph):
    """The product H v of a model by two backward passes, on a copy of the model."""
    model = copy.deepcopy(workload.model)
    parameters = list(model.parameters())
    counts = [parameter.numel() for parameter in parameters]
    inputs = workload.inputs.to(parameters[0].dtype) if workload.inputs.is_floating_point() else workload.inputs

    def gradient():
        loss = workload.loss(model, inputs, workload.targets)
        return torch.autograd.grad(loss, parameters, create_graph=True)

    kept = gradient() if keep_graph else None

    def product(vector):
        pieces = [v.view_as(p) for v, p in zip(vector.split(counts), parameters, strict=True)]
        products = torch.autograd.grad(kept or gradient(), parameters, pieces, retain_graph=keep_graph)
        return torch.cat([product.flatten() for product in products])

    return product


def exact_moments(workload, probe):
    """Moments 0 to 6 of one probe, from three products in float64."""
    in_double = workloads.Workload(
        workload.name, copy.deepcopy(workload.model).double(), workload.inputs, workload.targets, workload.data
    )
    product = double_backward(in_double, keep_graph=True)
    powers = [probe.double()]
    for _ in range(3):
        powers.append(product(powers[-1]))
    return [float(powers[p // 2] @ powers[p - p // 2]) / len(probe) for p in range(7)]


@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_lanczos_of_a_model(hold, sizes, name):
    workload = workloads.build(name, sizes.images[name])
    steps = sizes.steps[name]
    problem = workload.problem()
    n = problem.size
    (probe,) = probes(1, n)
    moments = [exact_moments(workload, probe)]
    precise, rough = (check_moments(moments, steps, multiple) for multiple in (ENGINE_MULTIPLE, BASELINE_MULTIPLE))
    # The planner's trials are in the first, untimed run; what it keeps stays, as the graph of the second baseline does.
    operator = hesd.HessianOperator(problem, hvp="auto", panels=steps)
    engine = engine_contestant(operator, steps, 1, precise)
    run = engine.run

    def in_a_session():  # as analyze does
        with problem.session():
            return run()

    engine.run = in_a_session
    hold(
        engine,
        [
            baseline_contestant(
                f"list of vectors, {way}",
                double_backward(workload, keep_graph),
                [probe],
                steps,
                rough,
                f"PyTorch, {way}",
            )
            # Packages differ in this; keeping the graph is quicker, and possible where there is one batch only.
            for way, keep_graph in (("gradient anew", False), ("graph kept", True))
        ],
        sizes.end_to_end_rounds,
        about=f"{name}, n = {n:,}, {len(workload.inputs)} samples of {workload.data}, {steps} steps, 1 probe, float32",
    )


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_workload_has_its_size_and_a_second_derivative(name):
    workload = workloads.build(name, 2)
    assert sum(parameter.numel() for parameter in workload.model.parameters()) == workloads.SIZES[name]
    (probe,) = probes(1, workloads.SIZES[name])
    ours = hesd.HessianOperator(workload.problem()).matvec(probe)
    plain = double_backward(workload, keep_graph=False)(probe)
    # the same operations in another order of summation
    allowed = 1024 * torch.finfo(torch.float32).eps * float(plain.abs().max())
    assert float(plain.abs().max()) > 0
    assert float((ours - plain).abs().max()) <= allowed
