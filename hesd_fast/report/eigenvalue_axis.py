"""The horizontal axes of a picture: linear, logarithmic on both sides of zero, or a logarithmic one for each sign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hesd_fast.lanczos.block_tridiagonal import Array
from hesd_fast.spectrum.smoothing import Atoms

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCALES = ("symlog", "linear", "log")

MARGIN = 0.04
"""Room beyond the extreme nodes, in lengths of the axis."""

MOST_DECADES = 8.0
"""Decades below the largest magnitude that a logarithmic axis shows at most."""

CENTRAL_SHARE, CENTRAL_DECADES = 0.25, 4.0
"""The linear part of an axis that is logarithmic on both sides holds this share of some spectrum, unless that would be
within so many decades below the largest magnitude, or within the noise."""


@dataclass(frozen=True)
class EigenvalueAxis:
    """An axis, from a coordinate in which lengths are what one sees to eigenvalues and back.

    Attributes
    ----------
    scale : str
        One of `SCALES`.
    sign : float
        -1 for the panel of negative eigenvalues of a logarithmic axis, which shows the spectrum of ``-H``.
    low, high : float
        The ends, as coordinates.
    center : float
        Magnitude of eigenvalues up to which the axis of scale "symlog" is nearly linear, and from which one of scale
        "log" shows them.
    """

    scale: str
    sign: float
    low: float
    high: float
    center: float

    @property
    def length(self) -> float:
        """Its length as a coordinate: eigenvalues of a linear axis, otherwise decades."""
        return self.high - self.low

    def coordinate(self, eigenvalues: Array) -> Array:
        """Return the coordinates of eigenvalues, of ``-H`` where the sign is -1."""
        return coordinate(self.scale, self.center, eigenvalues)

    def eigenvalue(self, coordinates: Array) -> Array:
        """Return the eigenvalues at coordinates, of ``-H`` where the sign is -1."""
        if self.scale == "linear":
            return coordinates
        if self.scale == "symlog":
            return np.asarray(self.center * np.sinh(math.log(10.0) * coordinates))
        return np.asarray(10.0**coordinates)

    def atoms(self, atoms: Atoms) -> Atoms | None:
        """Return atoms on this axis; None where it shows none of them."""
        mirrored = atoms if self.sign > 0 else atoms.reflected()
        if self.scale == "log":
            mirrored = mirrored.where(mirrored.places >= self.center)
        return mirrored.on_axis(self.coordinate) if mirrored.places.size else None

    def set_up(self, axes: Axes) -> None:
        """Give scale, ends and label to the axis of a picture."""
        low, high = self.eigenvalue(np.array([self.low, self.high]))
        if self.scale == "symlog":
            axes.set_xscale("asinh", linear_width=self.center)
        elif self.scale == "log":
            axes.set_xscale("log")
        axes.set_xlim(*((low, high) if self.sign > 0 else (high, low)))
        axes.set_xlabel(
            "eigenvalue" if self.scale != "log" else f"{'negative' if self.sign < 0 else 'positive'} eigenvalue"
        )
        if self.sign < 0:
            axes.xaxis.set_major_formatter(lambda x, _: rf"$-10^{{{math.log10(x):.0f}}}$")


def coordinate(scale: str, center: float, eigenvalues: Array) -> Array:
    """Return where eigenvalues are on an axis of that scale."""
    if scale == "linear":
        return eigenvalues
    if scale == "symlog":
        return np.asarray(np.arcsinh(eigenvalues / center) / math.log(10.0))
    return np.asarray(np.log10(np.maximum(eigenvalues, center)))


def axes_of(spectra: Sequence[Atoms], scale: str) -> list[EigenvalueAxis]:
    """Return the axes that show some spectra, from left to right: one, or one for each sign there is."""
    places = np.concatenate([atoms.places for atoms in spectra])
    largest = float(np.abs(places).max()) or 1.0
    noise = max(float(atoms.noise.max()) for atoms in spectra)
    if scale != "log":
        center = min(max(min(map(_central, spectra)), noise, largest * 10.0**-CENTRAL_DECADES), largest)
        return [_around(coordinate(scale, center, places), scale, 1.0, center)]
    lowest = min(max(noise, largest * 10.0**-MOST_DECADES), 0.5 * largest)
    sides = [(sign, sign * places[sign * places >= lowest]) for sign in (-1.0, 1.0)]
    nearest = min((float(side.min()) for _, side in sides if side.size), default=largest)
    shown = [(sign, np.append(side, nearest)) for sign, side in sides if side.size] or [(1.0, np.array([largest]))]
    return [_around(np.log10(side), scale, sign, lowest) for sign, side in shown]


def _around(coordinates: Array, scale: str, sign: float, center: float) -> EigenvalueAxis:
    """Return the axis that shows some coordinates, with room beyond them."""
    low, high = float(coordinates.min()), float(coordinates.max())
    room = MARGIN * ((high - low) or (abs(high) if scale == "linear" else 0.0) or 1.0)
    return EigenvalueAxis(scale, sign, low - room, high + room, center)


def _central(atoms: Atoms) -> float:
    """Return the magnitude within which the central share of a spectrum lies."""
    magnitudes = np.abs(atoms.places)
    order = np.argsort(magnitudes)
    seen = np.cumsum(atoms.weights[order])
    return float(magnitudes[order][min(int(np.searchsorted(seen, CENTRAL_SHARE * seen[-1])), magnitudes.size - 1)])
