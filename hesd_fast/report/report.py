"""The result of an analysis: print it, plot it, save it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hesd_fast.errors import ProblemError
from hesd_fast.estimate import Estimate
from hesd_fast.methodology.generalization_criteria import Criteria
from hesd_fast.methodology.hesd_type import HESDType, TypeEvidence
from hesd_fast.spectrum.spectral_measure import SpectralMeasure
from hesd_fast.terminal import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPERATOR_TITLES = {
    "hessian": "HESD",
    "gauss_newton": "Spectral density of the Gauss-Newton matrix",
    "empirical_fisher": "Spectral density of the empirical Fisher matrix",
}


@dataclass(frozen=True)
class Cost:
    """What the run took.

    Attributes
    ----------
    hvps : int
        Products of block Lanczos.
    seconds : float
        Of the whole run.
    peak_bytes : int
        Peak memory of the process.
    strategy : str
        How products were made.
    plan : str
        What was tried to find that; empty where it was given.
    """

    hvps: int
    seconds: float
    peak_bytes: int
    strategy: str
    plan: str = ""


@dataclass(frozen=True)
class Check:
    """One thing that was verified on this run."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class ProblemFacts:
    """What was analysed.

    Attributes
    ----------
    model : str
        Class of the model.
    size : int
        Number of parameters n.
    parameters : tuple of str
        Names of the tensors that hold them.
    shapes : tuple of tuple of int
        Their shapes in real numbers; that of a complex one has a last dimension of 2.
    mode : str
        Module mode of the run.
    precision : str
        Element type of the panels.
    loss : float
        L at these parameters.
    parameter_norm_squared : float
        Squared Euclidean norm of the parameters.
    batches : int
        Number of batches.
    terms : float
        Number of loss terms.
    weights : str
        Digest of all parameters and buffers of the model, selected or not.
    fingerprint : str
        Digest of weights, selection, mode and data.
    function : str
        Which function of how many loss terms L is, in words.
    replaced_operations : tuple of str
        Operations of PyTorch that the run did in ordinary ones, as their own have no second derivative or a wrong one.
    """

    model: str
    size: int
    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    mode: str
    precision: str
    loss: float
    parameter_norm_squared: float
    batches: int
    terms: float
    weights: str
    fingerprint: str
    function: str
    replaced_operations: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Report:
    """A Hessian eigenvalue spectral density with its type, its criteria and how sure they are.

    Attributes
    ----------
    hesd_type : HESDType
        Mainly positive, mainly negative, quasi-singular or undetermined.
    type_evidence : TypeEvidence
        Why, and what would decide an undetermined type.
    criteria : Criteria
        r_e, K_Hn, k_mass and balance, each an :class:`~hesd_fast.Estimate`.
    measure : SpectralMeasure
        Nodes, weights, bounds of the distribution function, density.
    problem : ProblemFacts
        What was analysed.
    cost : Cost
        What it took.
    checks : tuple of Check
        What was verified on this run.
    options : dict
        The settings of the run.
    versions : dict
        The software that made it.
    """

    hesd_type: HESDType
    type_evidence: TypeEvidence
    criteria: Criteria
    measure: SpectralMeasure
    problem: ProblemFacts
    cost: Cost
    checks: tuple[Check, ...]
    options: dict[str, Any]
    versions: dict[str, str]

    @property
    def lambda_max(self) -> Estimate:
        """The largest eigenvalue."""
        return self.measure.lambda_max

    @property
    def lambda_min(self) -> Estimate:
        """The smallest eigenvalue."""
        return self.measure.lambda_min

    @property
    def operator(self) -> str:
        """Whose spectrum this is: "hessian", "gauss_newton" or "empirical_fisher"."""
        return str(self.options.get("operator", "hessian"))

    @property
    def group(self) -> str | None:
        """The group of parameters this is the block of; None where the run was not one of groups."""
        return self.options.get("group")

    @property
    def trace(self) -> Estimate:
        """The trace of the matrix."""
        return self.measure.trace

    def plot(self, path: str | os.PathLike[str] | None = None, *, sigma: float | None = None) -> Figure:
        """Draw the density on a logarithmic scale and, if a path is given, write it there.

        Parameters
        ----------
        path : path, optional
            File to write; its ending chooses the format (png, pdf, svg).
        sigma : float, optional
            Standard deviation of the smoothing Gaussian, in eigenvalue units; 1 % of the spectral range by default.

        Returns
        -------
        matplotlib.figure.Figure
            The figure.
        """
        from hesd_fast.report.density_plot import plot_densities

        return plot_densities({self.problem.model: self}, path, sigma=sigma)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON; the file is replaced whole or not at all.

        Raises
        ------
        CheckpointError
            If the file cannot be written, or the report contradicts itself or holds what cannot be read back; the field
            is named.
        """
        from hesd_fast.report.json_files import write_report

        write_report(self, path)

    def top(self, k: int, which: str = "largest") -> tuple[Estimate, ...]:
        """Return the ``k`` largest eigenvalues that the run has found, in descending order, or the smallest, ascending.

        They are Ritz values. Each interval certainly holds an eigenvalue; the i-th largest eigenvalue is not below the
        i-th value less the noise. Eigenvalues that the probes have missed may lie between, and one of higher
        multiplicity than there are probes shows too seldom; see :meth:`BlockTridiagonal.top`, which this is.

        Parameters
        ----------
        k : int
            How many, at most the number of Ritz values.
        which : {"largest", "smallest"}
            From which end of the spectrum.

        Raises
        ------
        ProblemError
            If ``k`` or ``which`` is not one of these, the run kept no orthogonal basis, or the measure is not that of a
            run.
        """
        tridiagonal = self.measure.tridiagonal
        if tridiagonal is None:
            raise ProblemError(
                "the report's measure has no block tridiagonal matrix, so nothing is known of single eigenvalues; "
                "give the report of a run"
            )
        return tridiagonal.top(k, which)

    def __str__(self) -> str:
        problem, cost, found = self.problem, self.cost, self.criteria
        tridiagonal = self.measure.tridiagonal
        steps = "" if tridiagonal is None else f"{tridiagonal.probes} probes x {tridiagonal.steps} steps, "
        rows: list[tuple[str, str]] = [
            ("loss", f"{problem.function}; {problem.batches:,} {'batch' if problem.batches == 1 else 'batches'}"),
            *[
                ("replaced", f"{name}, by ordinary operations of the same value")
                for name in problem.replaced_operations
            ],
            ("type", f"{self.hesd_type} ({self.hesd_type.name})"),
            ("  because", self.type_evidence.reason),
            *[("  to decide", text) for text in self.type_evidence.advice],
            ("lambda_max", f"{self.lambda_max}"),
            ("lambda_min", f"{self.lambda_min}"),
            ("trace", f"{self.trace}"),
            ("r_e", f"{found.r_e}"),
            ("K_Hn", f"{found.k_hn}   n = {found.exponent:g}; its interval is a spread, not a bound"),
            ("k_mass", f"{found.k_mass}"),
            ("balance", f"{found.balance}"),
            ("cost", f"{steps}{cost.hvps} products in {cost.seconds:.1f} s, peak {cost.peak_bytes / 2**20:.0f} MiB"),
            ("products", cost.strategy),
            *[("check", f"{'ok' if check.passed else 'FAILED'}: {check.detail}") for check in self.checks],
        ]
        group = f", group {self.group!r}" if self.group else ""
        title = (
            f"{OPERATOR_TITLES[self.operator]} of {problem.model}{group}: {problem.size:,} parameters, "
            f"loss {problem.loss:.4g}, mode {problem.mode}, {problem.precision}"
        )
        return "\n".join([printable(title), *[f"  {name:<12}{printable(text)}" for name, text in rows]])


def summary(reports: Mapping[str, Report]) -> str:
    """Return a table of several reports, one a row: size, type, extreme eigenvalues, trace and criteria.

    Each number with the interval that its report gives for it, as in ``print(report)``.

    Raises
    ------
    ProblemError
        If something else than reports by name is given.
    """
    check_reports(reports, "summary")
    columns: dict[str, Callable[[Report], Any]] = {
        "parameters": lambda report: f"{report.problem.size:,}",
        "type": lambda report: report.hesd_type.name,
        "lambda_max": lambda report: report.lambda_max,
        "lambda_min": lambda report: report.lambda_min,
        "trace": lambda report: report.trace,
        "r_e": lambda report: report.criteria.r_e,
        "K_Hn": lambda report: report.criteria.k_hn,
    }
    rows = [["", *columns]]
    rows += [[printable(name), *(str(value(report)) for value in columns.values())] for name, report in reports.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def check_reports(reports: Any, function: str) -> None:
    """Raise a ProblemError unless reports by name were given to the function of that name."""
    if not isinstance(reports, Mapping):
        raise ProblemError(
            f"{function} got a {type(reports).__name__}; give reports by name, as in {{'train': report}}"
        )
    for name, report in reports.items():
        if not isinstance(report, Report):
            raise ProblemError(
                f"{function} got a {type(report).__name__} under {name!r}; give a Report, "
                "as analyze and load_report return"
            )
