"""Whatever is given: a right number, an error of ours with cause and remedy, or the user's own exception.

The model and the process are as before in every case. Numbers are held against dense Hessians of ordinary operations.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from dense import dense_gauss_newton, dense_hessian
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st
from odd_faults import FAULTS
from odd_problems import OddProblem, problems, unpack
from snapshots import assert_same, snapshot
from torch import Tensor, nn

import hesd_fast as hesd
from hesd_fast.errors import HESDError, HESDWarning

SETTINGS = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "phases": (Phase.explicit, Phase.generate),  # examples are small as they are
    "suppress_health_check": list(HealthCheck),
}

EXACT = ("double_backward", "double_backward_batched", "kept_graph", "kept_graph_batched", "forward_over_reverse")

ROUNDING = 4096
"""What a product, the eigenvalues and the loss may be off, in machine epsilons of curvature and loss together."""

REFUSALS = (
    "cannot multiply by the Hessian",
    "gets the product of batch 0 wrong",
    "finite differences are off",
    "finite differences cannot hold",
    "use float64",
)
"""What strategies other than plain double backward say of problems that they cannot serve."""

DIFFERENCES = ("finite_differences", "forward_differences")

LARGEST_DIFFERENCE = 0.03
"""What products from differences may be off, as a share of the largest eigenvalue."""


def outcome(problem: OddProblem, function: Any) -> tuple[Any, BaseException | None, list[str]]:
    """What a function returns or raises, and its warnings of ours; nothing else may have changed."""
    before = snapshot(problem.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found, error = function(), None
        except HESDError as raised:
            found, error = None, raised
    after = snapshot(problem.model)
    if error is not None and "in place" in str(error):
        before.pop("versions")  # a write that autograd saw is counted, also where the values are back
    assert_same(before, after)
    return found, error, [str(one.message) for one in caught if issubclass(one.category, HESDWarning)]


def expected_error(problem: OddProblem) -> str:
    """Part of the error that a selection has to be refused with, or ""."""
    model, parameters = problem.reference()
    if not parameters:
        return "no parameter has requires_grad"
    if not any(parameter.numel() for parameter in parameters.values()):
        return "have no elements"
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    found = torch.autograd.grad(problem.total(model), list(parameters.values()), allow_unused=True)
    return "does not depend on the selected parameters" if all(one is None for one in found) else ""


def hessian_of(problem: OddProblem) -> Tensor:
    model, parameters = problem.reference()
    return dense_hessian(model, problem.total, parameters)


def run_options(draw: Any, size: int) -> dict[str, Any]:
    """Settings of a run, from a single vector to more than there are parameters."""
    if draw(st.integers(0, 9)) == 0:
        return {"protocol": "lla", "seed": draw(st.integers(0, 2**64 - 1))}
    block_size = draw(st.one_of(st.just("auto"), st.integers(1, size), st.just(size)))
    return {
        "block_size": block_size,
        "max_steps": draw(st.one_of(st.integers(1, 4), st.integers(size, 2 * size + 2))),
        "reorthogonalization": draw(st.sampled_from(["full", "full", "partial", "window", "none"])),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "basis_dtype": draw(st.sampled_from(["auto", "auto", "auto", "float32", "bfloat16", "float16"])),
        "basis": draw(st.sampled_from(["auto", "memory", "disk"])),
    }


class Truth:
    """The spectrum of a problem's dense matrix."""

    def __init__(self, problem: OddProblem, matrix: Tensor) -> None:
        eigenvalues = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
        self.low, self.high = float(eigenvalues[0]), float(eigenvalues[-1])
        self.trace, self.size = float(matrix.trace()), len(matrix)
        self.largest = max(abs(self.low), abs(self.high))
        self.loss = float(problem.total(problem.reference()[0]).detach())
        self.epsilon = torch.finfo(torch.float32 if problem.is_float32 else torch.float64).eps

    @property
    def is_rounding(self) -> bool:
        """Whether nothing is left of the curvature in the problem's precision, as where classes cancel."""
        return self.largest <= ROUNDING * self.epsilon * max(abs(self.loss), 1.0)


class Spectrum:
    """A report, its truth, and how far they may be apart."""

    def __init__(self, truth: Truth, report: hesd.Report, share: float) -> None:
        dtype = report.settings.basis_dtype
        basis = 0.0 if dtype is None else torch.finfo(getattr(torch, dtype)).eps
        coarse = basis if basis > truth.epsilon else 0.0
        self.tolerance = ROUNDING * truth.epsilon * (truth.largest + abs(truth.loss)) + (share + coarse) * truth.largest
        self.report, self.size = report, truth.size
        self.low, self.high, self.trace = truth.low, truth.high, truth.trace

    def check(self) -> None:
        """Assert what is certain: Ritz values lie within the spectrum."""
        report, tolerance = self.report, self.tolerance
        assert report.lambda_max.value <= self.high + tolerance
        assert report.lambda_min.value >= self.low - tolerance
        assert report.lambda_max.low <= self.high + tolerance
        assert report.lambda_min.high >= self.low - tolerance

    @property
    def is_held(self) -> bool:
        """Whether the intervals hold the truth, which is but likely."""
        report, tolerance = self.report, self.tolerance
        ends = report.lambda_max.high >= self.high - tolerance and report.lambda_min.low <= self.low + tolerance
        margin = self.size * tolerance
        return ends and report.trace.low - margin <= self.trace <= report.trace.high + margin

    @property
    def is_exhausted(self) -> bool:
        """Whether the Krylov space had room for all of the spectrum, orthogonally.

        A few signs may be an eigenvector themselves, so for a few parameters only as many probes count.
        """
        settings = self.report.settings
        has_room = settings.max_steps * settings.block_size >= self.size
        is_orthogonal = settings.reorthogonalization in ("full", "partial")
        return has_room and is_orthogonal and (self.size > 8 or settings.block_size == self.size)

    @property
    def is_found(self) -> bool:
        """Whether both ends of the spectrum were found to rounding."""
        return (
            abs(self.report.lambda_max.value - self.high) <= self.tolerance
            and abs(self.report.lambda_min.value - self.low) <= self.tolerance
        )


def compare_with_dense_hessian(problem: OddProblem, draw: Any) -> Spectrum | None:
    """Analyse a problem and assert all that is certain of the outcome; give the spectrum where there is one."""
    refused = expected_error(problem)
    size = max(sum(p.numel() * (1 + p.is_complex()) for p in problem.reference()[1].values()), 1)
    options = run_options(draw, size)
    if problem.is_float32 and "basis_dtype" in options:
        options["basis_dtype"] = draw(st.sampled_from(["auto", "float32", "bfloat16"]))
    hvp = draw(st.sampled_from(["auto", *EXACT]))
    if problem.is_smooth and not problem.warns and draw(st.integers(0, 5)) == 0:
        hvp = draw(st.sampled_from(DIFFERENCES))
    note(f"{problem.name}; {options}, hvp={hvp}")
    report, error, warned = outcome(
        problem, lambda: hesd.analyze(**problem.arguments, hvp=hvp, progress=False, **options)
    )
    event("refused" if error else "number")
    if refused:
        assert refused in str(error), error
        return None
    truth = Truth(problem, hessian_of(problem))
    note(f"{truth.low} {truth.high} {truth.trace} of loss {truth.loss}")
    if error is not None:
        strategy_is_named = hvp not in ("auto", "double_backward") and any(text in str(error) for text in REFUSALS)
        assert strategy_is_named or (truth.is_rounding and "use float64" in str(error)), error
        return None
    unexpected = [text for text in warned if not problem.warns or problem.warns not in text]
    if hvp in DIFFERENCES:  # their error is measured on one batch and along one direction
        unexpected = [text for text in unexpected if "the products are finite differences" not in text]
    assert not unexpected or truth.is_rounding, unexpected
    assert problem.terms is None or report.problem.terms == problem.terms
    assert report.problem.parameters == tuple(problem.selected)
    assert abs(report.problem.loss - truth.loss) <= ROUNDING * truth.epsilon * max(abs(truth.loss), 1.0)
    note(f"{report.lambda_min} {report.lambda_max} {report.trace}")
    spectrum = Spectrum(truth, report, LARGEST_DIFFERENCE if hvp in DIFFERENCES else 0.0)
    spectrum.check()
    return spectrum


def compare_with_dense_gauss_newton(problem: OddProblem, draw: Any) -> Spectrum | None:
    """The same for the Gauss-Newton matrix of a ready-made loss."""
    refused = expected_error(problem)
    size = max(sum(p.numel() * (1 + p.is_complex()) for p in problem.reference()[1].values()), 1)
    options = {**run_options(draw, size), "basis_dtype": "auto"} if draw(st.booleans()) else {"max_steps": size}
    note(f"{problem.name}; {options}")
    report, error, warned = outcome(
        problem, lambda: hesd.analyze(**problem.arguments, operator="gauss_newton", progress=False, **options)
    )
    if refused:
        assert refused in str(error), error
        return None
    model, parameters = problem.reference()
    truth = Truth(problem, dense_gauss_newton(model, problem.outputs, problem.of_outputs, parameters))
    note(f"{truth.low} {truth.high} {truth.trace} of loss {truth.loss}; {report and report.lambda_max}")
    if error is not None or warned:
        assert truth.is_rounding, error or warned
        return None
    assert problem.terms is None or report.problem.terms == problem.terms
    spectrum = Spectrum(truth, report, 0.0)
    spectrum.check()
    return spectrum


def compare_blocks_with_dense_hessian(problem: OddProblem, draw: Any) -> list[Spectrum]:
    """The same for the blocks of groups of parameters, all of the size that is spanned by the probes."""
    problem.parameters = None
    problem.model.requires_grad_(True)
    names = [name for name, p in problem.model.named_parameters() if p.numel()]
    wholes = draw(st.lists(st.lists(st.sampled_from(names), min_size=1, unique=True), min_size=1, max_size=3))
    groups = draw(st.sampled_from(["parameters", "modules", {f"group {i}": one for i, one in enumerate(wholes)}]))
    problem.selected = (
        names if isinstance(groups, str) else [name for name in names if any(name in one for one in wholes)]
    )
    refused = expected_error(problem)
    note(f"{problem.name}; {groups}")
    arguments = {name: value for name, value in problem.arguments.items() if name != "parameters"}
    steps = draw(st.integers(1, 60))
    reports, error, warned = outcome(
        problem,
        lambda: hesd.analyze_groups(**arguments, groups=groups, max_steps=steps, progress=False),
    )
    if refused or (isinstance(groups, str) and any(not p.numel() for p in problem.model.parameters())):
        assert error is not None
        return []
    matrix = hessian_of(problem)
    starts = offsets_of(problem)
    truths = {
        name: Truth(problem, matrix[rows][:, rows])
        for name, report in (reports or {}).items()
        if (rows := [i for parameter in report.problem.parameters for i in starts[parameter]])
    }
    if error is not None:
        assert "use float64" in str(error), error
        return []
    unexpected = [text for text in warned if not problem.warns or problem.warns not in text]
    assert not unexpected or any(truth.is_rounding for truth in truths.values()), unexpected
    spectra = [Spectrum(truths[name], report, 0.0) for name, report in reports.items()]
    for spectrum in spectra:
        spectrum.check()
    return spectra


def offsets_of(problem: OddProblem) -> dict[str, range]:
    """The rows of each selected parameter."""
    found, start = {}, 0
    for name, parameter in problem.reference()[1].items():
        width = parameter.numel() * (1 + parameter.is_complex())
        found[name] = range(start, start + width)
        start += width
    return found


@pytest.mark.parametrize(
    ("compare", "strategy"),
    [
        (compare_with_dense_hessian, problems()),
        (compare_with_dense_gauss_newton, problems(ready_made=True)),
        (compare_blocks_with_dense_hessian, problems()),
    ],
    ids=["hessian", "gauss-newton", "blocks"],
)
def test_problems_that_compose_have_the_spectra_of_their_dense_matrices(compare, strategy):
    spectra: list[Spectrum] = []

    @settings(max_examples=80, **SETTINGS)
    @given(problem=strategy, data=st.data())
    def check(problem: OddProblem, data: Any) -> None:
        found = compare(problem, data.draw)
        spectra.extend(found if isinstance(found, list) else [found] if found else [])

    check()
    exhausted = [spectrum for spectrum in spectra if spectrum.is_exhausted]
    assert len(spectra) > 40
    assert len(exhausted) > 6
    # An end of an interval is that of 97.5 of 100 probes, and a trace of two standard errors.
    assert sum(not spectrum.is_held for spectrum in spectra) <= 0.1 * len(spectra)
    assert sum(not spectrum.is_found for spectrum in exhausted) <= 0.02 * len(exhausted)


def expect_refusal(problem: OddProblem, fault: str) -> None:
    """Make a mistake in a problem, and assert that the error names it and says what to do."""
    note(f"{fault} in {problem.name}")
    change, message = FAULTS[fault]
    problem.parameters = None
    problem.model.requires_grad_(True)
    arguments = {**problem.arguments, **change(problem)}
    report, error, _ = outcome(problem, lambda: hesd.analyze(**arguments, progress=False))
    assert report is None
    assert re.search(message, str(error), re.DOTALL), error


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_in_a_problem_is_named_with_what_to_do(fault):
    @settings(max_examples=2, **SETTINGS)
    @given(problem=problems())
    def check(problem: OddProblem) -> None:
        expect_refusal(problem, fault)

    check()


@pytest.mark.parametrize("kind", [ArithmeticError, RuntimeError, KeyError, KeyboardInterrupt, MemoryError])
def test_what_the_users_code_raises_comes_out_as_it_is(kind):
    @settings(max_examples=8, **SETTINGS)
    @given(problem=problems(), at=st.integers(1, 9), hvp=st.sampled_from(["auto", *EXACT, *DIFFERENCES]))
    def check(problem: OddProblem, at: int, hvp: str) -> None:
        raise_at_a_call(problem, at, hvp, kind("mine"))

    check()


def raise_at_a_call(problem: OddProblem, at: int, hvp: str, error: BaseException) -> None:
    """Let the loss raise an error at one of its calls, and assert that this very error is what comes out."""
    note(f"call {at}, {hvp} of {problem.name}")
    problem.model.requires_grad_(True)
    problem.parameters = None
    calls: list[int] = []

    def loss(model: nn.Module, batch: Any) -> Any:
        calls.append(len(unpack(batch)[1]))
        if len(calls) == at:
            raise error
        return problem.loss(model, batch)

    arguments = {**problem.arguments, "loss": loss}
    before = snapshot(problem.model)
    caught = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            hesd.analyze(**arguments, hvp=hvp, max_steps=2, progress=False)
        except HESDError:
            assert len(calls) < at or hvp != "auto"
        except BaseException as raised:
            caught = raised
    assert caught is None or caught is error
    assert_same(before, snapshot(problem.model))
