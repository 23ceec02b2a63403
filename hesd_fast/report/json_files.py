"""Reports as files: written whole or not at all, and read only if nothing in them contradicts the rest."""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from hesd_fast.choices import OPERATORS, REORTHOGONALIZATIONS
from hesd_fast.engine.memory import available_memory
from hesd_fast.errors import CheckpointError, HESDError
from hesd_fast.estimate import Estimate
from hesd_fast.lanczos.block_tridiagonal import BlockTridiagonal, check_symmetric
from hesd_fast.lanczos.options import PROTOCOLS
from hesd_fast.methodology.generalization_criteria import Criteria, criteria
from hesd_fast.methodology.hesd_type import HESDType, TypeEvidence, decide_type
from hesd_fast.operators.precision_check import ProductPrecision
from hesd_fast.problem.problem import MODES
from hesd_fast.records import read_record, shown
from hesd_fast.report.facts import Check, Cost, ProblemFacts, RunSettings
from hesd_fast.spectrum.spectral_measure import SpectralMeasure

FORMAT = "hesd-fast report"
FORMAT_VERSION = 3

LARGEST_FILE = 2**30
"""Bytes of the largest file that is read; a report of 128 probes and 1000 steps is smaller."""

DIGITS = 1e-4
"""How far a number may be from what the matrix of the file gives, relative to either: four digits are printed."""

ROUNDING = 1e-10
"""The same of an eigenvalue next to zero, relative to the largest one. Eigensolvers err by some thousand roundoffs."""

SHARE = 1e-5
"""The same of a criterion ``c`` next to zero or infinite, as the share ``c / (1 + c)``. ``K_Hn`` counts the square root
of an eigenvalue of either sign that is nothing but rounding."""

SOLVER_ERROR = 2.0**-50
"""How far another eigensolver may be from this one, as a change of each entry of the matrix, relative to the largest
eigenvalue."""

SPREAD_SAMPLES = 8
"""Matrices that are the same but for rounding, to see what it leaves undetermined."""

GROSS = 0.1
"""The difference, as :data:`SHARE` is one or relative to the largest eigenvalue, from which it cannot be rounding."""

WORKING_MATRICES = 10
"""The memory that spectrum and criteria take, in matrices of all Ritz values; seen for one probe of 1000 steps."""

SET_BY_PROTOCOLS = ("block_size", "max_steps", "reorthogonalization")
CRITERIA = tuple(one.name for one in fields(Criteria) if one.type == "Estimate")


@dataclass(frozen=True, eq=False)
class SavedReport:
    """All that a file holds, but for the name and the version of its format."""

    hesd_type: HESDType
    type_evidence: TypeEvidence
    criteria: Criteria
    tridiagonals: tuple[BlockTridiagonal, ...]
    problem: ProblemFacts
    cost: Cost
    checks: tuple[Check, ...]
    options: RunSettings
    versions: dict[str, str]
    precision: ProductPrecision | None

    def to_dict(self) -> dict[str, Any]:
        """Return the same as values of JSON; numbers come back bit for bit."""
        matrices = [matrix.to_dict() for matrix in self.tridiagonals]
        content = {**asdict(self), "hesd_type": self.hesd_type.name, "tridiagonals": matrices}
        if self.options.group is None:
            del content["options"]["group"]
        return {name: _plain(value) for name, value in content.items()}


def write_file(report: SavedReport, path: str | os.PathLike[str]) -> None:
    """Write a report as JSON, whole or not at all; a CheckpointError if it cannot be, or could not be read back."""
    target, content = _path(path), report.to_dict()
    try:
        _check_content(read_record(SavedReport, content))
    except CheckpointError as error:
        raise CheckpointError(f"the report cannot be saved, as it could not be read back: {error}") from error
    header = {"format": FORMAT, "format_version": FORMAT_VERSION}
    try:
        _write_whole(target, json.dumps({**header, **content}, indent=1, allow_nan=False))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(target)!r} cannot be written: {error}; give a path in a writable folder"
        ) from error


def read_file(path: str | os.PathLike[str]) -> tuple[SavedReport, SpectralMeasure]:
    """Return what a file holds and the measure of its matrix; a CheckpointError unless all of it is right."""
    source = _path(path)
    name = repr(str(source))
    content = _read_json(source)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{name} is not a report of hesd-fast; give a file that Report.save wrote")
    version = content.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{name} has format version {shown(version)}; this release reads version "
            f"{FORMAT_VERSION}. Read it with the release that wrote it, or run the analysis again"
        )
    entries = {key: value for key, value in content.items() if key not in ("format", "format_version")}
    try:
        report = read_record(SavedReport, entries)
        for i, (matrix, written) in enumerate(zip(report.tridiagonals, entries["tridiagonals"], strict=True)):
            check_symmetric(matrix, written["diagonal"], f"tridiagonals[{i}].diagonal")
        _check_content(report)
        _check_memory(report.tridiagonals)
        return report, _checked_measure(report)
    except CheckpointError as error:
        raise CheckpointError(f"{name} is damaged: {error}; run the analysis again") from error
    except MemoryError as error:
        raise CheckpointError(
            f"{name} takes more memory to be read than there is: {error}; free some, or read it on another machine"
        ) from error


def _check_memory(matrices: Sequence[BlockTridiagonal]) -> None:
    """Raise a MemoryError before a small file with many steps takes all the memory."""
    vectors, free = max(sum(matrix.block_sizes) for matrix in matrices), available_memory()
    wanted = WORKING_MATRICES * 8 * vectors**2
    if free is not None and wanted > free:
        raise MemoryError(
            f"{vectors:,} Ritz values take about {wanted / 2**30:.3g} GiB, {free / 2**30:.3g} GiB are free"
        )


def _check_content(content: SavedReport) -> None:
    """Raise a CheckpointError for the first contradiction that shows without computing the spectrum."""
    for sources in (_wrong_facts, _wrong_matrices, _wrong_precision, _wrong_settings, _wrong_type):
        for text in sources(content):
            raise CheckpointError(text)


def _wrong_facts(content: SavedReport) -> Iterator[str]:
    facts, cost, matrices = content.problem, content.cost, content.tridiagonals
    for name, value, least in (
        ("problem.size", facts.size, 1),
        ("problem.batches", facts.batches, 1),
        ("problem.parameter_norm_squared", facts.parameter_norm_squared, 0),
        ("cost.hvps", cost.hvps, 1),
        ("cost.seconds", cost.seconds, 0),
        ("cost.peak_bytes", cost.peak_bytes, 0),
    ):
        if value < least:
            yield f"{name} is {value}; wanted at least {least}"
    if facts.size >= 2**63:
        yield f"problem.size is {facts.size}; wanted less than 2**63"
    if not facts.terms > 0.0:
        yield f"problem.terms is {facts.terms}; wanted a positive number"
    if facts.mode not in MODES:
        yield f"problem.mode is {shown(facts.mode)}; wanted one of {', '.join(MODES)}"
    if facts.precision not in ("float32", "float64"):
        yield f"problem.precision is {shown(facts.precision)}; wanted float32 or float64"
    if len(set(facts.parameters)) < len(facts.parameters):
        yield "problem.parameters names a parameter twice"
    if len(facts.shapes) != len(facts.parameters):
        yield f"problem.shapes has {len(facts.shapes)} shapes and problem.parameters {len(facts.parameters)} names"
    for i, shape in enumerate(facts.shapes):
        if any(length < 0 for length in shape):
            yield f"problem.shapes[{i}] has a negative length"
    elements = sum(map(_elements, facts.shapes))
    if elements != facts.size:
        held = f"{elements}" if elements < 2**63 else "2**63 or more"
        yield f"problem.shapes holds {held} numbers and problem.size is {facts.size}"
    for i, matrix in enumerate(matrices):
        if matrix.size != facts.size:
            yield f"tridiagonals[{i}].size is {matrix.size} and problem.size is {facts.size}"
    products = sum(matrix.products for matrix in matrices)
    if cost.hvps < products or (cost.hvps > products and not matrices[0].knows_all):
        yield f"cost.hvps is {cost.hvps} and tridiagonals have {products} products"


def _elements(shape: tuple[int, ...]) -> int:
    """Return the product of lengths, or 2**63 if it is larger, as no size is: that of many lengths would take hours."""
    product = 0 if 0 in shape else 1
    for length in shape:
        product = min(product * length, 2**63)
    return product


def _wrong_matrices(content: SavedReport) -> Iterator[str]:
    if not content.tridiagonals:
        yield "tridiagonals is empty; wanted the matrix of each run"
    for i, matrix in enumerate(content.tridiagonals):
        where, vectors = f"tridiagonals[{i}]", sum(matrix.block_sizes)
        if matrix.products < vectors:
            yield f"{where}.products is {matrix.products}; its blocks have {vectors} vectors, each multiplied"
        if matrix.reorthogonalization not in REORTHOGONALIZATIONS:
            wanted = ", ".join(REORTHOGONALIZATIONS)
            yield f"{where}.reorthogonalization is {shown(matrix.reorthogonalization)}; wanted one of {wanted}"


def _wrong_precision(content: SavedReport) -> Iterator[str]:
    found = content.precision
    error = None if found is None else found.error
    for i, matrix in enumerate(content.tridiagonals):
        if error != matrix.product_error:
            yield f"precision.error is {error}, and that of tridiagonals[{i}] {matrix.product_error}"
    if found is None:
        return
    facts = content.problem
    if found.reference not in ("float64", "float32"):
        yield f"precision.reference is {shown(found.reference)}; wanted float64 or float32"
    if found.vectors < 1:
        yield f"precision.vectors is {found.vectors}; wanted at least 1"
    if not 1 <= found.batches <= facts.batches:
        yield f"precision.batches is {found.batches}; wanted 1 to {facts.batches}"
    if found.relative_error < 0.0:
        yield f"precision.relative_error is {found.relative_error}; wanted at least 0"
    if not _is_cosine(found.cosine):
        yield f"precision.cosine is {found.cosine}; wanted a number from -1 to 1"
    for name, numbers in (("cosines", found.cosines), ("relative_errors", found.relative_errors)):
        if len(numbers) != len(facts.parameters):
            wanted = len(facts.parameters)
            yield f"precision.{name} has {len(numbers)} numbers; wanted {wanted}, one for each parameter"
    for number in found.cosines:
        if not _is_cosine(number):
            yield f"precision.cosines holds {number}; wanted numbers from -1 to 1"
    for number in found.relative_errors:
        if number < 0.0:
            yield f"precision.relative_errors holds {number}; wanted numbers from 0 on"
    if found.worst not in facts.parameters:
        yield f"precision.worst is {shown(found.worst)}, which is none of the parameters"


def _is_cosine(number: float) -> bool:
    return abs(number) <= 1.0 + ROUNDING


def _wrong_settings(content: SavedReport) -> Iterator[str]:
    options = content.options
    if options.operator not in OPERATORS:
        yield f"options.operator is {shown(options.operator)}; wanted one of {', '.join(OPERATORS)}"
    for i, matrix in enumerate(content.tridiagonals):
        for name, option, found in (
            ("block_size", options.block_size, matrix.probes if i == 0 else options.block_size),
            ("reorthogonalization", options.reorthogonalization, matrix.reorthogonalization),
            ("basis", options.basis, matrix.basis_place if i == 0 else options.basis),
            ("basis_dtype", options.basis_dtype, matrix.basis_dtype if i == 0 else options.basis_dtype),
        ):
            if option != found:
                yield f"options.{name} is {shown(option)}, and of tridiagonals[{i}] it is {shown(found)}"
    vectors = sum(sum(matrix.block_sizes) for matrix in content.tridiagonals)
    if vectors > options.max_steps * options.block_size:
        most = f"{options.max_steps} and options.block_size {options.block_size}"
        yield f"options.max_steps is {most}, and tridiagonals have {vectors} vectors"
    wanted, first = min(options.max_steps, content.problem.size), content.tridiagonals[0]
    if options.tolerance is None and len(content.tridiagonals) == 1 and first.steps < wanted and not first.breakdown:
        yield f"options.max_steps is {options.max_steps}, and tridiagonals[0] has {first.steps} steps"
    if options.seed < 0:
        yield f"options.seed is {options.seed}; wanted at least 0"
    if options.protocol is None:
        return
    protocol = PROTOCOLS.get(options.protocol)
    if protocol is None:
        yield f"options.protocol is {shown(options.protocol)}; wanted null or one of {', '.join(PROTOCOLS)}"
    elif any(getattr(protocol, name) != getattr(options, name) for name in SET_BY_PROTOCOLS):
        yield f"options.protocol is {options.protocol!r}, which has other settings than block_size, max_steps and so on"


def _wrong_type(content: SavedReport) -> Iterator[str]:
    evidence, facts = content.type_evidence, content.problem
    try:
        hesd_type, derived = decide_type(
            evidence.lambda_max,
            evidence.lambda_min,
            content.criteria,
            (facts.loss, facts.parameter_norm_squared),
            evidence.noise,
            evidence.thresholds,
        )
    except (HESDError, ValueError) as error:
        yield f"type_evidence: {error}"
        return
    if evidence.noise < 0.0:
        yield f"type_evidence.noise is {evidence.noise}; wanted at least 0"
    if content.hesd_type is not hesd_type:
        yield f"hesd_type is {content.hesd_type.name}; type_evidence, criteria and problem make it {hesd_type.name}"
    for one in fields(TypeEvidence):
        given = getattr(evidence, one.name)
        if given != getattr(derived, one.name):
            wanted = shown(getattr(derived, one.name))
            yield f"type_evidence.{one.name} is {shown(given)}; its numbers, criteria and problem give {wanted}"


def _checked_measure(content: SavedReport) -> SpectralMeasure:
    """Return the measure of the file's matrices; a CheckpointError if criteria or extreme eigenvalues are others.

    Some numbers are not determined to any digit: the weights of copies, or of one multiple eigenvalue, are shared out
    by rounding, and K_Hn with them. So where the first comparison fails, and not by far, the spread over matrices that
    are the same but for rounding decides.
    """
    measure, found = _computed(content, content.tridiagonals)
    mismatch = next(_mismatches(content, measure, [found]), None)
    if mismatch is not None and any(_mismatches(content, measure, [found], least=GROSS)):
        raise CheckpointError(mismatch)
    if mismatch is not None:
        rng = np.random.default_rng(0)
        alike = [found]
        for _ in range(SPREAD_SAMPLES):
            matrices = [_rounded(matrix, measure.largest_magnitude, rng) for matrix in content.tridiagonals]
            alike.append(_computed(content, matrices)[1])
        if next(_mismatches(content, measure, alike), None) is not None:
            raise CheckpointError(mismatch)
    return measure


def _computed(
    content: SavedReport, matrices: Sequence[BlockTridiagonal]
) -> tuple[SpectralMeasure, dict[str, Estimate | float]]:
    """Return the measure of the runs' matrices and, by name, what files hold of what follows from it."""
    given = content.criteria
    try:
        with np.errstate(all="ignore"):
            measure = SpectralMeasure.from_tridiagonal(*matrices)
            found = criteria(measure, given.exponent, given.mass_exponent, given.resolution)
            extremes = {f"type_evidence.{name}": getattr(measure, name) for name in ("lambda_max", "lambda_min")}
    except (HESDError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"no spectrum can be computed from tridiagonals and criteria: {error}") from error
    return measure, {**extremes, **{f"criteria.{name}": getattr(found, name) for name in ("resolution", *CRITERIA)}}


def _rounded(matrix: BlockTridiagonal, scale: float, rng: np.random.Generator) -> BlockTridiagonal:
    """Return a matrix that another eigensolver could have taken this one for."""
    diagonal = tuple(a + scale * SOLVER_ERROR * rng.standard_normal(a.shape) for a in matrix.diagonal)
    return replace(
        matrix,
        diagonal=tuple((a + a.T) / 2 for a in diagonal),
        offdiagonal=tuple(c + scale * SOLVER_ERROR * rng.standard_normal(c.shape) for c in matrix.offdiagonal),
    )


def _mismatches(
    content: SavedReport, measure: SpectralMeasure, alike: list[dict[str, Estimate | float]], least: float = 0.0
) -> Iterator[str]:
    """Yield what is wrong with numbers of the file that are none of what was computed, nor between, nor near.

    With ``least``, numbers only that are as far off, and none of K_Hn, which rounding may change by any amount.
    """
    for name in alike[0]:
        record, _, field = name.partition(".")
        given = getattr(getattr(content, record), field)
        found = [one[name] for one in alike]
        if least and name == "criteria.k_hn":
            continue
        of_spectrum = record == "type_evidence" or field == "resolution"
        scale, floor = (measure.largest_magnitude or 1.0, ROUNDING) if of_spectrum else (1.0, SHARE)
        floor = max(floor, least)
        if not isinstance(given, Estimate):
            yield from _mismatch(name, given, found, scale, floor)
            continue
        for part in ("value", "low", "high"):
            yield from _mismatch(
                f"{name}.{part}", getattr(given, part), [getattr(one, part) for one in found], scale, floor
            )
        methods = [one.method for one in found if isinstance(one, Estimate)]
        if given.method not in methods and not least:
            yield f"{name}.method is {shown(given.method)}; the tridiagonal matrices give {methods[0]!r}"


def _mismatch(name: str, given: float, found: list[Any], scale: float, floor: float) -> Iterator[str]:
    """Yield the mismatch of one number, unless it is in the range of those found, widened by as much on both sides."""
    found = [float(one) for one in found]
    shares = [_share(one / scale) for one in found]
    low, high = min(shares), max(shares)
    own, margin = _share(given / scale), high - low + floor
    near = any(abs(given - one) <= DIGITS * min(abs(given), abs(one)) for one in found)
    if not (near or low - margin <= own <= high + margin):
        yield f"{name} is {given!r}; the tridiagonal matrices give {found[0]!r}"


def _share(number: float) -> float:
    return math.copysign(1.0, number) if math.isinf(number) else number / (1.0 + abs(number))


def _path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise CheckpointError(f"the path of a report is {shown(path)}; give a text or a pathlib.Path")
    return Path(path)


def _read_json(source: Path) -> Any:
    try:
        with source.open("rb") as file:
            if os.fstat(file.fileno()).st_size > LARGEST_FILE or len(raw := file.read(LARGEST_FILE + 1)) > LARGEST_FILE:
                raise ValueError(f"it has more than {LARGEST_FILE} bytes")
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_named_once, parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(
            f"{str(source)!r} cannot be read as a report: {error}; give a file that Report.save wrote"
        ) from error


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f"it has the field {shown(name)} twice")
        entries[name] = value
    return entries


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it has the number {name}, which JSON does not know")


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


def _plain(value: Any) -> Any:
    """Return what JSON can hold: infinities and NaN, which it does not know, by their names, and tuples as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
