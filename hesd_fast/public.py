"""Every public name of the package, which hands them on when it is first asked for one."""

from __future__ import annotations

from typing import Any

import torch

from hesd_fast import errors
from hesd_fast.analysis.group_spectra import analyze_groups
from hesd_fast.analysis.run_plan import RunPlan, plan
from hesd_fast.analysis.whole_spectrum import analyze
from hesd_fast.engine import _engine, kernels
from hesd_fast.errors import (
    CheckpointError,
    EngineError,
    HESDError,
    HESDWarning,
    NumericalError,
    OperatorError,
    PlanError,
    ProblemError,
    ToleranceWarning,
)
from hesd_fast.estimate import Estimate
from hesd_fast.estimators.diagonal_estimation import DiagonalEstimate, diagonal
from hesd_fast.estimators.eigenpairs import EigenResult, load_eigenpairs
from hesd_fast.estimators.eigenpairs_solver import eigsh
from hesd_fast.estimators.sampled_estimate import SampledEstimate
from hesd_fast.estimators.trace_estimation import frobenius_norm, trace
from hesd_fast.lanczos.block_tridiagonal import BlockTridiagonal
from hesd_fast.lanczos.drive import LanczosProgress, block_lanczos
from hesd_fast.methodology.assessment import Assessment, Verdict, compare
from hesd_fast.methodology.generalization_criteria import Criteria, criteria
from hesd_fast.methodology.hesd_type import HESDType, TypeEvidence, TypeThresholds, classify
from hesd_fast.operators import (
    CurvatureOperator,
    EmpiricalFisherOperator,
    GaussNewtonOperator,
    GroupedHessianOperator,
    HessianOperator,
    MatrixOperator,
)
from hesd_fast.problem import losses
from hesd_fast.problem.problem import Problem
from hesd_fast.report.density_plot import plot_densities
from hesd_fast.report.report import Report, load_report, summary
from hesd_fast.spectrum.spectral_measure import SpectralMeasure


def build_info() -> dict[str, Any]:
    """Return what this build holds: version, compiler, instruction sets, threads, CUDA, and the PyTorch beside it.

    Examples
    --------
    >>> import hesd_fast as hesd
    >>> hesd.build_info()["version"] == hesd.__version__
    True
    """
    return {**_engine.build_info(), "torch": torch.__version__}


__all__ = [
    "Assessment",
    "BlockTridiagonal",
    "CheckpointError",
    "Criteria",
    "CurvatureOperator",
    "DiagonalEstimate",
    "EigenResult",
    "EmpiricalFisherOperator",
    "EngineError",
    "Estimate",
    "GaussNewtonOperator",
    "GroupedHessianOperator",
    "HESDError",
    "HESDType",
    "HESDWarning",
    "HessianOperator",
    "LanczosProgress",
    "MatrixOperator",
    "NumericalError",
    "OperatorError",
    "PlanError",
    "Problem",
    "ProblemError",
    "Report",
    "RunPlan",
    "SampledEstimate",
    "SpectralMeasure",
    "ToleranceWarning",
    "TypeEvidence",
    "TypeThresholds",
    "Verdict",
    "analyze",
    "analyze_groups",
    "block_lanczos",
    "build_info",
    "classify",
    "compare",
    "criteria",
    "diagonal",
    "eigsh",
    "errors",
    "frobenius_norm",
    "kernels",
    "load_eigenpairs",
    "load_report",
    "losses",
    "plan",
    "plot_densities",
    "summary",
    "trace",
]
