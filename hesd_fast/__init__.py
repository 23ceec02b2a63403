"""Hessian eigenvalue spectral densities of PyTorch models.

``analyze(model, loss, data)`` gives the density with its type, the generalization criteria and how sure each number is.
"""

from __future__ import annotations

from typing import Any

import torch as _torch  # before the extension, which shares its OpenMP runtime

from hesd_fast import _engine, errors, kernels, losses
from hesd_fast.analyze import analyze
from hesd_fast.assessment import Assessment, Verdict, compare
from hesd_fast.criteria import Criteria, criteria
from hesd_fast.errors import (
    CheckpointError,
    EngineError,
    HESDError,
    HESDWarning,
    NumericalError,
    OperatorError,
    PlanError,
    ProblemError,
)
from hesd_fast.estimate import Estimate
from hesd_fast.groups import analyze_groups
from hesd_fast.hesd_type import HESDType, TypeEvidence, TypeThresholds, classify
from hesd_fast.lanczos import LanczosProgress, block_lanczos
from hesd_fast.operators import (
    CurvatureOperator,
    EmpiricalFisherOperator,
    GaussNewtonOperator,
    GroupedHessianOperator,
    HessianOperator,
    MatrixOperator,
)
from hesd_fast.plan import RunPlan, plan
from hesd_fast.plotting import plot_densities
from hesd_fast.problem import Problem
from hesd_fast.report import Report, summary
from hesd_fast.report_file import load_report
from hesd_fast.spectrum import SpectralMeasure
from hesd_fast.tridiagonal import BlockTridiagonal

__version__: str = _engine.build_info()["version"]


def build_info() -> dict[str, Any]:
    """Return what this build holds: version, compiler, instruction sets, threads, CUDA, and the PyTorch beside it."""
    return {**_engine.build_info(), "torch": _torch.__version__}


__all__ = [
    "Assessment",
    "BlockTridiagonal",
    "CheckpointError",
    "Criteria",
    "CurvatureOperator",
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
    "SpectralMeasure",
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
    "errors",
    "kernels",
    "load_report",
    "losses",
    "plan",
    "plot_densities",
    "summary",
]
