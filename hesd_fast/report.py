"""The result of an analysis: print it, plot it, save it, load it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hesd_fast.criteria import Criteria
from hesd_fast.errors import CheckpointError, HESDError
from hesd_fast.estimate import Estimate
from hesd_fast.hesd_type import HESDType, TypeEvidence, TypeThresholds
from hesd_fast.spectrum import SpectralMeasure
from hesd_fast.tridiagonal import BlockTridiagonal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "hesd-fast report"
FORMAT_VERSION = 1


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
        Their names.
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
    fingerprint : str
        Digest of weights, selection, mode and data.
    function : str
        Which function of how many loss terms L is, in words; empty in reports of releases before it.
    """

    model: str
    size: int
    parameters: tuple[str, ...]
    mode: str
    precision: str
    loss: float
    parameter_norm_squared: float
    batches: int
    terms: float
    fingerprint: str
    function: str = ""


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
        from hesd_fast.plotting import plot_densities

        return plot_densities({self.problem.model: self}, path, sigma=sigma)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON; the file is replaced whole or not at all.

        Raises
        ------
        CheckpointError
            If the file cannot be written.
        """
        tridiagonal = self.measure.tridiagonal
        if tridiagonal is None:
            raise CheckpointError(
                "the report's measure has no block tridiagonal matrix; only reports of a run can be saved"
            )
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "hesd_type": self.hesd_type.name,
            "type_evidence": asdict(self.type_evidence),
            "criteria": asdict(self.criteria),
            "tridiagonal": tridiagonal.to_dict(),
            "problem": asdict(self.problem),
            "cost": asdict(self.cost),
            "checks": [asdict(check) for check in self.checks],
            "options": self.options,
            "versions": self.versions,
        }
        text = json.dumps(_finite(content), indent=1, allow_nan=False)
        try:
            _write_whole(Path(path), text)
        except OSError as error:
            raise CheckpointError(
                f"{os.fspath(path)!r} cannot be written: {error}; give a path in a writable folder"
            ) from error

    def __str__(self) -> str:
        problem, cost, found = self.problem, self.cost, self.criteria
        tridiagonal = self.measure.tridiagonal
        steps = "" if tridiagonal is None else f"{tridiagonal.probes} probes x {tridiagonal.steps} steps, "
        function = problem.function or f"of {problem.terms:,.0f} terms"
        rows: list[tuple[str, str]] = [
            ("loss", f"{function}; {problem.batches:,} {'batch' if problem.batches == 1 else 'batches'}"),
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
        return "\n".join([title, *[f"  {name:<12}{text}" for name, text in rows]])


def summary(reports: Mapping[str, Report]) -> str:
    """Return a table of several reports, one a row: size, type, extreme eigenvalues, trace and criteria.

    Each number with the interval that its report gives for it, as in ``print(report)``.
    """
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
    rows += [[name, *(str(value(report)) for value in columns.values())] for name, report in reports.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def load_report(path: str | os.PathLike[str]) -> Report:
    """Read a report that :meth:`Report.save` wrote.

    Raises
    ------
    CheckpointError
        If the file cannot be read, is not a report, or is of a newer format.
    """
    name = os.fspath(path)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name!r} cannot be read as a report: {error}; give a file that Report.save wrote"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{name!r} is not a report of hesd-fast; give a file that Report.save wrote")
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{name!r} has format version {content.get('format_version')!r}; this release reads version "
            f"{FORMAT_VERSION}. Read it with the release that wrote it, or run the analysis again"
        )
    try:
        evidence = content["type_evidence"]
        return Report(
            hesd_type=HESDType[content["hesd_type"]],
            type_evidence=TypeEvidence(
                **_estimates(evidence, TypeEvidence, {"thresholds": TypeThresholds(**evidence["thresholds"])}),
            ),
            criteria=Criteria(**_estimates(content["criteria"], Criteria, {})),
            measure=SpectralMeasure.from_tridiagonal(BlockTridiagonal.from_dict(content["tridiagonal"])),
            problem=ProblemFacts(**{**content["problem"], "parameters": tuple(content["problem"]["parameters"])}),
            cost=Cost(**content["cost"]),
            checks=tuple(Check(**check) for check in content["checks"]),
            options=content["options"],
            versions=content["versions"],
        )
    except (KeyError, TypeError, ValueError, HESDError) as error:
        raise CheckpointError(f"{name!r} is damaged: {error!r}; run the analysis again") from error


def _write_whole(target: Path, text: str) -> None:
    """Replace a file by a finished one, with the permissions that any new file gets; leave nothing after a failure."""
    temporary = target.parent / f"{uuid.uuid4().hex}.tmp"
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _finite(value: Any) -> Any:
    """Replace infinities and NaN, which JSON does not know, by their names; ``float`` reads them back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _estimates(entries: Mapping[str, Any], kind: type, known: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the dictionaries among the fields of a dataclass back into estimates, and names of numbers into numbers."""
    result: dict[str, Any] = dict(known)
    for field in fields(kind):
        if field.name in known:
            continue
        value = entries[field.name]
        if isinstance(value, Mapping):
            value = Estimate(float(value["value"]), float(value["low"]), float(value["high"]), value["method"])
        elif isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, str) and field.type == "float":
            value = float(value)
        result[field.name] = value
    return result
