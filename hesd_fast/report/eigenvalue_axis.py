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

FEWEST_TICKS = 3
"""Up to this many powers of ten, and zero, are too few to read an axis by."""

SAME = 1e-6
"""Range, relative to the larger end, up to which all places are drawn as one."""

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
        from matplotlib.ticker import NullFormatter

        low, high = self.eigenvalue(np.array([self.low, self.high])).tolist()
        if self.scale == "symlog":
            axes.set_xscale("asinh", linear_width=self.center)
            self._set_ticks(axes, low, high)
        elif self.scale == "log":
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(*((low, high) if self.sign > 0 else (high, low)))
        side = "" if self.scale != "log" else "negative " if self.sign < 0 else "positive "
        axes.set_xlabel(f"{side}eigenvalue")
        if self.sign < 0:
            axes.xaxis.set_major_formatter(lambda x, _: _power(-x))

    def _set_ticks(self, axes: Axes, low: float, high: float) -> None:
        """Put ticks at zero and at powers of ten on its logarithmic parts; where these are short, at round numbers."""
        from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

        first, last = math.ceil(math.log10(2.0 * self.center)), math.floor(math.log10(max(-low, high)))
        powers = [10.0**power for power in range(first, last + 1)]
        ticks = [tick for tick in [*(-x for x in reversed(powers)), 0.0, *powers] if low <= tick <= high]
        if len(ticks) > FEWEST_TICKS:
            axes.set_xticks(ticks, [_power(tick) for tick in ticks])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())


def _power(number: float) -> str:
    """Return zero or a power of ten, with its sign, as it is printed beside a tick."""
    if number == 0.0:
        return "0"
    return rf"${'-' if number < 0.0 else ''}10^{{{math.log10(abs(number)):.0f}}}$"


def coordinate(scale: str, center: float, eigenvalues: Array) -> Array:
    """Return where eigenvalues are on an axis of that scale."""
    if scale == "linear":
        return eigenvalues
    if scale == "symlog":
        return np.asarray(np.arcsinh(eigenvalues / center) / math.log(10.0))
    return np.asarray(np.log10(np.maximum(eigenvalues, center)))


def axes_of(spectra: Sequence[Atoms], scale: str) -> list[EigenvalueAxis]:
    """Return the axes that show some spectra, from left to right: one, or one for each sign there is."""
    places = np.concatenate([_reach(atoms) for atoms in spectra])
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


def _reach(atoms: Atoms) -> Array:
    """Return the places, and how far the eigenvalues of the outermost may be beyond them."""
    ends = [atoms.places[0] - atoms.errors[0], atoms.places[-1] + atoms.errors[-1]]
    return np.append(atoms.places, ends)


def _around(coordinates: Array, scale: str, sign: float, center: float) -> EigenvalueAxis:
    """Return the axis that shows some coordinates, with room beyond them."""
    low, high = float(coordinates.min()), float(coordinates.max())
    spread = high - low
    if spread <= SAME * max(abs(low), abs(high)):
        spread = max(abs(low), abs(high)) if scale == "linear" else 1.0
    room = MARGIN * (spread or 1.0)
    if scale == "log":  # panels of two signs stand side by side, each with room for its ticks
        room = max(room, 0.5 * (1.0 - (high - low)))
    return EigenvalueAxis(scale, sign, low - room, high + room, center)


def _central(atoms: Atoms) -> float:
    """Return the magnitude within which the central share of a spectrum lies."""
    magnitudes = np.abs(atoms.places)
    order = np.argsort(magnitudes)
    seen = np.cumsum(atoms.weights[order])
    return float(magnitudes[order][min(int(np.searchsorted(seen, CENTRAL_SHARE * seen[-1])), magnitudes.size - 1)])
