"""Hessian products next to the peers' own: per vector, by strategy, and as a whole density.

make bench
.venv/bin/python -m pytest bench -k products
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from statistics import fmean

import peers
import pytest
import torch
import workloads
from bench_lanczos import BASELINE_MULTIPLE, ENGINE_MULTIPLE, check_moments, double_backward
from contest import Contestant, Target
from torch import Tensor

import hesd_fast as hesd
from hesd_fast import kernels
from hesd_fast.hvp import STRATEGIES
from hesd_fast.lanczos.lanczos_run import fill_probes
from hesd_fast.lanczos.options import LanczosSettings

SEED = 7
BLOCKS = [1, 4, 8]
STRATEGY_BLOCK = 4
POINTS = 1024
"""Grid points of a density."""

MULTIPLE = 1024
"""Rounding errors of float32 that an entry of a product may be off by, relative to the panel's largest product."""

EPSILON = torch.finfo(torch.float32).eps
FORWARDS = 6
"""Forward passes' worth of arithmetic that the product with one vector needs at least, its gradient at hand."""

PEER, ANALYZE = "peer, its own density", "hesd.analyze, with criteria and checks"
ONE, BATCHED, FLOOR = "peer, one vector at a time", "peer, batched", f"{FORWARDS} forward passes a vector"

ONE_TARGETS = {"mlp": 1.5, "lenet": 1.0, "resnet20": 1.5, "gpt-s": 1.5}
BATCHED_TARGETS = {"mlp": 1.2, "lenet": 1.0, "resnet20": 1.3, "gpt-s": 1.15}
FLOOR_TARGETS = {"gpt-s": 1 / 1.3}
DENSITY_TARGET = 1.5
EQUAL_ACCURACY_TARGET = 4.0


@dataclass(frozen=True)
class Case:
    """A workload with a panel of vectors and their products in float64."""

    workload: workloads.Workload
    panel: Tensor
    truth: Tensor
    loss: float

    @classmethod
    def make(cls, name: str, sizes) -> Case:
        workload = workloads.build(name, sizes.images[name], sizes.tiny_models)
        panel = kernels.empty_panel(max(BLOCKS), sum(p.numel() for p in workload.model.parameters()))
        kernels.fill_probes(panel, SEED)
        exact = workload.in_double()
        product = double_backward(exact, keep_graph=True)
        truth = torch.stack([product(row.double()) for row in panel])
        with torch.no_grad():
            loss = float(exact.loss(exact.model, exact.inputs, exact.targets))
        return cls(workload, panel, truth, loss)

    @property
    def about(self) -> str:
        workload, n = self.workload, self.panel.shape[1]
        return f"{workload.name}, n = {n:,}, {len(workload.inputs)} samples of {workload.data}, float32"

    def check(self, block: int):
        """Return a check of products of the first ``block`` vectors: a panel, or vectors or matrices (n, width)."""
        truth = self.truth[:block]
        allowed = MULTIPLE * EPSILON * float(truth.abs().max())

        def check(got):
            if not isinstance(got, Tensor):
                got = torch.cat([part[None] if part.ndim == 1 else part.T for part in got])
            assert got.shape == truth.shape
            error = float((got - truth).abs().max())
            assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"

        return check

    def ours(self, name: str, operator: hesd.HessianOperator, block: int) -> Contestant:
        panel, out = self.panel[:block], kernels.empty_panel(block, self.panel.shape[1])
        return Contestant(name, lambda: operator.matmat(panel, out=out), self.check(block), "engine")

    def floor(self, block: int) -> Contestant:
        """The forward passes whose arithmetic is the least that the products take."""
        workload, model = self.workload, copy.deepcopy(self.workload.model)
        count = FORWARDS * block

        @torch.no_grad()
        def run():
            return [workload.loss(model, workload.inputs, workload.targets) for _ in range(count)]

        def check(losses):
            assert max(abs(float(loss) - self.loss) for loss in losses) <= MULTIPLE * EPSILON * self.loss

        return Contestant(f"{count} forward passes", run, check, FLOOR)


@pytest.fixture(scope="module", params=workloads.WORKLOADS)
def case(request, sizes):
    return Case.make(request.param, sizes)


@pytest.fixture(scope="session")
def _peers_installed():
    reason = peers.why_missing()
    if reason is not None:
        pytest.skip(reason)


def note_distance_to_floor(benchmark, row):
    """Keep the time of a product as a multiple of its floor."""
    benchmark.extra_info["times_of_the_floor"] = round(1 / row["ratios"][FLOOR]["ratio"], 3)


@pytest.mark.usefixtures("_peers_installed")
@pytest.mark.parametrize("block", BLOCKS, ids=[f"b{block}" for block in BLOCKS])
def test_product(hold, benchmark, sizes, case, block):
    """A panel of products by the planner's choice; a ratio of panels is one of products."""
    name, panel = case.workload.name, case.panel[:block]
    check = case.check(block)
    columns = panel.T.contiguous()
    competitors = []
    for peer in peers.of(case.workload):
        if peer.wrong:
            continue
        competitors.append(
            Contestant(f"{peer.name}, {peer.call}", lambda peer=peer: peer.one_by_one(panel), check, ONE)
        )
        if isinstance(peer, peers.Curvlinops):
            competitors += [
                Contestant(
                    f"{peer.name}, operator @ V of {width}",
                    lambda peer=peer, width=width: peer.batched(columns, width),
                    check,
                    BATCHED,
                )
                for width in BLOCKS
                if 1 < width <= block
            ]
    wanted = {ONE: ONE_TARGETS, BATCHED: BATCHED_TARGETS, FLOOR: FLOOR_TARGETS if block > 1 else {}}
    competitors.append(case.floor(block))
    groups = dict.fromkeys(competitor.group for competitor in competitors)
    targets = [Target(f"ratio to {group}", wanted[group][name]) for group in groups if name in wanted[group]]
    problem = case.workload.problem()
    operator = hesd.HessianOperator(problem, hvp="auto")
    with problem.session():  # as analyze does
        operator.matmat(panel)  # the planner tries its strategies
        chosen = operator.strategy.name
        row = hold(
            case.ours(f"hesd auto, {chosen}", operator, block),
            competitors,
            sizes.product_rounds,
            about=f"{case.about}; products with b = {block}, hvp = auto: {chosen}{peers.left_out(case.workload)}",
            targets=targets,
        )
    operator.strategy.release()
    note_distance_to_floor(benchmark, row)


@pytest.mark.usefixtures("_peers_installed")
def test_peer_is_left_out_only_while_it_is_wrong(case):
    check = case.check(1)
    for peer in peers.of(case.workload):
        if peer.wrong:
            with pytest.raises(AssertionError, match="off by"):
                check(peer.one_by_one(case.panel[:1]))
        else:
            check(peer.one_by_one(case.panel[:1]))


@pytest.mark.usefixtures("_peers_installed")
def test_an_operator_of_curvlinops_is_one_here(case):
    peer = peers.Curvlinops(case.workload)
    if peer.wrong:
        pytest.skip(peer.wrong)
    operator = hesd.MatrixOperator(peer.operator)
    case.check(1)(operator.matmat(case.panel[:1]))
    rule = hesd.SpectralMeasure.from_tridiagonal(
        hesd.block_lanczos(peer.operator, 3, 1, seed=SEED, probe_kind="rademacher")
    )
    check_moments(exact_moments(case.workload, case.panel[:1]), 3, BASELINE_MULTIPLE)(
        [(torch.tensor(rule.nodes[0]), torch.tensor(rule.weights[0]))]
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_product_by_strategy(hold, benchmark, sizes, case, strategy):
    """Each exact strategy by name, next to plain double backward from the start for each vector."""
    if case.workload.name not in sizes.strategies_of:
        pytest.skip(f"strategies by name are for {', '.join(sizes.strategies_of)} alone in {sizes.name} size")
    block = STRATEGY_BLOCK
    panel = case.panel[:block]
    problem = case.workload.problem()
    operator = hesd.HessianOperator(problem, hvp=strategy)
    plain = double_backward(case.workload, keep_graph=False)
    competitors = [
        Contestant(
            "double backward, gradient anew",
            lambda: [plain(row) for row in panel],
            case.check(block),
            "PyTorch, one vector at a time",
        ),
        case.floor(block),
    ]
    with problem.session():
        try:
            operator.matmat(panel)
        except hesd.OperatorError as error:
            pytest.skip(f"{strategy} does not take {case.workload.name}: {error}")
        row = hold(
            case.ours(strategy, operator, block),
            competitors,
            sizes.product_rounds,
            about=f"{case.about}; products with b = {block}, hvp = {strategy}",
        )
    operator.strategy.release()
    note_distance_to_floor(benchmark, row)


# From the model to its density.


def exact_moments(workload, probes):
    """Moments 0 to 2 of the measure of each probe, from one product in float64."""
    product = double_backward(workload.in_double(), keep_graph=True)
    moments = []
    for probe in probes:
        probe = probe.double()
        image, square = product(probe), float(probe @ probe)
        moments.append([1.0, float(probe @ image) / square, float(image @ image) / square])
    return moments


def density_check(workload, probes, steps, multiple):
    """A check of a density: its quadrature has the moments of the Hessian, and its curve is one."""
    check_rules = check_moments(exact_moments(workload, probes), steps, multiple)

    def check(found):
        assert found.values.shape == found.grid.shape == (POINTS,)
        assert bool(torch.isfinite(found.values).all())
        assert float(found.values.min()) >= 0
        assert float(found.values.max()) > 0
        check_rules([(nodes.double(), weights.double()) for nodes, weights in found.rules])

    return check


def smoothed(measure):
    """The density of a measure on a grid, with its quadrature."""
    low, high = min(nodes[0] for nodes in measure.nodes), max(nodes[-1] for nodes in measure.nodes)
    pad = 0.1 * (high - low)
    grid = torch.linspace(low - pad, high + pad, POINTS, dtype=torch.float64)
    rules = [(torch.tensor(x), torch.tensor(w)) for x, w in zip(measure.nodes, measure.weights, strict=True)]
    density = measure.density(grid.numpy(), sigma=float(0.01 * (high - low)))
    return peers.Density(grid, torch.from_numpy(density), rules)


@pytest.mark.usefixtures("_peers_installed")
def test_density_with_the_same_products(hold, benchmark, sizes, case):
    """From the model to its smoothed density, planning included; and `analyze`, which finds the criteria besides."""
    workload = case.workload
    count, steps = sizes.density_probes, sizes.density_steps
    used = []

    def density():
        problem = workload.problem()
        with problem.session():
            operator = hesd.HessianOperator(problem, hvp="auto", panels=steps)
            tridiagonal = hesd.block_lanczos(operator, steps, count, seed=SEED, probe_kind="rademacher")
        used[:] = [operator.strategy.name]
        assert operator.products == count * steps
        return smoothed(hesd.SpectralMeasure.from_tridiagonal(tridiagonal))

    def analyze():
        options = {"block_size": count, "max_steps": steps, "seed": SEED, "tolerance": None, "progress": False}
        report = hesd.analyze(workload.problem(), **options)
        return smoothed(report.measure)

    nodes = torch.cat([nodes for nodes, _ in density().rules])
    ends = float(nodes.min()), float(nodes.max())
    panel = kernels.empty_panel(count, case.panel.shape[1])
    kernels.fill_probes(panel, SEED)
    check = density_check(workload, panel, steps, ENGINE_MULTIPLE)
    on_sphere = kernels.empty_panel(count, case.panel.shape[1])
    fill_probes(on_sphere, LanczosSettings(count, steps, seed=SEED))
    check_analysis = density_check(workload, on_sphere, steps, ENGINE_MULTIPLE)
    competitors = [Contestant("hesd.analyze", analyze, check_analysis, ANALYZE)]
    for peer in peers.of(workload):
        if peer.wrong:
            continue
        case.check(1)(peer.one_by_one(case.panel[:1]))  # a few wrong entries would not show in the moments
        competitors.append(
            Contestant(
                f"{peer.name}, its density",
                lambda peer=peer: peer.density(count, steps, SEED, POINTS, ends),
                density_check(workload, peer.probes(count, SEED), steps, BASELINE_MULTIPLE),
                PEER,
            )
        )
    row = hold(
        Contestant("block_lanczos and density", density, check, "engine"),
        competitors,
        sizes.product_rounds,
        about=f"{case.about}; density from {count} probes of {steps} products, by {used[0]}; analyze makes two more; "
        f"curvlinops is told the ends{peers.left_out(workload)}",
        targets=[Target(f"ratio to {PEER}", DENSITY_TARGET)],
    )
    ratios = row["ratios"]
    benchmark.extra_info["peer_to_analyze"] = round(ratios[PEER]["ratio"] / ratios[ANALYZE]["ratio"], 3)


def measure_of(found):
    """The measure of a peer's quadrature."""
    nodes, weights = zip(*((x.double().numpy(), (w / w.sum()).double().numpy()) for x, w in found.rules), strict=True)
    return hesd.SpectralMeasure(nodes, weights)


@pytest.mark.usefixtures("_peers_installed")
@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_density_of_equal_accuracy(hold, sizes, name):
    """As near to the truth as a peer's density at its defaults, and criteria with narrow intervals, which it lacks.

    The truth is a measure from many more probes. Nearness is the Wasserstein distance of the quadratures, in the mean
    over some seeds, as one alone may be lucky; a further one is timed.
    """
    workload = workloads.build(name, sizes.images[name], sizes.tiny_models)
    plan = sizes.accuracy[name]
    problem = workload.problem()
    with problem.session():
        operator = hesd.HessianOperator(problem, hvp="kept_graph")
        runs = [hesd.block_lanczos(operator, plan.truth_steps, plan.truth_probes, seed=900 + i) for i in range(2)]
        operator.strategy.release()
    parts = [hesd.SpectralMeasure.from_tridiagonal(run) for run in runs]
    truth = hesd.SpectralMeasure([x for part in parts for x in part.nodes], [w for part in parts for w in part.weights])
    # Each half is off by about sqrt(2) times what the whole is off by, in a direction of its own.
    truth_error = parts[0].wasserstein1(parts[1]) / 2
    peer = peers.Eigenthings(workload)
    if peer.wrong:
        pytest.skip(peer.wrong)

    def ours(seed=0):
        options = {"block_size": plan.probes, "max_steps": plan.steps, "tolerance": None, "progress": False}
        return hesd.analyze(workload.problem(), seed=seed, **options)

    def theirs(seed=0):
        return peer.density(plan.peer_probes, plan.peer_steps, seed, POINTS, (0.0, 0.0))

    seeds = range(100, 100 * (sizes.accuracy_seeds + 1), 100)  # a peer's runs take consecutive ones
    ours_error = fmean(ours(seed).measure.wasserstein1(truth) for seed in seeds)
    peer_error = fmean(measure_of(theirs(seed)).wasserstein1(truth) for seed in seeds)
    assert truth_error <= peer_error / 2, "the truth is not known well enough to compare"
    assert ours_error <= peer_error

    def check_ours(report):
        assert report.measure.wasserstein1(truth) <= 2 * ours_error
        for estimate in (report.criteria.r_e, report.criteria.k_mass):
            margin = sizes.accuracy_margin * abs(estimate.value)
            assert estimate.value - margin <= estimate.low <= estimate.high <= estimate.value + margin, str(estimate)

    def check_theirs(found):
        assert measure_of(found).wasserstein1(truth) <= 2 * peer_error

    hold(
        Contestant("hesd.analyze", ours, check_ours, "engine"),
        [Contestant(f"{peer.name}, its density", theirs, check_theirs, PEER)],
        sizes.accuracy_rounds,
        about=f"{name}, n = {problem.size:,}, {len(workload.inputs)} samples of {workload.data}, float32; "
        f"{plan.probes} probes of {plan.steps} products, against {plan.peer_probes} of {plan.peer_steps}, the peer's "
        f"defaults; Wasserstein distance to the truth {ours_error:.2g} against {peer_error:.2g}, of the truth about "
        f"{truth_error:.1g}; intervals of r_e and k_mass within {sizes.accuracy_margin:.0%}",
        targets=[Target(f"ratio to {PEER}", EQUAL_ACCURACY_TARGET)],
    )
