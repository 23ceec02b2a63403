"""The kernels' references in plain PyTorch: slow, short, and what the compiled ones are tested against.

Each function has the name, the arguments and the meaning of the kernel in :mod:`hesd_fast.kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from hesd_fast.engine.kernels import OrthonormalFactor, Reduce
from hesd_fast.errors import NumericalError

_MASK = 0xFFFFFFFF


def panel_gram(V: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """``V @ W.T`` in float64, shape (k, b)."""
    return V.double() @ W.double().T


def panel_project(
    W: torch.Tensor, V: torch.Tensor, C: torch.Tensor, *, gram: bool = True, self_gram: bool = True, gram_only: int = 0
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``W -= C.T @ V[gram_only:]`` in place; ``V @ W.T`` (k, b) and ``W @ W.T`` (b, b) of the new W, if asked for."""
    W.copy_(W.double() - C.T @ V[gram_only:].double())
    return panel_gram(V, W) if gram else None, panel_gram(W, W) if self_gram else None


def panel_orthonormalize(
    W: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    tolerance: float | None = None,
    max_rank: int | None = None,
    reduce: Reduce | None = None,
) -> OrthonormalFactor:
    """Q in ``out`` and its factor, by Gram-Schmidt in float64: the longest remainder first, subtracted twice."""

    def inner_products(vectors: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        sums = (vectors @ vector).numpy()
        if reduce is not None:
            reduce(sums)
        return torch.from_numpy(sums)

    rest = W.double()
    rows = len(rest)
    squares = torch.zeros(rows, dtype=torch.float64)
    for i in range(rows):
        squares[i] = inner_products(rest[i : i + 1], rest[i])[0]
    if not bool(torch.isfinite(squares).all()):
        raise NumericalError("`W` has non-finite values; wanted finite vectors")
    if tolerance is None:
        tolerance = 8 * torch.finfo(W.dtype).eps * math.sqrt(max(squares.tolist(), default=0.0))
    found = torch.zeros(0, rest.shape[1], dtype=torch.float64)
    factor = torch.zeros(rows, rows, dtype=torch.float64)
    weakest = math.inf
    while (rank := len(found)) < min(rows, rows if max_rank is None else max_rank):
        norms = torch.cat([inner_products(rest[i : i + 1], rest[i]) for i in range(rows)]).sqrt()
        longest = int(norms.argmax())
        if norms[longest] <= tolerance:
            break
        for _ in range(2):  # what rounding has left of the directions before
            overlap = inner_products(found, rest[longest])
            rest[longest] -= overlap @ found
            factor[longest, :rank] += overlap
        norm = inner_products(rest[longest : longest + 1], rest[longest]).sqrt()
        weakest = min(weakest, float(norm))
        found = torch.cat([found, rest[longest : longest + 1] / norm])
        factor[longest, rank] = norm
        rest[longest] = 0.0
        for _ in range(2):
            overlap = inner_products(rest, found[rank])
            rest -= overlap[:, None] * found[rank]
            factor[:, rank] += overlap
    out = W if out is None else out
    out.zero_()
    out[: len(found)] = found.to(out.dtype)
    return OrthonormalFactor(factor[:, : len(found)], len(found), weakest)


def panel_combine(S: torch.Tensor, V: torch.Tensor, out: torch.Tensor) -> None:
    """``out[:] = S @ V``."""
    out.copy_(S.double() @ V.double())


def accumulate_hvp(
    out: torch.Tensor,
    parts: Sequence[torch.Tensor],
    offsets: Sequence[int],
    alpha: float = 1.0,
    compensation: torch.Tensor | None = None,
) -> None:
    """``out[:, offset_i : offset_i + length_i] += alpha * part_i``, with the rounding errors into compensation."""
    factor = torch.tensor(alpha, dtype=out.dtype)
    for part, offset in zip(parts, offsets, strict=True):
        columns = slice(offset, offset + part.shape[1])
        old = out[:, columns].clone()
        term = factor * part.to(out.dtype)
        total = old + term
        if compensation is not None:
            shared = total - old
            compensation[:, columns] += (old - (total - shared)) + (term - shared)
        out[:, columns] = total


def philox(counter: torch.Tensor, key: tuple[int, int]) -> torch.Tensor:
    """Philox 4x32-10 of counters (..., 4), words as int64 in [0, 2**32); the same shape."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a 32 by 32 bit product, through 16-bit halves that int64 can hold."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def fill_probes(
    out: torch.Tensor, seed: int, first_probe: int = 0, first_index: int = 0, kind: str = "rademacher"
) -> None:
    """Probe values of rows ``first_probe + j`` and indices ``first_index + i``; bit for bit the kernel's."""
    values_per_block = 128 if kind == "rademacher" else 4
    index = first_index + torch.arange(out.shape[1], dtype=torch.int64)
    block = torch.div(index, values_per_block, rounding_mode="floor")
    item = index - block * values_per_block
    for row in range(out.shape[0]):
        counter = torch.stack(
            (
                block & _MASK,
                block >> 32,
                torch.full_like(block, first_probe + row),
                torch.full_like(block, 0 if kind == "rademacher" else 1),
            ),
            dim=-1,
        )
        words = philox(counter, (seed & _MASK, seed >> 32))
        if kind == "rademacher":
            word = words.gather(-1, (item // 32).unsqueeze(-1)).squeeze(-1)
            out[row] = (2 * ((word >> (item % 32)) & 1) - 1).to(out.dtype)
        else:
            pair = (item // 2) * 2
            uniform = (words.gather(-1, pair.unsqueeze(-1)).squeeze(-1).double() + 1.0) * 2.0**-32
            turn = words.gather(-1, (pair + 1).unsqueeze(-1)).squeeze(-1)
            # NumPy's square root is correctly rounded; PyTorch's vectorized one is sometimes off in the last bit
            radius = torch.from_numpy(np.sqrt((-2.0 * _logarithm(uniform)).numpy()))
            cosine, sine = _cosine_sine(turn)
            out[row] = (radius * torch.where(item % 2 == 0, cosine, sine)).to(out.dtype)


def _logarithm(value: torch.Tensor) -> torch.Tensor:
    fraction, exponent = torch.frexp(value)  # fraction in [1/2, 1)
    fraction, exponent = 2.0 * fraction, exponent.double() - 1.0
    large = fraction > 1.4142135623730951
    fraction = torch.where(large, 0.5 * fraction, fraction)
    exponent = torch.where(large, exponent + 1.0, exponent)
    s = (fraction - 1.0) / (fraction + 1.0)
    square = s * s
    series = torch.zeros_like(s)
    for degree in range(21, 0, -2):
        series = series * square + 1.0 / degree
    return exponent * 0.6931471805599453 + 2.0 * s * series


def _cosine_sine(turn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    quadrant = turn >> 30
    within = turn & 0x3FFFFFFF
    beyond_half = within > 0x20000000
    offset = torch.where(beyond_half, 0x40000000 - within, within)
    x = offset.double() * (0.7853981633974483 / 536870912.0)
    square = x * x
    near = torch.ones_like(x)
    far = torch.ones_like(x)
    for degree in range(16, 0, -2):
        near = 1.0 - near * square * (1.0 / (degree * (degree - 1)))
        far = 1.0 - far * square * (1.0 / (degree * (degree + 1)))
    far = far * x
    c = torch.where(beyond_half, far, near)
    s = torch.where(beyond_half, near, far)
    cosine = torch.where(quadrant == 0, c, torch.where(quadrant == 1, -s, torch.where(quadrant == 2, -c, s)))
    sine = torch.where(quadrant == 0, s, torch.where(quadrant == 1, c, torch.where(quadrant == 2, -s, -c)))
    return cosine, sine


def lanczos_quadrature(
    matvec: Callable[[torch.Tensor], torch.Tensor], probe: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights of one probe by single-vector Lanczos as the pure-Python peers write it: a list of vectors.

    ``matvec`` returns the product with a vector (n,) as a new tensor. Full reorthogonalization by one pass of modified
    Gram-Schmidt, in the probe's precision; ends early when the Krylov space is invariant. The baseline of the
    benchmarks.
    """
    epsilon = torch.finfo(probe.dtype).eps
    basis = [probe / torch.linalg.vector_norm(probe)]
    diagonal: list[float] = []
    offdiagonal: list[float] = []
    largest = 0.0
    for _ in range(min(steps, len(probe))):
        vector = matvec(basis[-1])
        largest = max(largest, float(torch.linalg.vector_norm(vector)))
        diagonal.append(float(torch.dot(vector, basis[-1])))
        for other in basis:
            vector.add_(other, alpha=-float(torch.dot(vector, other)))
        norm = float(torch.linalg.vector_norm(vector))
        if norm <= 8 * epsilon * largest:
            break
        offdiagonal.append(norm)
        basis.append(vector / norm)
    couplings = torch.tensor(offdiagonal[: len(diagonal) - 1], dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    matrix += torch.diag(couplings, 1) + torch.diag(couplings, -1)
    nodes, vectors = torch.linalg.eigh(matrix)
    return nodes, vectors[0] ** 2
