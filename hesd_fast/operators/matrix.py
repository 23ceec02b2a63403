"""A matrix the user brings, as a curvature operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from hesd_fast.engine import cuda
from hesd_fast.errors import OperatorError
from hesd_fast.operators.base import WRAPPED, CurvatureOperator, OperatorBase
from hesd_fast.problem.parameters import norm_of

ASYMMETRY = 256.0
"""Difference of u.Av and v.Au that is rounding, in machine epsilons of |u| |Av|."""

_NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


class MatrixOperator(OperatorBase):
    """A symmetric matrix given as a torch tensor, a NumPy array, a SciPy sparse matrix or a linear operator.

    A linear operator is a SciPy ``LinearOperator``, or one that multiplies torch tensors (n, b) by ``@`` and has
    ``shape``, ``dtype`` and ``device``, as those of curvlinops and linear_operator. A float32 or half-precision matrix
    is multiplied in float32, any other in float64. What is not of torch is on the CPU.

    A linear operator may say float64 and compute in float32. Its two products show that; ``epsilon`` then is that of
    float32, and what is known of its spectrum that much less.

    Parameters
    ----------
    matrix : (n, n)
        Must be finite, and symmetric to 64 n times machine epsilon times its largest element. A linear operator is
        checked with two products.

    Attributes
    ----------
    epsilon : float
        Machine epsilon of the coarsest arithmetic that the products work in.

    Raises
    ------
    OperatorError
        If the matrix is not square, real, finite and symmetric.

    Examples
    --------
    >>> import torch
    >>> import hesd_fast as hesd
    >>> operator = hesd.MatrixOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> operator.matvec(torch.tensor([1.0, 3.0])), operator.products
    (tensor([5., 7.]), 1)
    """

    epsilon = 0.0

    def __init__(self, matrix: Any) -> None:
        _check_square(matrix)
        if isinstance(matrix, Tensor):
            dtype = _panel_dtype(matrix.dtype.itemsize, matrix.is_floating_point(), matrix.is_complex())
            super().__init__(matrix.shape[0], dtype, matrix.device)
            self._matrix: Any = matrix.detach().to(dtype)
            _check_symmetric(self._matrix, float((self._matrix - self._matrix.T).abs().max()))
            return
        if is_torch_operator(matrix):
            dtype = _panel_dtype(matrix.dtype.itemsize, matrix.dtype.is_floating_point, matrix.dtype.is_complex)
            super().__init__(matrix.shape[0], dtype, cuda.runtime.with_number(torch.device(matrix.device)))
            self._matrix = matrix
            self._check_linear_operator()
            return
        kind = np.dtype(matrix.dtype or np.float64)
        dtype = _panel_dtype(kind.itemsize, kind.kind == "f", kind.kind == "c")
        super().__init__(matrix.shape[0], dtype, torch.device("cpu"))
        if is_scipy_operator(matrix):
            self._matrix = matrix
            self._check_linear_operator()
        elif scipy.sparse.issparse(matrix):
            self._matrix = scipy.sparse.csr_array(matrix, dtype=_NUMPY_DTYPES[dtype])
            values = torch.from_numpy(self._matrix.data) if self._matrix.nnz else torch.zeros(1, dtype=dtype)
            _check_symmetric(values, float(abs(self._matrix - self._matrix.T).max()), self.size)
        else:
            self._matrix = torch.from_numpy(np.array(matrix, dtype=_NUMPY_DTYPES[dtype]))
            _check_symmetric(self._matrix, float((self._matrix - self._matrix.T).abs().max()))

    def _multiply(self, panel: Tensor, out: Tensor) -> None:
        if isinstance(self._matrix, Tensor):
            torch.mm(panel, self._matrix, out=out)  # symmetric, so the rows of V H are H times the rows of V
            return
        if is_torch_operator(self._matrix):
            out.copy_((self._matrix @ panel.T.to(self._matrix.dtype).contiguous()).detach().T)
            return
        columns = np.asarray(self._matrix @ panel.numpy().T, dtype=_NUMPY_DTYPES[self.dtype])
        out.copy_(torch.from_numpy(columns).T)

    def _check_linear_operator(self) -> None:
        generator = torch.Generator().manual_seed(0)
        u, v = torch.randn(2, self.size, dtype=self.dtype, generator=generator, device="cpu").to(self.device)
        image_u, image_v = self.matvec(u), self.matvec(v)
        self.products = 0
        scale = norm_of([u]) * norm_of([image_v])
        difference = abs(float(u @ image_v - v @ image_u))
        self.epsilon = max(torch.finfo(self.dtype).eps, self._rounding(v, image_v))
        if not difference <= ASYMMETRY * self.epsilon * scale:
            raise OperatorError(
                f"the {type(self._matrix).__name__} is not symmetric: u.Av and v.Au differ by {difference:.3g}, at "
                f"most {ASYMMETRY * self.epsilon * scale:.3g} is rounding; give a symmetric one"
            )

    def _rounding(self, vector: Tensor, image: Tensor) -> float:
        """Return float32's machine epsilon where products do not change with digits that float32 has not, else 0."""
        if self.dtype == torch.float32:
            return 0.0
        rounded = self.matvec(vector.float().to(self.dtype))
        self.products = 0
        return torch.finfo(torch.float32).eps if torch.equal(rounded, image) and bool(image.any()) else 0.0


def as_operator(operator: Any) -> CurvatureOperator:
    """Return a curvature operator as it is, and a matrix as a :class:`MatrixOperator`.

    Raises
    ------
    OperatorError
        If it is neither.
    """
    operator = getattr(operator, WRAPPED, operator)  # one that to_scipy has wrapped
    if isinstance(operator, CurvatureOperator):
        return operator
    if (
        isinstance(operator, Tensor | np.ndarray)
        or scipy.sparse.issparse(operator)
        or is_scipy_operator(operator)
        or is_torch_operator(operator)
    ):
        return MatrixOperator(operator)
    raise OperatorError(
        f"{type(operator).__name__} is not an operator; give a HessianOperator, a symmetric matrix or linear operator, "
        "or an object with size, dtype, device, products and matmat(panel, out=None)"
    )


def is_scipy_operator(operator: Any) -> bool:
    """Whether something is a SciPy ``LinearOperator``."""
    from scipy.sparse.linalg import LinearOperator

    return isinstance(operator, LinearOperator)


def is_torch_operator(operator: Any) -> bool:
    """Whether something that is not a tensor multiplies tensors by ``@``."""
    return (
        not isinstance(operator, Tensor)
        and isinstance(getattr(operator, "dtype", None), torch.dtype)
        and all(hasattr(operator, name) for name in ("shape", "device", "__matmul__"))
    )


def _check_square(matrix: Any) -> None:
    shape = getattr(matrix, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        got = f"shape {tuple(shape)}" if shape is not None else f"type {type(matrix).__name__}"
        raise OperatorError(f"the matrix has {got}; give a square matrix (n, n) with n >= 1")


def _panel_dtype(itemsize: int, is_floating: bool, is_complex: bool) -> torch.dtype:
    if is_complex:
        raise OperatorError("the matrix is complex; give a real symmetric one")
    return torch.float32 if is_floating and itemsize <= 4 else torch.float64


def _check_symmetric(values: Tensor, difference: float, size: int | None = None) -> None:
    if not bool(torch.isfinite(values).all()):
        raise OperatorError("the matrix holds NaN or Inf; give finite numbers")
    scale = float(values.abs().max())
    tolerance = 64 * (size or len(values)) * torch.finfo(values.dtype).eps * scale
    if not difference <= tolerance:
        raise OperatorError(
            f"the matrix is not symmetric: it differs from its transpose by {difference:.3g}, at most {tolerance:.3g} "
            "is rounding; give a symmetric matrix, for example (A + A.T) / 2"
        )
