"""The result of an analysis: print it, plot it, save it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hesd_fast.errors import CheckpointError, ProblemError
from hesd_fast.estimate import Estimate
from hesd_fast.lanczos.lanczos_run import LanczosRun
from hesd_fast.methodology.comparability import check_reports
from hesd_fast.methodology.generalization_criteria import Criteria
from hesd_fast.methodology.hesd_type import HESDType, TypeEvidence
from hesd_fast.operators.precision_check import ProductPrecision
from hesd_fast.report.density_plot import Scale, plot_densities
from hesd_fast.report.facts import Check, Cost, ProblemFacts, RunSettings
from hesd_fast.report.json_files import SavedReport, read_file, write_file
from hesd_fast.spectrum.outliers import Outliers
from hesd_fast.spectrum.spectral_measure import SpectralMeasure
from hesd_fast.terminal import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEAR_ZERO = 1e-3
"""Magnitude, relative to the largest, up to which an eigenvalue counts as near zero."""

OPERATOR_TITLES = {
    "hessian": "HESD",
    "gauss_newton": "Spectral density of the Gauss-Newton matrix",
    "empirical_fisher": "Spectral density of the empirical Fisher matrix",
}


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
    settings : RunSettings
        How the spectrum was computed.
    versions : dict
        The software that made it.
    precision : ProductPrecision or None
        How far products are from those in a wider precision, parameter by parameter; None where there is none to
        compare with, as for float64, or it was not to be had: then the check of precision says why.
    first_run : LanczosRun or None
        The first run with its vectors, if they were to be kept; what is loaded has none.

    Examples
    --------
    >>> import hesd_fast as hesd, torch
    >>> problem = hesd.Problem(torch.nn.Linear(2, 1), lambda m, b: m(b).square().mean(), torch.eye(2))
    >>> report = hesd.analyze(problem, progress=False)
    >>> print(report.lambda_max, report.trace)
    3 [3, 3] 4 [4, 4]
    >>> report.problem.size, report.cost.hvps, report.settings.operator
    (3, 3, 'hessian')
    """

    hesd_type: HESDType
    type_evidence: TypeEvidence
    criteria: Criteria
    measure: SpectralMeasure
    problem: ProblemFacts
    cost: Cost
    checks: tuple[Check, ...]
    settings: RunSettings
    versions: dict[str, str]
    precision: ProductPrecision | None = None
    first_run: LanczosRun | None = field(default=None, repr=False)

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
        """The matrix: "hessian", "gauss_newton" or "empirical_fisher"."""
        return self.settings.operator

    @property
    def group(self) -> str | None:
        """The group of parameters this is the block of; None where the run was not one of groups."""
        return self.settings.group

    @property
    def trace(self) -> Estimate:
        """The trace of the matrix."""
        return self.measure.trace

    @property
    def outliers(self) -> Outliers:
        """The eigenvalues that stand apart from the bulk, with their number; unknown where eigenvalues have copies."""
        return self.measure.outliers

    @property
    def share_near_zero(self) -> Estimate:
        """Share of the eigenvalues whose magnitude is at most a thousandth of the largest."""
        limit = NEAR_ZERO * self.measure.largest_magnitude
        return self.measure.share_between(-limit, limit)

    @property
    def frobenius_norm(self) -> Estimate:
        """The Frobenius norm of the matrix."""
        return self.measure.frobenius_norm

    def plot(
        self, path: str | os.PathLike[str] | None = None, *, scale: Scale = "symlog", sigma: float | None = None
    ) -> Figure:
        """Draw density, outliers and distribution function, and write them to a path if given; see `plot_densities`."""
        return plot_densities({self.problem.model: self}, path, scale=scale, sigma=sigma)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON; the file is replaced whole or not at all.

        Raises
        ------
        CheckpointError
            If the file cannot be written, or the report contradicts itself or holds what cannot be read back; the field
            is named.
        """
        write_file(self.to_saved(), path)

    def to_saved(self) -> SavedReport:
        """Return what a file holds of the report; a CheckpointError where its measure is not that of a run."""
        if not self.measure.runs:
            raise CheckpointError(
                "the report's measure has no block tridiagonal matrix; only reports of a run can be saved"
            )
        kept = {name: value for name, value in vars(self).items() if name not in ("measure", "settings", "first_run")}
        return SavedReport(tridiagonals=self.measure.tridiagonals, options=self.settings, **kept)

    def top(self, k: int, which: str = "largest") -> tuple[Estimate, ...]:
        """Return the ``k`` largest eigenvalues that the run has found, in descending order, or the smallest, ascending.

        They are Ritz values of the first run, ``which`` is "largest" or "smallest", and each interval certainly holds
        an eigenvalue; :meth:`BlockTridiagonal.top`, which this is, says what else is certain and what is not.

        Raises
        ------
        ProblemError
            As there, and if the measure is not that of a run.
        """
        if not self.measure.runs:
            raise ProblemError(
                "the report's measure has no block tridiagonal matrix, so nothing is known of single eigenvalues; "
                "give the report of a run"
            )
        return self.measure.tridiagonals[0].top(k, which)

    @property
    def run_length(self) -> str:
        """Probes and steps of each run, in words."""
        runs = [
            f"{_number_of(one.probes, 'probe')} x {_number_of(one.steps, 'step')}" for one in self.measure.tridiagonals
        ]
        return " and ".join(
            f"{runs.count(text)} times {text}" if runs.count(text) > 1 else text for text in dict.fromkeys(runs)
        )

    def __str__(self) -> str:
        problem, cost, found = self.problem, self.cost, self.criteria
        peak = cost.peak_bytes / 2**20
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
            ("norm", f"{self.frobenius_norm}   of Frobenius"),
            ("r_e", f"{found.r_e}"),
            ("K_Hn", f"{found.k_hn}   n = {found.exponent:g}; its interval is a spread, not a bound"),
            ("k_mass", f"{found.k_mass}"),
            ("balance", f"{found.balance}"),
            ("outliers", f"{self.outliers}"),
            ("near zero", f"{self.share_near_zero}   of the eigenvalues, below {NEAR_ZERO:g} of the largest"),
            ("cost", f"{self.run_length}, {cost.hvps} products in {cost.seconds:.1f} s, peak {peak:.0f} MiB"),
            *[("not yet", text) for text in cost.unmet],
            ("products", cost.strategy),
            *[("check", f"{'ok' if check.passed else 'FAILED'}: {check.detail}") for check in self.checks],
        ]
        group = f", group {self.group!r}" if self.group else ""
        title = (
            f"{OPERATOR_TITLES[self.operator]} of {problem.model}{group}: {problem.size:,} parameters, "
            f"loss {problem.loss:.4g}, mode {problem.mode}, {problem.precision}"
        )
        return "\n".join([printable(title), *[f"  {name:<12}{printable(text)}" for name, text in rows]])


def _number_of(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def summary(reports: Mapping[str, Report]) -> str:
    """Return a table of several reports, one a row: size, type, extreme eigenvalues, trace and criteria.

    Each number with the interval that its report gives for it, as in ``print(report)``.

    Raises
    ------
    ProblemError
        If something else than reports by name is given.

    Examples
    --------
    >>> import hesd_fast as hesd, torch
    >>> problem = hesd.Problem(torch.nn.Linear(2, 1), lambda m, b: m(b).square().mean(), torch.eye(2))
    >>> table = hesd.summary({"linear": hesd.analyze(problem, progress=False)})
    >>> print(*table.split()[:4])
    parameters type lambda_max lambda_min
    """
    check_reports(reports, "summary", Report)
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


def load_report(path: str | os.PathLike[str]) -> Report:
    """Read a report that :meth:`Report.save` wrote.

    What follows from the block tridiagonal matrix in the file, and from what was chosen (exponents, resolution,
    thresholds, the noise that the type was judged with), is computed again: criteria and extreme eigenvalues agree with
    it to four digits, or as far as rounding determines them; type and reason exactly with them. The report has the
    numbers of the file, bit for bit. Costs what :func:`~hesd_fast.criteria` does, 0.9 s for 4 probes of 100 steps and
    2 s for one of 300 (a core of a server; ``python -m timeit -n 1 -s "import hesd_fast as hesd"
    "hesd.load_report('report.hesd.json')"``), and about nine times that before a number is refused that is near to
    the right one, or taken that rounding does not determine. Time grows with the cube of the number of Ritz values
    where there are thousands, and memory with the square: files that ask for more than there is are refused.

    Parameters
    ----------
    path : str or path
        The file, of at most 1 GiB.

    Raises
    ------
    CheckpointError
        If the file cannot be read, is not a report, is of another format, or if a field is missing, unknown, of the
        wrong kind, out of range, or contradicts another; the field is named.

    Examples
    --------
    >>> import hesd_fast as hesd, tempfile, torch
    >>> problem = hesd.Problem(torch.nn.Linear(2, 1), lambda m, b: m(b).square().mean(), torch.eye(2))
    >>> report = hesd.analyze(problem, progress=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report.save(folder + "/report.hesd.json")
    ...     hesd.load_report(folder + "/report.hesd.json").criteria == report.criteria
    True
    """
    saved, measure = read_file(path)
    kept = {name: value for name, value in vars(saved).items() if name not in ("tridiagonals", "options")}
    return Report(measure=measure, settings=saved.options, **kept)
