"""Errors of trace estimators at equal products, and how often stated intervals hold: the tables of the docs.

.venv/bin/python bench/trace_estimators.py errors
.venv/bin/python bench/trace_estimators.py diagonals --seeds 50
.venv/bin/python bench/trace_estimators.py coverage

Every figure is an error or a count, none a timing. Matrices have known eigenvalues and random eigenvectors, so that the
truth is known; errors are mean absolute errors over the sum of the magnitudes of the eigenvalues (over the trace, where
none is negative), of diagonals in the Euclidean norm over that of the diagonal. matfree 0.6.3
(https://pypi.org/project/matfree) takes part where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from workloads import Diagonal

import hesd_fast as hesd

SIZE = 1000
RISK = 0.05
PROBES_OF_A_REPORT = 4


def spectra(n: int = SIZE) -> dict[str, np.ndarray]:
    """Eigenvalues by name, the same at every call."""
    random = np.random.default_rng(5)
    index = np.arange(1.0, n + 1.0)
    bulk = random.normal(0.0, 1e-2, n - 30)
    return {
        "1/i": 1.0 / index,
        "1/i^2": index**-2.0,
        "1/sqrt(i)": index**-0.5,
        "exponential, 0.9^i": 0.9**index,
        "flat, 1 to 3": np.linspace(1.0, 3.0, n),
        "step: 20 of 1, else 0.001": np.where(index <= 20, 1.0, 1e-3),
        "step: 50 of 1, else 0.001": np.where(index <= 50, 1.0, 1e-3),
        "1/i, signs in turn": (-1.0) ** index / index,
        "normal, mean 0": random.normal(0.0, 1.0, n),
        "bulk at 0, 20 + 10 outliers": np.r_[bulk, np.logspace(1.0, -1.0, 20), -np.logspace(-0.3, -1.5, 10)],
        "bulk at 0, 30 outliers of any sign": np.r_[
            bulk, 10.0 ** random.uniform(-1.0, 1.0, 30) * random.choice([-1.0, 1.0], 30)
        ],
    }


def matrix_with(eigenvalues: np.ndarray) -> np.ndarray:
    basis, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((len(eigenvalues),) * 2))
    matrix = (basis * eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2.0


Estimator = Callable[[np.ndarray, int], Iterator[float]]
"""Takes a matrix and a number of products; yields estimates of its trace from other random numbers each time."""


def of_hesd(matrix: np.ndarray, products: int) -> Iterator[float]:
    operator, seed = hesd.MatrixOperator(matrix), 0
    while True:
        found = hesd.trace(operator, tolerance=None, max_products=products, seed=seed)
        assert found.products == products
        yield found.value
        seed += 1


def of_a_report(matrix: np.ndarray, products: int) -> Iterator[float]:
    operator, seed = hesd.MatrixOperator(matrix), 0
    while True:
        run = hesd.block_lanczos(operator, products // PROBES_OF_A_REPORT, PROBES_OF_A_REPORT, seed=seed)
        yield len(matrix) * hesd.SpectralMeasure.from_tridiagonal(run).moment(1)
        seed += 1


def of_hutch_plus_plus(matrix: np.ndarray, products: int) -> Iterator[float]:
    """Hutch++ as published: a third of the products for the sketch, one for its trace, one for what is left."""
    random, third = np.random.default_rng(0), products // 3
    while True:
        signs = np.sign(random.standard_normal((2, len(matrix), third)))
        basis, _ = np.linalg.qr(matrix @ signs[0])
        outside = signs[1] - basis @ (basis.T @ signs[1])
        yield float(np.sum(basis * (matrix @ basis)) + np.sum(outside * (matrix @ outside)) / third)


def of_matfree(name: str) -> Estimator:
    def estimates(matrix: np.ndarray, products: int) -> Iterator[float]:
        import jax
        from matfree import stochtrace

        jax.config.update("jax_enable_x64", True)
        fixed, like = jax.numpy.asarray(matrix), jax.numpy.ones(len(matrix))
        if name == "XTrace":
            sampler = stochtrace.sampler_normal(like, num=products // 2)
            estimate = stochtrace.estimator_leave_one_out(stochtrace.leave_one_out_xtrace(), sampler=sampler)
        else:
            sampler = stochtrace.sampler_signs(like, num=products)
            estimate = stochtrace.estimator_monte_carlo(stochtrace.monte_carlo_trace(), sampler=sampler)
        compiled, seed = jax.jit(lambda key: estimate(lambda vector: fixed @ vector, key)), 0
        while True:
            yield float(compiled(jax.random.PRNGKey(seed)))
            seed += 1

    return estimates


def estimators() -> dict[str, Estimator]:
    found: dict[str, Estimator] = {
        "hesd.trace": of_hesd,
        "block Lanczos, 4 probes": of_a_report,
        "Hutch++": of_hutch_plus_plus,
    }
    if importlib.util.find_spec("matfree"):
        found["matfree Hutchinson"] = of_matfree("Hutchinson")
        found["matfree XTrace"] = of_matfree("XTrace")
    return found


def print_errors(products: int, seeds: int) -> None:
    columns = estimators()
    print(f"| spectrum, {products} products | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 1) + "|")
    for name, eigenvalues in spectra().items():
        matrix, truth, scale = matrix_with(eigenvalues), eigenvalues.sum(), np.abs(eigenvalues).sum()
        cells = []
        for estimator in columns.values():
            values = [value for value, _ in zip(estimator(matrix, products), range(seeds), strict=False)]
            cells.append(f"{np.abs(np.array(values) - truth).mean() / scale:.1e}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


Diagonals = Callable[[np.ndarray, int], Iterator[np.ndarray]]


def diagonals_of_hesd(matrix: np.ndarray, products: int) -> Iterator[np.ndarray]:
    operator, seed = hesd.MatrixOperator(matrix), 0
    while True:
        yield hesd.diagonal(operator, tolerance=None, max_products=products, seed=seed).values.numpy()
        seed += 1


def diagonals_of_plain_probes(matrix: np.ndarray, products: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(0)
    while True:
        signs = np.sign(random.standard_normal((len(matrix), products)))
        yield (signs * (matrix @ signs)).mean(axis=1)


def diagonals_of_matfree(matrix: np.ndarray, products: int) -> Iterator[np.ndarray]:
    import jax
    from matfree import stochtrace

    jax.config.update("jax_enable_x64", True)
    fixed, like = jax.numpy.asarray(matrix), jax.numpy.ones(len(matrix))
    sampler = stochtrace.sampler_signs(like, num=products // 2)
    estimate = stochtrace.estimator_leave_one_out(stochtrace.leave_one_out_xdiag(), sampler=sampler)
    compiled, seed = jax.jit(lambda key: estimate(lambda vector: fixed @ vector, key)), 0
    while True:
        yield np.asarray(compiled(jax.random.PRNGKey(seed)))
        seed += 1


def print_diagonals(products: int, seeds: int) -> None:
    columns: dict[str, Diagonals] = {
        "hesd.diagonal": diagonals_of_hesd,
        "Rademacher probes alone": diagonals_of_plain_probes,
    }
    if importlib.util.find_spec("matfree"):
        columns["matfree XDiag"] = diagonals_of_matfree
    print(f"| diagonal, {products} products | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 1) + "|")
    for name, eigenvalues in spectra().items():
        matrix, cells = matrix_with(eigenvalues), []
        truth = matrix.diagonal()
        for estimator in columns.values():
            found = [values for values, _ in zip(estimator(matrix, products), range(seeds), strict=False)]
            error = np.linalg.norm(np.array(found) - truth, axis=1).mean() / np.linalg.norm(truth)
            cells.append(f"{error:.1e}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


OF = {"trace": hesd.trace, "norm": hesd.frobenius_norm}


def print_coverage(of: list[str], seeds: int, tolerances: list[float], most: int) -> None:
    """Gaussian probes have no preferred direction, so that a diagonal matrix stands for all with its eigenvalues."""
    heads = [f"{what} {tolerance:g}" for tolerance in tolerances for what in of]
    print("| spectrum | " + " | ".join(f"{head}: holds | products" for head in heads) + " |")
    print("| --- " * (2 * len(heads) + 1) + "|")
    for name, eigenvalues in spectra().items():
        operator, cells = Diagonal(torch.from_numpy(eigenvalues)), []
        truths = {"trace": eigenvalues.sum(), "norm": float(np.sqrt((eigenvalues**2).sum()))}
        for tolerance in tolerances:
            for what in of:
                found = [OF[what](operator, tolerance, max_products=most, seed=seed) for seed in range(seeds)]
                holds = np.mean([one.low <= truths[what] <= one.high for one in found])
                cells.append(f"{holds:.1%} | {np.median([one.products for one in found]):.0f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["errors", "diagonals", "coverage"])
    parser.add_argument("--products", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=300)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.05, 0.02])
    parser.add_argument("--of", nargs="+", default=list(OF), choices=list(OF), help="what coverage is of")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", hesd.HESDWarning)
    if options.table == "errors":
        print_errors(options.products, options.seeds)
    elif options.table == "diagonals":
        print_diagonals(options.products, options.seeds)
    else:
        print_coverage(options.of, options.seeds, options.tolerances, 200)


if __name__ == "__main__":
    main()
