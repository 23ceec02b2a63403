"""Curvature operators: symmetric matrices known by their products with panels."""

from hesd_fast.operators.base import CurvatureOperator, OperatorBase
from hesd_fast.operators.empirical_fisher import EmpiricalFisherOperator
from hesd_fast.operators.gauss_newton import GaussNewtonOperator
from hesd_fast.operators.hessian import HessianOperator
from hesd_fast.operators.hessian_blocks import GroupedHessianOperator
from hesd_fast.operators.matrix import MatrixOperator, as_operator

__all__ = [
    "CurvatureOperator",
    "EmpiricalFisherOperator",
    "GaussNewtonOperator",
    "GroupedHessianOperator",
    "HessianOperator",
    "MatrixOperator",
    "OperatorBase",
    "as_operator",
]
