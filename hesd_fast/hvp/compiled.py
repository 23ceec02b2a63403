"""Exact products by a compiled program: the second backward pass of a batch, traced and put through torch.compile."""

from __future__ import annotations

import math
import operator
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from hesd_fast.errors import HESDWarning, OperatorError, first_line
from hesd_fast.hvp.base import Parts, Vectors, agrees, probe_vectors, with_row
from hesd_fast.hvp.reverse_over_reverse import ReverseOverReverse, gradient_to_keep
from hesd_fast.hvp.second_derivatives import Gradient, naming_operations
from hesd_fast.problem.loss_term import LossTerm
from hesd_fast.problem.parameters import norm_of


@dataclass(frozen=True)
class _LinearMap:
    """The linear map v -> H v of one batch: a program, and what it takes besides the vector."""

    program: Callable[..., tuple[Tensor, ...]]
    constants: list[Tensor]
    inputs: list[int]  # positions of the parameters
    outputs: list[int]

    def __call__(self, vector: list[Tensor]) -> Parts:
        with torch.no_grad():
            products = self.program(*self.constants, *(vector[i] for i in self.inputs))
        return with_row(list(zip(self.outputs, products, strict=True)))


class Compiled(ReverseOverReverse):
    """The second backward pass of each batch is traced once and compiled: 6F a vector, one vector at a time.

    The model itself is not traced, so it may do whatever plain double backward takes: what is traced is the derivative
    of its gradient, in elementary operations. Batches whose traces are the same share one program. Compiling takes 10
    to 90 seconds and a C++ compiler; where it fails, a warning says why, and the trace runs as it is. Memory: what the
    program needs of the forward and the first backward pass, for as many batches as ``memory_limit`` allows; the others
    are done as by :class:`~hesd_fast.hvp.DoubleBackward` each time.
    """

    name = "compiled"
    family = "compiled"
    transforms = True

    def __init__(self, compensated: bool = False, memory_limit: int | None = None) -> None:
        super().__init__(compensated, memory_limit)
        self._programs: dict[tuple[Any, ...], Callable[..., tuple[Tensor, ...]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_programs": {}}

    def products(self, term: LossTerm, rows: Vectors) -> Iterator[tuple[int, Parts]]:
        """Yield one product after the other."""
        product = self._kept.get(term.index)
        if product is None and not self.is_full:
            product = self._linear_map(term)
        if product is None:
            yield from super().products(term, rows)
            return
        for j, row in enumerate(rows):
            yield j, product(row)

    def _linear_map(self, term: LossTerm) -> _LinearMap | None:
        """Trace a batch, and keep its map if it fits."""
        with naming_operations(self.problem, term):
            gradient = gradient_to_keep(self, term)
            if not gradient.entries:
                nothing = self._kept[term.index] = _LinearMap(lambda: (), [], [], [])
                return nothing
            traced, other = probe_vectors(self.problem, 2, seed=1)
            graph, outputs = _trace(gradient, traced)
            constants, linear = _split(graph)
            if not self.may_keep(term, constants):
                return None
            wanted = dict(gradient.multiply(other, keep_graph=False))
        known = len(self._programs)
        product = _LinearMap(self._compile(linear, constants), constants, gradient.positions, outputs)
        started = time.perf_counter()
        self._compare(term, product(other), wanted)  # the first call compiles
        if len(self._programs) > known:
            self.once_seconds += time.perf_counter() - started
        self._kept[term.index] = product
        return product

    def _compile(self, linear: GraphModule, constants: list[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        """Return the compiled program; that of an earlier batch if it is the same."""
        key = (linear.code, *((c.dtype, c.device, tuple(c.shape), c.stride()) for c in constants))
        if key not in self._programs:
            compiled = torch.compile(linear, fullgraph=True, dynamic=False)
            self._programs[key] = _Program(compiled, linear)
        return self._programs[key]

    def _compare(self, term: LossTerm, found: Parts, wanted: dict[int, Tensor]) -> None:
        """Raise an OperatorError if a trace holds something of the vector that it was made with."""
        products = dict(found)
        if products.keys() != wanted.keys():  # pragma: no cover - both come from the same graph
            raise OperatorError(f"hvp={self.name!r} traced other parameters than batch {term.index} has")
        norm = norm_of(wanted.values())
        if not math.isfinite(norm):
            return  # the operator names the parameter
        difference = norm_of(products[i][0] - part for i, part in wanted.items())
        if not agrees(difference, norm, self.problem.epsilon):
            raise OperatorError(
                f"hvp={self.name!r} gets the product of batch {term.index} wrong: a backward pass leaves PyTorch, as "
                "for NumPy, or its trace is compiled wrongly; use hvp='double_backward'"
            )

    def release(self) -> None:
        """Forget what is kept from one product to the next, and the programs."""
        super().release()
        self._programs.clear()


class _Program:
    """A compiled trace, which runs as it is from the first failure on."""

    def __init__(self, compiled: Callable[..., Any], linear: GraphModule) -> None:
        self._compiled = compiled
        self._linear = linear
        self._works = False

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        try:
            result: tuple[Tensor, ...] = self._compiled(*tensors)
        except Exception as error:  # compilers raise whatever they meet
            if self._works or isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
                raise
            warnings.warn(
                f"hvp='compiled' runs uncompiled, as torch.compile failed: {first_line(error)}",
                HESDWarning,
                stacklevel=2,
            )
            self._compiled = self._linear
            result = self._linear(*tensors)
        self._works = True
        return result


def _trace(gradient: Gradient, vector: list[Tensor]) -> tuple[GraphModule, list[int]]:
    """Return the graph of the second backward pass, and the positions of its products."""
    outputs: list[int] = []

    def product(*parts: Tensor) -> list[Tensor]:
        whole = dict(zip(gradient.positions, parts, strict=True))
        found = gradient.multiply([whole.get(i, part) for i, part in enumerate(vector)], keep_graph=True)
        outputs[:] = [i for i, _ in found]
        return [part for _, part in found]

    graph = make_fx(product)(*(vector[i].clone() for i in gradient.positions))
    return graph, outputs


def _split(traced: GraphModule) -> tuple[list[Tensor], GraphModule]:
    """Return what a trace computes without its inputs, and the rest as a program of (what it needs of that, inputs)."""
    nodes = list(traced.graph.nodes)
    linear = _linear_nodes(nodes)
    *_, output = nodes
    results = set(output.all_input_nodes)
    fixed = [n for n in nodes if n not in linear and (n in results or any(user in linear for user in n.users))]
    values = _evaluate(traced, [node for node in nodes if node not in linear and node is not output])
    # What is not a tensor (a size that was traced) stays in the program.
    kept = [node for node in fixed if isinstance(values.get(node), Tensor)]
    graph = Graph()
    copies: dict[Node, Any] = {node: graph.placeholder(f"constant_{i}") for i, node in enumerate(kept)}
    copies |= {node: values[node] for node in fixed if node not in copies}
    for node in nodes:
        if node in linear and node is not output:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(tuple(map_arg(output.args[0], lambda source: copies[source])))
    return [values[node].detach() for node in kept], GraphModule({}, graph)


def _evaluate(traced: GraphModule, nodes: Iterable[Node]) -> dict[Node, Any]:
    """Compute nodes that do not depend on inputs."""
    values: dict[Node, Any] = {}
    with torch.no_grad():
        for node in nodes:
            if node.op == "get_attr":
                values[node] = getattr(traced, str(node.target))
            else:
                arguments, options = map_arg((node.args, node.kwargs), lambda source: values[source])
                values[node] = node.target(*arguments, **options)  # type: ignore[operator]
    return values


def _linear_nodes(nodes: list[Node]) -> set[Node]:
    """Return the nodes that have to run anew for each vector.

    They depend on it, or share memory that is written to after something that depends on it has read it.
    """
    anew: set[Node] = set()
    while True:
        linear: set[Node] = set()
        readers: set[Node] = set()  # owners of the memory that linear nodes have read
        found: set[Node] = set()
        for node in nodes:
            if node.op == "placeholder" or node in anew or any(source in linear for source in node.all_input_nodes):
                linear.add(node)
            for owner in _written_by(node):
                if owner.op in ("placeholder", "get_attr"):
                    raise OperatorError(
                        f"hvp='compiled' cannot trace this model: {node.target} of its second backward pass writes to "
                        "a tensor in place that the next product needs; use hvp='double_backward'"
                    )
                if owner not in linear and (node in linear or owner in readers):
                    found.add(owner)
            if node in linear:
                readers.update(owner for owner in map(_owner, node.all_input_nodes) if owner is not None)
        if not found:
            return linear
        anew |= found


def _written_by(node: Node) -> Iterator[Node]:
    """Yield the nodes that own what a node writes to in place."""
    if isinstance(node.target, torch._ops.OpOverload):
        for position, argument in enumerate(node.target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                owner = _owner(node.args[position] if position < len(node.args) else node.kwargs.get(argument.name))
                if owner is not None:
                    yield owner


def _owner(node: Any) -> Node | None:
    """Return the node whose memory a node is a view of."""
    while isinstance(node, Node) and node.args:
        if node.target is not operator.getitem:
            if not isinstance(node.target, torch._ops.OpOverload):
                break
            returned = node.target._schema.returns
            if not returned or returned[0].alias_info is None:
                break
        node = node.args[0]
    return node if isinstance(node, Node) else None
