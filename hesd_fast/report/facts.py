"""What a report holds besides its spectrum: what was analysed and how, what it took, and what was checked."""

from __future__ import annotations

from dataclasses import dataclass, field

from hesd_fast.records import MAY_BE_MISSING


@dataclass(frozen=True)
class Cost:
    """What the run took.

    Attributes
    ----------
    hvps : int
        Products of block Lanczos.
    seconds : float
        Of the whole run.
    peak_bytes : int
        Peak memory of the process.
    strategy : str
        How products were made.
    plan : str
        What was tried to find that; empty where it was given.
    unmet : tuple of str
        Of each number that is not as certain as the tolerance wanted: how far it is from that, and what it would take.
    """

    hvps: int
    seconds: float
    peak_bytes: int
    strategy: str
    plan: str = ""
    unmet: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """One thing that was verified on this run."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class ProblemFacts:
    """What was analysed.

    Attributes
    ----------
    model : str
        Class of the model.
    size : int
        Number of parameters n.
    parameters : tuple of str
        Names of the tensors that hold them.
    shapes : tuple of tuple of int
        Their shapes in real numbers; that of a complex one has a last dimension of 2.
    mode : str
        Module mode of the run.
    precision : str
        Element type of the panels.
    loss : float
        L at these parameters.
    parameter_norm_squared : float
        Squared Euclidean norm of the parameters.
    batches : int
        Number of batches.
    terms : float
        Number of loss terms.
    weights : str
        Digest of all parameters and buffers of the model, selected or not.
    fingerprint : str
        Digest of weights, selection, mode and data.
    function : str
        Which function of how many loss terms L is, in words.
    replaced_operations : tuple of str
        Operations of PyTorch that the run did in ordinary ones, as their own have no second derivative or a wrong one.
    """

    model: str
    size: int
    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    mode: str
    precision: str
    loss: float
    parameter_norm_squared: float
    batches: int
    terms: float
    weights: str
    fingerprint: str
    function: str
    replaced_operations: tuple[str, ...]


@dataclass(frozen=True)
class RunSettings:
    """How a spectrum was computed: what was asked for, with what the defaults stood for.

    Attributes
    ----------
    operator, block_size, max_steps, reorthogonalization, hvp, protocol, seed
        As in :func:`~hesd_fast.analyze`.
    basis, basis_dtype : str or None
        Where the Lanczos vectors were kept ("memory" or "disk"), and in what precision.
    tolerance : dict of str to float, or None
        The width at which each number was to be good enough; None where the run was to take all its steps.
    group : str or None
        The group of parameters that the matrix is the block of; None where the run was not one of groups.
    """

    operator: str
    block_size: int
    max_steps: int
    reorthogonalization: str
    basis: str | None
    basis_dtype: str | None
    hvp: str
    protocol: str | None
    seed: int
    tolerance: dict[str, float] | None
    group: str | None = field(default=None, metadata=MAY_BE_MISSING)
