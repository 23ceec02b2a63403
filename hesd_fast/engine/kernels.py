"""The compiled kernels, on PyTorch tensors, on the CPU or a CUDA device, or NumPy arrays.

A panel is a row-major block of vectors, shape (vectors, elements), contiguous along each vector; the vectors may lie
further apart than their length (:func:`empty_panel` spaces them to whole cache lines). Kernels fill the panels they are
given and never copy them; the panels of one call lie on one device. Small matrices are float64, on the CPU: a tensor
where the first panel is one, else an array. On a CUDA device kernels run on the stream that is current.
Every kernel gives the same bits for any number of threads and has a reference in plain PyTorch in
:mod:`hesd_fast.engine.reference`. The contracts are the headers in ``csrc/include/hesd``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from hesd_fast.engine import _engine, cuda
from hesd_fast.engine.panels import empty_panel
from hesd_fast.errors import EngineError, NumericalError

__all__ = [
    "OrthonormalFactor",
    "accumulate_hvp",
    "empty_panel",
    "fill_probes",
    "panel_combine",
    "panel_gram",
    "panel_orthonormalize",
    "panel_project",
    "select_target",
]

Panel: TypeAlias = torch.Tensor | npt.NDArray[Any]
Matrix: TypeAlias = torch.Tensor | npt.NDArray[np.float64]
Reduce: TypeAlias = Callable[[npt.NDArray[np.float64]], None]


class OrthonormalFactor(NamedTuple):
    """What :func:`panel_orthonormalize` found: ``W = factor @ Q``, and the norm of the weakest direction kept."""

    factor: Matrix
    rank: int
    weakest: float


def require_device(device: torch.device) -> None:
    """Raise an EngineError for a device that this build has no kernels for.

    Examples
    --------
    >>> import torch
    >>> import hesd_fast as hesd
    >>> hesd.kernels.require_device(torch.device("cpu"))
    """
    if device.type == "cpu" or (cuda.runtime.is_cuda(device) and _engine.build_info()["cuda"]):
        return
    have = "the CPU and CUDA devices" if _engine.build_info()["cuda"] else "the CPU only"
    raise EngineError(
        f"the problem is on {device}; this build has kernels for {have}. Move the model and data to the CPU"
        + (", or build where nvcc is found" if cuda.runtime.is_cuda(device) else "")
    )


def _like(matrix: npt.NDArray[np.float64], panel: Panel) -> Matrix:
    return torch.from_numpy(matrix) if isinstance(panel, torch.Tensor) else matrix


def _as_array(matrix: Matrix) -> npt.NDArray[np.float64]:
    array = np.asarray(matrix.detach().cpu() if isinstance(matrix, torch.Tensor) else matrix)
    if array.dtype.kind not in "fiu":
        raise EngineError(f"the matrix of coefficients has dtype {array.dtype}; wanted float64")
    return np.ascontiguousarray(array, dtype=np.float64)


def panel_gram(V: Panel, W: Panel) -> Matrix:
    """Inner products ``V @ W.T`` of two panels, summed in float64.

    Products of panels of which neither is float64 are taken in float32, 64 of them at a time, except of a panel with
    itself.

    Parameters
    ----------
    V : panel (k, n)
        float64, float32, bfloat16 or float16.
    W : panel (b, n)
        float64 or float32.

    Returns
    -------
    matrix (k, b), float64
        Cost: reads V and W once, 2 k b n operations.

    Raises
    ------
    EngineError
        For a panel of another dtype, device, shape or with a stride within its vectors.

    Examples
    --------
    >>> import torch
    >>> import hesd_fast as hesd
    >>> V = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    >>> W = torch.tensor([[1.0, 2.0, 3.0]])
    >>> hesd.kernels.panel_gram(V, W)
    tensor([[1.],
            [3.]], dtype=torch.float64)
    """
    return _like(_engine.panel_gram(V, W), V)


def panel_project(
    W: Panel, V: Panel, C: Matrix, *, gram: bool = True, self_gram: bool = True, gram_only: int = 0
) -> tuple[Matrix | None, Matrix | None]:
    """Subtract ``C.T @ V[gram_only:]`` from W in place and return the next Gram matrices.

    Parameters
    ----------
    W : panel (b, n)
        float64 or float32; overwritten by ``W - C.T @ V[gram_only:]``.
    V : panel (k, n)
        float64, float32, bfloat16 or float16; must not overlap W.
    C : matrix (k - gram_only, b)
        float64 coefficients; where neither panel is float64 they are rounded to float32 first.
    gram, self_gram : bool
        Whether to take the Gram matrices, with V while V is in cache and of W.
    gram_only : int
        First vectors of V, 0 <= gram_only <= k, that take part in the Gram matrix alone.

    Returns
    -------
    gram : matrix (k, b), float64, or None
        ``V @ W.T`` of the new W, if asked for.
    self_gram : matrix (b, b), float64, or None
        ``W @ W.T`` of the new W, if asked for; its products are always in float64.

    Raises
    ------
    EngineError
        As :func:`panel_gram`; also when W and V overlap.

    Examples
    --------
    >>> import torch
    >>> import hesd_fast as hesd
    >>> V, W = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    >>> gram, _ = hesd.kernels.panel_project(W, V, hesd.kernels.panel_gram(V, W))
    >>> W, gram
    (tensor([[0., 4.]]), tensor([[0.]], dtype=torch.float64))
    """
    product, self_product = _engine.panel_project(W, V, _as_array(C), gram, self_gram, gram_only)
    return _like(product, W) if gram else None, _like(self_product, W) if self_gram else None


def panel_orthonormalize(
    W: Panel,
    out: Panel | None = None,
    *,
    tolerance: float | None = None,
    max_rank: int | None = None,
    reduce: Reduce | None = None,
) -> OrthonormalFactor:
    """Orthonormalize the vectors of W by repeated Cholesky QR, dropping dependent ones.

    Parameters
    ----------
    W : panel (b, n)
        float64 or float32; overwritten.
    out : panel (b, n), optional
        Receives Q in its first ``rank`` vectors and zeros in the rest. Default: W itself.
    tolerance : float, optional
        Directions whose remaining norm is at most this are dropped. Default: 8 machine epsilons times the longest
        vector of W.
    max_rank : int, optional
        Keep at most this many directions, the largest first. Default: b.
    reduce : callable, optional
        Sums a float64 array over all shards of the vectors, in place.

    Returns
    -------
    OrthonormalFactor
        ``factor`` (b, rank) with ``W = factor @ Q`` up to the tolerance, ``rank``, and ``weakest``, the norm of the
        weakest direction kept.

    Raises
    ------
    EngineError
        For a panel that cannot be used.
    NumericalError
        For values in W that are not finite, or too large or small to be squared.

    References
    ----------
    Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, ETNA 44, 2015 (CholeskyQR2).

    Examples
    --------
    >>> import torch
    >>> import hesd_fast as hesd
    >>> W = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    >>> hesd.kernels.panel_orthonormalize(W).rank
    1
    >>> W
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    if tolerance is None:
        tolerance = _default_tolerance(W, reduce)
    rank, weakest, factor = _engine.panel_orthonormalize(
        W, W if out is None else out, tolerance, W.shape[0] if max_rank is None else max_rank, reduce
    )
    return OrthonormalFactor(_like(factor[:, :rank], W), rank, weakest)


def _default_tolerance(W: Panel, reduce: Reduce | None) -> float:
    squares = np.diagonal(_engine.panel_gram(W, W)).copy()
    if reduce is not None:
        reduce(squares)
    if not np.isfinite(squares).all():
        raise NumericalError("`W` has non-finite values; wanted finite vectors")
    epsilon = torch.finfo(torch.float64 if str(W.dtype).endswith("float64") else torch.float32).eps
    return float(8 * epsilon * math.sqrt(squares.max(initial=0.0)))


def panel_combine(S: Matrix, V: Panel, out: Panel) -> None:
    """Fill ``out`` with the linear combinations ``S @ V``.

    Parameters
    ----------
    S : matrix (r, k)
        float64 coefficients.
    V : panel (k, n)
        float64, float32, bfloat16 or float16.
    out : panel (r, n)
        Any of the four; overwritten; must not overlap V.

    Raises
    ------
    EngineError
        As :func:`panel_gram`; also when ``out`` and V overlap.

    Examples
    --------
    >>> import torch
    >>> import hesd_fast as hesd
    >>> out = torch.empty(1, 2)
    >>> hesd.kernels.panel_combine(torch.tensor([[2.0, -1.0]]), torch.eye(2), out)
    >>> out
    tensor([[ 2., -1.]])
    """
    _engine.panel_combine(_as_array(S), V, out)


def accumulate_hvp(
    out: Panel,
    parts: Sequence[Panel],
    offsets: Sequence[int],
    alpha: float = 1.0,
    compensation: Panel | None = None,
) -> None:
    """Add ``alpha`` times each part to its column range of ``out``.

    Parameters
    ----------
    out : panel (b, n)
        float64 or float32; accumulated into.
    parts : sequence of panels (b, length_i)
        Of out's precision or a lower one, bfloat16 and float16 included.
    offsets : sequence of int
        First column of each part in ``out``. Ranges must not overlap.
    alpha : float
        The batch's weight.
    compensation : panel (b, n), optional
        The rounding error of each addition is added to it, so that ``out + compensation`` is accurate to about
        twice the working precision.

    Raises
    ------
    EngineError
        For parts that do not fit, overlap or are more precise than ``out``.

    Examples
    --------
    >>> import torch
    >>> import hesd_fast as hesd
    >>> out = torch.zeros(1, 3)
    >>> hesd.kernels.accumulate_hvp(out, [torch.ones(1, 1), torch.ones(1, 2)], [0, 1], alpha=0.5)
    >>> out
    tensor([[0.5000, 0.5000, 0.5000]])
    """
    _engine.accumulate_hvp(out, list(parts), list(offsets), alpha, compensation)


def fill_probes(out: Panel, seed: int, *, first_probe: int = 0, first_index: int = 0, kind: str = "rademacher") -> None:
    """Fill a panel with random probes that depend only on (seed, probe number, parameter index).

    Parameters
    ----------
    out : panel (b, n)
        float64 or float32; vector j, element i becomes value ``first_index + i`` of probe ``first_probe + j``.
    seed : int
        0 <= seed < 2**64.
    first_probe, first_index : int
        Where in the infinite table of probe values the panel lies; a shard passes the global index of its first
        parameter.
    kind : {"rademacher", "gaussian"}
        Signs or standard normals.

    Raises
    ------
    EngineError
        For an unknown kind or a seed out of range.

    References
    ----------
    Salmon, Moraes, Dror, Shaw, SC 2011 (Philox 4x32-10).

    Examples
    --------
    >>> import torch
    >>> import hesd_fast as hesd
    >>> probes = hesd.kernels.empty_panel(2, 4)
    >>> hesd.kernels.fill_probes(probes, seed=0)
    >>> probes
    tensor([[ 1., -1.,  1., -1.],
            [ 1., -1., -1., -1.]])
    """
    rows, columns = out.shape if len(out.shape) == 2 else (1, 1)
    limits = (
        ("seed", seed, 2**64),
        ("first_probe", first_probe, 2**32 - rows),
        ("first_index", first_index, 2**64 - columns),
    )
    for name, value, limit in limits:
        if not isinstance(value, int) or not 0 <= value <= limit - (name == "seed"):
            raise EngineError(
                f"`{name}` is {value!r}; wanted an integer from 0 on, so that all values fit into the table"
            )
    _engine.fill_probes(out, seed, first_probe, first_index, kind)


def select_target(name: str) -> None:
    """Switch the instruction set of the CPU kernels, for tests; see ``build_info()["cpu_targets_available"]``.

    Examples
    --------
    >>> import hesd_fast as hesd
    >>> before = hesd.build_info()["cpu_target"]
    >>> hesd.kernels.select_target("generic")
    >>> hesd.build_info()["cpu_target"]
    'generic'
    >>> hesd.kernels.select_target(before)
    """
    _engine.select_target(name)
