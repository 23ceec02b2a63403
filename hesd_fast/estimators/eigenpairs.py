"""Eigenpairs of a matrix that is only known by its products, each with what is known of it."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hesd_fast.errors import CheckpointError, HESDError, first_line
from hesd_fast.estimate import Estimate
from hesd_fast.estimators.eigenpairs_missed import HIDING_RISK
from hesd_fast.lanczos.block_tridiagonal import Array
from hesd_fast.problem.parameters import ParameterLayout, as_real

LINEAR = "residual norm and noise"
FORMAT, FORMAT_VERSION = "hesd-fast eigenpairs", 1

QUADRATIC = f"residual norm squared over the gap, and noise; nothing missed (risk {HIDING_RISK:.1%})"


@dataclass(frozen=True, eq=False)
class EigenResult:
    """Eigenvalues and eigenvectors, and how well they are known; made by :func:`~hesd_fast.eigsh`.

    Attributes
    ----------
    which : str
        Which were wanted.
    values : ndarray (k,)
        In descending order; for ``which="SA"`` in ascending order, for "LM" by descending magnitude.
    residuals : ndarray (k,)
        ``|H v - lambda v|``, measured with a product of its own for each pair.
    bounds : tuple of k Estimate
        An interval for each value that holds an eigenvalue of ``H``: the value plus and minus its residual norm, or,
        where the search says that nothing was missed and the value stands alone, the square of that norm over the
        distance to its neighbours (Kato and Temple); and what rounding and noise of the products may add.
    converged : ndarray of bool (k,)
        Whether the residual norm is at most ``tolerance``.
    tolerance : float
        The residual norm that was asked for.
    limits : tuple of float
        ``(low, high)``: no eigenvalue but those in ``values`` lies below ``low`` or above ``high``, except with a
        probability of 2.5 % at each end. Infinite where nothing is known, or nothing was asked.
    complete : bool
        Whether all that was wanted is there, as far as the limits tell: nothing that was missed is beyond the last
        value on its end by more than the tolerance, or than noise.
    products : int
        Vectors multiplied, with those for ``residuals``.
    panel : tensor (k, n)
        An eigenvector of unit length in each row, on the operator's device.
    layout : ParameterLayout or None
        Which parameter each column belongs to.

    Examples
    --------
    >>> import torch, hesd_fast as hesd
    >>> result = hesd.eigsh(torch.diag(torch.arange(50.0, dtype=torch.float64)), k=2)
    >>> result.values.round(6), result.converged, result.complete
    (array([49., 48.]), array([ True,  True]), True)
    >>> print(result.bounds[0])
    49 [49, 49]
    """

    which: str
    values: Array
    residuals: Array
    bounds: tuple[Estimate, ...]
    converged: npt.NDArray[np.bool_]
    tolerance: float
    limits: tuple[float, float]
    complete: bool
    products: int
    panel: Tensor
    layout: ParameterLayout | None = None

    @property
    def vectors(self) -> tuple[Tensor | Mapping[str, Tensor], ...]:
        """The eigenvectors: of a problem's operator, tensors in the shapes of its parameters by their names; else (n,).

        They are views of ``panel``.
        """
        if self.layout is None:
            return tuple(self.panel)
        names = list(self.layout.parameters)
        return tuple(dict(zip(names, self.layout.unflatten(vector), strict=True)) for vector in self.panel)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it to a safetensors file, which :func:`~hesd_fast.load_eigenpairs` reads.

        The file holds a tensor ``(k, *shape)`` by the name of each parameter, or one ``(k, n)`` called ``vectors``; the
        numbers are in its metadata.

        Raises
        ------
        CheckpointError
            If it cannot be written.
        """
        rows = self.panel.cpu()
        if self.layout is None:
            tensors, layout = {"vectors": rows.contiguous()}, None
        else:
            names = layout = list(self.layout.parameters)
            parts = [self.layout.unflatten(row) for row in rows]
            tensors = {name: torch.stack(part) for name, part in zip(names, zip(*parts, strict=True), strict=True)}
        numbers = {**_numbers(self), "layout": layout, "dtype": str(self.panel.dtype).removeprefix("torch.")}
        metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "result": json.dumps(numbers)}
        partial = f"{os.fspath(path)}.{uuid.uuid4().hex}.partial"
        try:
            save_file(tensors, partial, metadata)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                os.remove(partial)
            raise CheckpointError(f"{os.fspath(path)!r} cannot be written: {error}") from error

    def __str__(self) -> str:
        verdict = "none missed" if self.complete else "some may be missed"
        lines = [f"{len(self.values)} eigenvalues ({self.which}) by {self.products} products, {verdict}"]
        for bound, residual, converged in zip(self.bounds, self.residuals, self.converged, strict=True):
            lines.append(f"{bound}, residual norm {residual:.0e}{'' if converged else ', not converged'}")
        return "\n".join(lines)


def load_eigenpairs(path: str | os.PathLike[str]) -> EigenResult:
    """Read what :meth:`EigenResult.save` wrote; the vectors are on the CPU.

    Parameters
    ----------
    path : path
        The file.

    Raises
    ------
    CheckpointError
        If it cannot be read, or holds something else.

    Examples
    --------
    >>> import os, tempfile, torch, hesd_fast as hesd
    >>> result = hesd.eigsh(torch.diag(torch.arange(9.0)), k=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "top.safetensors")
    ...     result.save(path)
    ...     again = hesd.load_eigenpairs(path)
    >>> torch.equal(again.vectors[0], result.vectors[0]), (again.values == result.values).all().item()
    (True, True)
    """
    shown = os.fspath(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{shown!r} cannot be read as eigenpairs: {first_line(error)}") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != str(FORMAT_VERSION):
        got = f"format {metadata.get('format')!r}, version {metadata.get('version')!r}"
        raise CheckpointError(f"{shown!r} has {got}; wanted {FORMAT!r}, version {FORMAT_VERSION}, as save writes it")
    try:
        return _result(json.loads(metadata["result"]), tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, HESDError) as error:
        raise CheckpointError(f"{shown!r} holds no eigenpairs: {first_line(error)}; save them again") from error


def _numbers(result: EigenResult) -> dict[str, Any]:
    """Return what JSON holds of a result; numbers come back bit for bit."""
    return {
        "which": result.which,
        "values": result.values.tolist(),
        "residuals": result.residuals.tolist(),
        "bounds": [[bound.low, bound.high, bound.method] for bound in result.bounds],
        "converged": result.converged.tolist(),
        "tolerance": result.tolerance,
        "limits": list(result.limits),
        "complete": result.complete,
        "products": result.products,
    }


def _result(numbers: dict[str, Any], tensors: dict[str, Tensor]) -> EigenResult:
    """Return the result that a file describes."""
    names, values = numbers["layout"], np.array(numbers["values"], dtype=np.float64)
    dtype = {"float32": torch.float32, "float64": torch.float64}[numbers["dtype"]]
    if set(tensors) != set(names or ["vectors"]) or any(len(tensor) != len(values) for tensor in tensors.values()):
        raise ValueError(f"its tensors, {', '.join(sorted(tensors))}, are not those of {len(values)} vectors")
    if names is None:
        layout, panel = None, tensors["vectors"]
    else:
        layout = layout_of({name: nn.Parameter(tensors[name][0]) for name in names})
        parts = [as_real(tensors[name]).reshape(len(values), -1).to(dtype) for name in names]
        panel = torch.cat(parts, dim=1)
    bounds = zip(values.tolist(), numbers["bounds"], strict=True)
    return EigenResult(
        which=numbers["which"],
        values=values,
        residuals=np.array(numbers["residuals"], dtype=np.float64),
        bounds=tuple(Estimate(value, *bound) for value, bound in bounds),
        converged=np.array(numbers["converged"], dtype=np.bool_),
        tolerance=float(numbers["tolerance"]),
        limits=(float(numbers["limits"][0]), float(numbers["limits"][1])),
        complete=bool(numbers["complete"]),
        products=int(numbers["products"]),
        panel=panel,
        layout=layout,
    )


def layout_of(parameters: Mapping[str, nn.Parameter]) -> ParameterLayout:
    """Return where parameters lie in a vector, without holding on to their values."""
    like = {name: torch.empty_like(one, device="meta") for name, one in parameters.items()}
    return ParameterLayout({name: nn.Parameter(one) for name, one in like.items()})
