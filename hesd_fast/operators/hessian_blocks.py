"""Diagonal blocks of the Hessian, one for each group of parameters, multiplied in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hesd_fast.choices import GROUPINGS, is_one_of
from hesd_fast.errors import OperatorError, ProblemError
from hesd_fast.hvp.base import ProductSum, Vectors, vectors_of
from hesd_fast.hvp.derivative_check import DerivativeCheck, warn_of_wrong_derivatives
from hesd_fast.hvp.planner import give_up
from hesd_fast.hvp.reverse_over_reverse import DoubleBackward, KeptGraph, ReverseOverReverse
from hesd_fast.hvp.wide_loss import Parts, WideLoss
from hesd_fast.operators.base import ProblemOperator
from hesd_fast.operators.hessian import hessian_products, multiply_or_fall_back
from hesd_fast.problem.loss_term import LossTerm
from hesd_fast.problem.model_state import alone
from hesd_fast.problem.parameters import Selection, select_parameters
from hesd_fast.problem.problem import Problem

Groups = Mapping[str, Selection] | str

STRATEGIES = ("auto", DoubleBackward.name, KeptGraph.name)
"""How products with blocks can be made."""


class HessianBlock(ProblemOperator):
    """The block of the Hessian that belongs to one group of parameters; :class:`GroupedHessianOperator` makes them.

    Attributes
    ----------
    positions : dict of int to int
        Position of each of its parameters among those of all groups, and among its own, in order.
    """

    def __init__(self, whole: GroupedHessianOperator, name: str, problem: Problem) -> None:
        super().__init__(problem)
        self.name = name
        self.whole = whole
        positions = {parameter: i for i, parameter in enumerate(whole.problem.parameters)}
        self.positions = {positions[parameter]: own for own, parameter in enumerate(problem.parameters)}

    @property
    def strategy(self) -> ReverseOverReverse:
        """What makes the products."""
        return self.whole.strategy

    @property
    def method(self) -> str:
        """Return the name of the strategy."""
        return self.strategy.name

    @property
    def derivatives(self) -> DerivativeCheck | None:
        """Whether products of all groups together are derivatives of gradients; None before the first one."""
        return self.whole.prepared.finding(DerivativeCheck)

    def _multiply(self, panel: Tensor, out: Tensor) -> None:
        self.whole._multiply([(self, panel, out)])

    def release(self) -> None:
        """Let go of what is kept from one product to the next, for all groups."""
        self.strategy.release()

    def products_of(self, term: LossTerm, panel: Tensor) -> Tensor:
        """Return a batch's part of the products with the rows of a panel, in a session."""
        plain = DoubleBackward()
        plain.problem = self.prepared
        return plain.products_alone(term, vectors_of(self.prepared, panel))

    def wide_products(self, loss: WideLoss, term: LossTerm, rows: Vectors) -> tuple[float, float, Iterator[Parts]]:
        """Return a batch's loss in a wide precision, its weight, and its products with some vectors."""
        return hessian_products(loss, term, rows)

    def _multiply_anew(self, panel: Tensor, out: Tensor) -> None:
        plain = DoubleBackward()
        plain.problem = self.whole.prepared
        with plain.problem.session():
            self.whole._apply(plain, [(self, panel, out)])


class GroupedHessianOperator:
    """Diagonal blocks H_gg of the Hessian for groups g of parameters, all multiplied in one pass over the data.

    Of each batch, the forward pass and the gradient (or its kept graph) serve all groups. Each vector then costs one
    backward pass, which leaves out what lies before the group's parameters: 3 F + at most 6 F b per batch for a block
    of b vectors of each group, with F a forward pass; no F where graphs are kept.

    Parameters
    ----------
    problem : Problem
        The loss to differentiate.
    groups : mapping of str to selection, "modules" or "parameters"
        The groups by name; each selects among the problem's parameters as :class:`~hesd_fast.Problem` does. Groups may
        overlap. "modules": the parameters that each module owns itself; "parameters": every parameter by itself.
    compensated : bool
        Carry the rounding errors of adding up the batches (two-sum); costs the panels' memory once more.
    hvp : {"auto", "double_backward", "kept_graph"}
        How products are made. "auto": by kept graphs if the model allows it and the first batch fits.
    memory_limit : int, optional
        Bytes that may be kept from one product to the next; None for no limit.

    Attributes
    ----------
    blocks : dict of str to HessianBlock
        One operator for each group; its :meth:`matmat` multiplies that block alone.

    Raises
    ------
    ProblemError
        If a group selects nothing, or something outside of the problem.
    OperatorError
        For another ``hvp``.

    Examples
    --------
    >>> import torch
    >>> import hesd_fast as hesd
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> problem = hesd.Problem(torch.nn.Linear(2, 1), hesd.losses.supervised(torch.nn.MSELoss()), data)
    >>> operator = hesd.GroupedHessianOperator(problem, "parameters")
    >>> operator.matmats({"weight": torch.ones(1, 2), "bias": torch.ones(1, 1)})
    {'weight': tensor([[1., 4.]]), 'bias': tensor([[2.]])}
    """

    def __init__(
        self,
        problem: Problem,
        groups: Groups,
        compensated: bool = False,
        hvp: str = "auto",
        memory_limit: int | None = None,
    ) -> None:
        if not is_one_of(hvp, STRATEGIES):
            raise OperatorError(f"hvp is {hvp!r}; for groups one of {', '.join(map(repr, STRATEGIES))} is wanted")
        chosen = names_of_groups(problem, groups)
        needed = {name for names in chosen.values() for name in names}
        self.problem = problem if needed == problem.parameters.keys() else problem.restricted(needed)
        self.hvp = hvp
        kind = DoubleBackward if hvp == DoubleBackward.name else KeptGraph
        self.strategy: ReverseOverReverse = kind(compensated, memory_limit)
        self.blocks = {name: HessianBlock(self, name, self.problem.restricted(names)) for name, names in chosen.items()}
        self.prepared = self.problem.prepare()
        self._is_prepared = False

    def matmats(self, panels: Mapping[str, Tensor], outs: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Multiply a panel of some groups each, in one pass over the data.

        Parameters
        ----------
        panels : mapping of str to tensor (b, n)
            Vectors by the name of the group, n the group's number of parameters; b may differ.
        outs : mapping of str to tensor (b, n), optional
            Overwritten by the products; must not overlap the panels.

        Returns
        -------
        dict of str to tensor (b, n)
            Row j of a group's panel is H_gg times row j of the one given.

        Raises
        ------
        OperatorError
            For a name that is no group, a panel or out of another shape, dtype, device or stride, and where a product
            is not finite.
        """
        if unknown := sorted(panels.keys() - self.blocks.keys()):
            raise OperatorError(f"{unknown[0]!r} is no group; the groups are {', '.join(map(repr, self.blocks))}")
        if outs is not None and outs.keys() != panels.keys():
            raise OperatorError(f"outs has {', '.join(map(repr, outs))}; give one for each panel, {', '.join(panels)}")
        found = {
            name: self.blocks[name]._admit(panel, None if outs is None else outs[name])
            for name, panel in panels.items()
        }
        work = [(self.blocks[name], panel.detach(), found[name]) for name, panel in panels.items() if len(panel)]
        if work:
            self._multiply(work)
        for block, panel, out in work:
            block._finish(panel, out)
        return found

    def _multiply(self, work: list[tuple[HessianBlock, Tensor, Tensor]]) -> None:
        with self.prepared.session():
            if not self._is_prepared:
                self._prepare()
            self.strategy = multiply_or_fall_back(self.strategy, self.hvp, lambda by: self._apply(by, work))

    def _prepare(self) -> None:
        strategy = self.strategy
        if self.hvp != "auto":
            strategy.prepare(self.prepared)
        else:
            plain = DoubleBackward(strategy.compensated)
            plain.prepare(self.prepared)
            strategy.problem = self.prepared
            try:
                strategy.check()
                refused = False
            except (OperatorError, torch.cuda.OutOfMemoryError):
                refused = True
            if refused:  # after the error, whose frames hold what the product had made
                give_up(strategy)
            if not strategy._kept:  # refused, or the first batch does not fit
                self.strategy = plain
        warn_of_wrong_derivatives(self.prepared)
        self._is_prepared = True

    def _apply(self, strategy: ReverseOverReverse, work: list[tuple[HessianBlock, Tensor, Tensor]]) -> None:
        """Overwrite each out by the products of its block with the panel's rows."""
        sums = [ProductSum(block.prepared, out, strategy.compensated) for block, _, out in work]
        rows: list[tuple[HessianBlock, ProductSum, int]] = []
        vectors: list[list[Tensor | None]] = []
        parameters = list(self.problem.parameters.values())
        for (block, panel, _), total in zip(work, sums, strict=True):
            for number, row in enumerate(panel):
                vector: list[Tensor | None] = [None] * len(parameters)
                for position, view in zip(block.positions, block.problem.unflatten(row), strict=True):
                    vector[position] = view.to(parameters[position].dtype)
                vectors.append(vector)
                rows.append((block, total, number))
        for term in self.prepared.terms():
            for j, parts in strategy.block_products(term, vectors):
                block, total, number = rows[j]
                total.add(number, [(block.positions[position], part) for position, part in parts], term.weight)
                del parts
        for total in sums:
            total.finish()


@alone
def names_of_groups(problem: Problem, groups: Groups) -> dict[str, list[str]]:
    """Return the names of the parameters of each group; a ProblemError for groups that cannot be used."""
    known = list(problem.parameters)
    if isinstance(groups, str):
        if groups not in GROUPINGS:
            raise ProblemError(
                f"groups is {groups!r}; wanted a mapping of names to selections, or one of "
                f"{', '.join(map(repr, GROUPINGS))}"
            )
        if groups == "parameters":
            return {name: [name] for name in known}
        modules: dict[str, list[str]] = {}
        for name in known:
            modules.setdefault(name.rpartition(".")[0] or "model", []).append(name)
        return modules
    if not isinstance(groups, Mapping) or not groups:
        got = "empty" if isinstance(groups, Mapping) else f"of type {type(groups).__name__}"
        raise ProblemError(
            f"groups is {got}; wanted a mapping of names to selections, as in {{'head': r'head\\..*'}}, or one of "
            f"{', '.join(map(repr, GROUPINGS))}"
        )
    found = {}
    for name, selection in groups.items():
        if not isinstance(name, str) or not name:
            raise ProblemError(f"a group is called {name!r}; wanted a name, a string that is not empty")
        selected = select_parameters(problem.model, selection)
        found[name] = [parameter for parameter in selected if parameter in problem.parameters]
        if not found[name]:
            raise ProblemError(
                f"group {name!r} selects {', '.join(map(repr, list(selected)[:3]))}, none of which is among the "
                "problem's parameters; select others, or give a Problem that has them"
            )
    return found
