"""Curvature operators: symmetric matrices known by their products with panels."""

from hesd_fast.operators.base import CurvatureOperator, OperatorBase
from hesd_fast.operators.hessian import HessianOperator
from hesd_fast.operators.matrix import MatrixOperator, as_operator

__all__ = ["CurvatureOperator", "HessianOperator", "MatrixOperator", "OperatorBase", "as_operator"]
