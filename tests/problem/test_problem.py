"""What a Problem accepts, what it finds out, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
import warnings
from collections import UserDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from dense import dense_hessian
from models import SmallTransformer, Wrapped, mlp, vectors
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from hesd_fast import losses
from hesd_fast.errors import HESDWarning, OperatorError, ProblemError
from hesd_fast.operators import HessianOperator
from hesd_fast.problem import batches as data_module
from hesd_fast.problem.batches import as_batches, digest, leaves, size_in_bytes, to_device
from hesd_fast.problem.problem import Problem

CROSS_ENTROPY = losses.supervised(nn.CrossEntropyLoss())


def model() -> nn.Module:
    torch.manual_seed(0)
    return mlp(nn.Tanh).double()


def mean(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def total(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


# Data


class Squares(Dataset):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((8,), index / 10, dtype=torch.float64), index % 3


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (Squares()[index] for index in range(10))


class HuggingFaceLike:
    """Items, a length and __getitems__, as a DataLoader asks for, without torch's base class; iterates over rows."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return Squares()[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        return [self[index] for index in indices]

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (self[index] for index in range(10))


class Reiterable:
    def __init__(self, batches: list[object]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[object]:
        return iter(self.batches)


@dataclasses.dataclass
class Pair:
    inputs: Tensor
    targets: Tensor


@pytest.mark.parametrize("dataset", [Squares(), Stream(), HuggingFaceLike()], ids=["map", "stream", "hugging-face"])
def test_datasets_are_collated_in_order(dataset: object) -> None:
    inputs = torch.stack([Squares()[index][0] for index in range(10)])
    targets = torch.tensor([index % 3 for index in range(10)])
    problem = Problem(model(), mean, dataset, batch_size=4)
    assert (problem.batch_count, problem.total_count) == (3, 10)
    assert problem.loss_value == pytest.approx(float(mean(problem.model, (inputs, targets)).detach()), rel=1e-14)
    assert Problem(model(), mean, dataset).batch_count == 1


def test_every_form_of_the_same_data_is_the_same() -> None:
    torch.manual_seed(1)
    ((x, y),) = vectors(10)
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    forms = {
        "list": (batches, mean),
        "re-iterable": (Reiterable(batches), mean),
        "loader": (DataLoader(TensorDataset(x, y), batch_size=8), mean),
        "tuple": ((x, y), mean),
        "dict": ({"input": x, "labels": y}, CROSS_ENTROPY),
        "user-dict": (UserDict({"input": x, "labels": y}), CROSS_ENTROPY),
        "dataclass": (Pair(x, y), lambda m, b: mean(m, (b.inputs, b.targets))),
        "tensor": (x, lambda m, b: mean(m, (b, y))),
        "list-of-lists": ([list(batch) for batch in batches], mean),
    }
    counts = {"list": 2, "re-iterable": 2, "loader": 2, "list-of-lists": 2}
    wanted = float(mean(model(), (x, y)).detach())
    for name, (data, loss) in forms.items():
        problem = Problem(model(), loss, data)
        assert problem.loss_value == pytest.approx(wanted, rel=1e-14), name
        assert (problem.batch_count, problem.total_count) == (counts.get(name, 1), 10), name


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_shuffling_loader_yields_the_same_batches_each_pass(workers: int, own_generator: bool) -> None:
    generator = torch.Generator().manual_seed(7) if own_generator else None
    loader = DataLoader(Squares(), batch_size=4, shuffle=True, num_workers=workers, generator=generator)
    states = (torch.get_rng_state(), generator.get_state() if generator else torch.ones(1))
    operator = HessianOperator(Problem(model(), mean, loader))
    vector = torch.ones(operator.size, dtype=torch.float64)
    first = operator.matvec(vector)
    assert torch.equal(operator.matvec(vector), first)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(generator.get_state() if generator else torch.ones(1), states[1])


def test_random_augmentation_from_the_global_stream_is_the_same_each_pass() -> None:
    class Augmented(Squares):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            x, y = super().__getitem__(index)
            return x + torch.rand(8, dtype=torch.float64) + np.random.rand(), y  # noqa: NPY002

    problem = Problem(nn.Sequential(nn.Dropout(), model()), mean, Augmented(), mode="train", batch_size=4)
    HessianOperator(problem).matvec(torch.ones(problem.size, dtype=torch.float64))
    with problem.session():
        list(problem.terms())  # what comes next does not depend on what a forward pass drew


def test_a_term_is_the_same_function_whenever_it_is_evaluated() -> None:
    problem = Problem(nn.Sequential(nn.Dropout(), model()), mean, vectors(4, 3), mode="train")
    with problem.session():
        for term in problem.terms():
            assert torch.equal(term.evaluate(), term.evaluate())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter(vectors(4)), r"one-shot iterator .*pass list\(data\)"),
        ((batch for batch in vectors(4)), "one-shot iterator .generator"),
        (list(vectors(4)[0]), r"list of 2 items with bare tensors.*tuple\(data\).*\[\(x,\) for x in data\]"),
        ([], "empty list; give at least one batch"),
        (np.ones((4, 8)), r"ndarray is neither.*torch\.from_numpy"),
        ("data.csv", "type str is neither a batch nor"),
        (3, "type int is neither a batch nor"),
        (Pair, "type type is neither a batch nor"),
    ],
)
def test_data_that_is_refused(data: object, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        Problem(model(), mean, data)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True])
def test_bad_batch_size(batch_size: object) -> None:
    with pytest.raises(ProblemError, match=r"batch_size is .*; give an integer of at least 1"):
        Problem(model(), mean, Squares(), batch_size=batch_size)


def test_batch_size_without_a_dataset() -> None:
    for data in (vectors(4), vectors(4)[0], DataLoader(Squares())):
        with pytest.raises(ProblemError, match=r"batch_size=4 was given, but .* leave batch_size out"):
            Problem(model(), mean, data, batch_size=4)


def test_empty_data() -> None:
    with pytest.raises(ProblemError, match=r"the data yields no batch"):
        Problem(model(), mean, Reiterable([])).prepare()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_data_is_named(value: float) -> None:
    batches = [{"x": [batch[0]], "labels": batch[1]} for batch in vectors(4, 3)]
    batches[1]["x"][0][2, 1] = value
    with pytest.raises(ProblemError, match=r"batch 1 of the data holds NaN or Inf in batch\['x'\]\[0\]"):
        Problem(model(), lambda m, b: mean(m, (b["x"][0], b["labels"])), batches).prepare()


def test_an_additive_mask_may_hold_negative_infinity() -> None:
    mask = torch.tensor([0.0, 0.0, -torch.inf])

    def masked_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, additive = batch
        return (torch.softmax(model(inputs) + additive, dim=-1) ** 2).mean()

    problem = Problem(nn.Linear(2, 3), masked_loss, (torch.randn(4, 2), mask.expand(4, 3)))
    problem.prepare()
    assert np.isfinite(problem.loss_value)


def test_data_made_in_inference_mode() -> None:
    with torch.inference_mode():
        data = vectors(4)
    with pytest.raises(ProblemError, match=r"batch\[0\] of batch 0 .* inference mode; make it outside"):
        Problem(model(), mean, data).prepare()


class Changing:
    """Yields other data at every pass after the first ``same`` ones."""

    def __init__(self, change: str, same: int) -> None:
        self.change, self.same, self.passes = change, same, 0
        torch.manual_seed(5)
        self.batches = vectors(4, 3)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        if self.passes <= self.same:
            return iter(self.batches)
        (x, y), second = self.batches
        return iter(
            {
                "values": [(x, y), (second[0] + 1e-9, second[1])],
                "order": [second, (x, y)],
                "more": [(x, y), second, second],
                "fewer": [(x, y)],
                "dtype": [(x.float(), y), second],
                "none": [],
            }[self.change]
        )


@pytest.mark.parametrize("same", [1, 2, 3])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("values", "batch 1 differs"),
        ("order", "batch 0 differs"),
        ("more", "batch 2 differs"),
        ("fewer", "this pass has 1 batches, the first had 2"),
        ("dtype", "batch 0 differs"),
        ("none", "this pass has 0 batches, the first had 2"),
    ],
)
def test_changed_data_is_an_error_at_every_pass(change: str, what: str, same: int) -> None:
    problem = Problem(model(), mean, Changing(change, same))
    problem.prepare()
    with problem.session():
        for _ in range(same - 1):
            list(problem.terms())
        with pytest.raises(ProblemError, match=f"the data changed between two passes: {what}.*give data"):
            list(problem.terms())


def writing(model: nn.Module, batch: list[Tensor]) -> Tensor:
    batch[0].mul_(0.5)
    return mean(model, (batch[0], batch[1]))


def replacing(model: nn.Module, batch: list[Tensor]) -> Tensor:
    batch[0] = batch[0] * 0.5
    return mean(model, (batch[0], batch[1]))


@pytest.mark.parametrize("loss", [writing, replacing])
def test_loss_that_changes_its_batch_is_named(loss: object) -> None:
    data = [list(batch) for batch in vectors(4, 3)]
    operator = HessianOperator(Problem(model(), loss, data))
    message = r"batch 0 differs .*; forward or loss changed batch\[0\] of it in place, .* as in x = x\.clone"
    with pytest.raises(ProblemError, match=message):
        operator.matvec(torch.ones(operator.size, dtype=torch.float64))


def test_loss_may_change_batches_that_are_made_afresh() -> None:
    def halving(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return mean(model, (batch[0] * 0.5, batch[1]))

    operators = [HessianOperator(Problem(model(), loss, Squares(), batch_size=4)) for loss in (halving, writing)]
    vector = torch.ones(operators[0].size, dtype=torch.float64)
    assert torch.equal(operators[0].matvec(vector), operators[1].matvec(vector))


def test_persistent_workers_are_named_where_they_shuffle_differently() -> None:
    loader = DataLoader(Squares(), batch_size=4, shuffle=True, num_workers=1, persistent_workers=True)
    problem = Problem(model(), mean, loader)
    with pytest.raises(ProblemError, match=r"differs .* persistent_workers=True, .* \(leave it out\); give data"):
        HessianOperator(problem).matvec(torch.ones(problem.size, dtype=torch.float64))


def test_a_problem_can_be_pickled_and_copied() -> None:
    torch.manual_seed(0)
    problem = Problem(nn.Linear(3, 2), CROSS_ENTROPY, [(torch.randn(4, 3), torch.ones(4).long())])
    wanted = HessianOperator(problem).matmat(torch.ones(1, 8))
    for other in (pickle.loads(pickle.dumps(problem)), copy.deepcopy(problem)):
        assert other.fingerprint == problem.fingerprint
        assert torch.equal(HessianOperator(other).matmat(torch.ones(1, 8)), wanted)


def test_a_problem_is_prepared_once_and_keeps_what_is_found() -> None:
    passes = []

    class Counted(Reiterable):
        def __iter__(self) -> Iterator[object]:
            passes.append(1)
            return super().__iter__()

    problem = Problem(model(), mean, Counted(vectors(4, 3)))
    prepared = problem.prepare()
    assert problem.prepare() is prepared
    assert (problem.loss_value, problem.batch_count, len(passes)) == (prepared.loss_value, 2, 1)
    prepared.keep_finding(0.5)
    assert problem.prepare().finding(float) == 0.5
    assert problem.restricted(["0.bias"]).prepare().finding(float) is None
    assert len(passes) == 1


# Digests


def test_digest_sees_every_kind_of_change() -> None:
    x = torch.arange(6.0).view(2, 3)
    different = [
        (x,), [x, 1], {"a": x}, {"b": x}, x.double(), x.view(3, 2), x + 1, x.bfloat16(), x.T, x.to_sparse(),
        x.bool(), x.numpy(), x.numpy() + 1, [x, "a"], [x, "b"], [x, None], Pair(x, x), Pair(x, x + 1), torch.ones(()),
    ]  # fmt: skip
    codes = [digest(batch) for batch in different]
    assert len(set(codes)) == len(codes)


def test_digest_is_of_values_not_of_layout() -> None:
    x = torch.arange(24.0).view(1, 2, 3, 4)
    assert digest(x) == digest(x.clone().contiguous(memory_format=torch.channels_last))
    assert digest(x[..., ::2]) == digest(x[..., ::2].clone())
    assert digest({"a": x}) == digest(UserDict({"a": x.clone()}))


def test_fingerprint_depends_on_what_defines_the_problem() -> None:
    torch.manual_seed(2)
    first, second = vectors(4, 4)
    other = model()
    with torch.no_grad():
        other[0].bias[3] += 1e-12
    fingerprints = [
        Problem(model(), mean, [first]).fingerprint,
        Problem(model(), mean, [second]).fingerprint,
        Problem(model(), mean, [first], parameters="0.*").fingerprint,
        Problem(model(), mean, [first], mode="train").fingerprint,
        Problem(other, mean, [first]).fingerprint,
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert Problem(model(), mean, [tuple(t.clone() for t in first)]).fingerprint == fingerprints[0]


def test_the_digest_of_the_weights_is_of_nothing_else() -> None:
    first, second = vectors_of(2), vectors_of(3)
    digest = Problem(model(), mean, first).weights
    assert len(bytes.fromhex(digest)) == 16
    for same in (
        Problem(model(), mean, second),
        Problem(model(), mean, first, parameters="0.*"),
        Problem(model(), mean, first, mode="train"),
        Problem(model(), mean, first).restricted(["0.bias"]),
    ):
        assert same.weights == digest
    moved, renamed, buffered = model(), nn.Sequential(nn.Identity(), *model()), model()
    with torch.no_grad():
        moved[-1].bias[0] += 1e-12
    buffered.register_buffer("count", torch.tensor(1))
    others = [Problem(other, mean, first).weights for other in (moved, renamed, buffered, model().half().double())]
    assert len({digest, *others}) == 5


def test_the_weights_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(model(), mean, vectors_of(2))
    problem.prepare()
    read: list[int] = []
    tensor_bytes = data_module.tensor_bytes
    monkeypatch.setattr(data_module, "tensor_bytes", lambda t: read.append(t.numel()) or tensor_bytes(t))
    part = problem.restricted(["0.bias"])
    assert {problem.weights, part.weights} == {problem.weights}
    assert problem.fingerprint != part.fingerprint
    assert sum(read) == sum(tensor.numel() for tensor in [*problem.model.parameters(), *problem.model.buffers()])


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_fingerprint_of_buffers_of_every_kind(layout: torch.layout) -> None:
    def fingerprint(value: float) -> str:
        network = model()
        dense = torch.tensor([[0.0, value], [2.0, 0.0]])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            network.register_buffer("sparse", dense.to_sparse(layout=layout))
        network.register_buffer("complex", torch.ones(2, dtype=torch.complex64).conj())
        network.register_buffer("flag", torch.tensor(True))
        network.register_buffer("empty", torch.zeros(0, 3))
        return Problem(network, mean, vectors_of(0)).fingerprint

    assert fingerprint(1.0) == fingerprint(1.0) != fingerprint(1.5)


def vectors_of(seed: int) -> list[object]:
    torch.manual_seed(seed)
    return vectors(4)


# What a batch may hold


class Graph:
    """A batch that is an object, as graph libraries have them: it moves itself in place, and refers to itself."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.parts, self.scale, self.itself = x, {"y": [y]}, 1.0, self
        self._cache: object = None

    def to(self, device: torch.device) -> Graph:
        self.x, self.parts = self.x.to(device), {"y": [part.to(device) for part in self.parts["y"]]}
        self.itself = self
        return self


class Slotted:
    """A batch with slots and no dictionary."""

    __slots__ = ("x", "y")

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


class Store:
    """A batch that shows what it holds by ``to_dict`` alone, and iterates over its entries."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._entries = {"x": x, "y": y}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._entries.items())

    def to_dict(self) -> dict[str, Tensor]:
        return dict(self._entries)

    def to(self, device: torch.device) -> Store:
        return Store(*(tensor.to(device) for tensor in self._entries.values()))


OBJECTS = [Graph, Slotted, Store, lambda x, y: SimpleNamespace(x=x, y=y)]


def of_object(model: nn.Module, batch: object) -> tuple[Tensor, int]:
    tensors = [leaf for _, leaf in leaves(batch) if isinstance(leaf, Tensor)]
    return total(model, tensors), len(tensors[0])


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_are_batches(kind: object) -> None:
    data = vectors(4, 3)
    operators = [HessianOperator(Problem(model(), of_object, [kind(x, y) for x, y in data])),
                 HessianOperator(Problem(model(), CROSS_ENTROPY, data))]  # fmt: skip
    vector = torch.ones(1011, dtype=torch.float64)
    found, wanted = (operator.matvec(vector) for operator in operators)
    # the two have the cross-entropy in different forms
    torch.testing.assert_close(found, wanted, rtol=0, atol=64 * 2.0**-52 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_that_change_from_pass_to_pass_are_noticed(kind: object) -> None:
    class Drifting:
        passes = 0

        def __iter__(self) -> Iterator[object]:
            self.passes += 1
            return iter([kind(x + 1e-9 * self.passes, y) for x, y in batches])

    batches = vectors(4, 3)
    with pytest.raises(ProblemError, match=r"the data changed between two passes: batch 0 differs .*; give data"):
        HessianOperator(Problem(model(), of_object, Drifting())).matvec(torch.ones(1011, dtype=torch.float64))


@pytest.mark.parametrize("kind", OBJECTS)
def test_non_finite_numbers_in_objects_are_named(kind: object) -> None:
    (x, y), other = vectors(4, 3)
    x[1, 2] = torch.nan
    with pytest.raises(ProblemError, match=r"batch 1 of the data holds NaN or Inf in batch\.x .shape .4, 8..; clean"):
        Problem(model(), of_object, [kind(*other), kind(x, y)]).prepare()


def test_what_an_object_keeps_for_itself_may_change() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model()

        def forward(self, batch: Graph) -> Tensor:
            batch._cache = batch.x * 2
            return self.body(batch.x)

    data = [Graph(x, y) for x, y in vectors(4, 3)]
    problem = Problem(
        Caching(),
        lambda m, b: (functional.cross_entropy(m(b), b.parts["y"][0], reduction="sum"), len(b.x)),
        data,
    )
    HessianOperator(problem).matvec(torch.ones(1011, dtype=torch.float64))


def test_a_graph_batch_alone_is_one_batch() -> None:
    ((x, y),) = vectors(4)
    batch = Store(x, y)
    assert as_batches(batch) == [batch]


def test_objects_of_every_other_kind_are_left_alone() -> None:
    class Node:
        def __init__(self) -> None:
            self.neighbours: list[Node] = []

    nodes = [Node() for _ in range(40)]
    for node in nodes:
        node.neighbours = nodes  # more paths than could ever be walked
    things = [
        nodes,
        object(),
        mlp,
        nn.Linear(2, 2),
        torch.float32,
        Graph,
        logging.getLogger(),
        Path("a"),
        torch.Generator(),
    ]
    assert digest(things) == digest(things)
    assert to_device(things, torch.device("meta"))[1:] == things[1:]


@dataclasses.dataclass(frozen=True)
class Derived:
    """A frozen dataclass with a field that is no argument."""

    x: Tensor
    half: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "half", self.x / 2)


def test_batches_of_every_form_are_moved() -> None:
    meta, x = torch.device("meta"), torch.ones(3, 2)
    packed = pack_sequence([x, x[:1]])
    nested = torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged)
    for batch in (x, (x, 1), [x], {"x": (x,)}, UserDict(x=x), Pair(x, x), Derived(x), Graph(x, x), Store(x, x), packed,
                  x.to_sparse(), nested, Named(x, [x])):  # fmt: skip
        moved = to_device(batch, meta)
        tensors = [leaf for path, leaf in leaves(moved) if isinstance(leaf, Tensor) and path != "batch[1]"]
        assert tensors
        assert all(tensor.device == meta for tensor in tensors)
        assert isinstance(moved, dict if isinstance(batch, UserDict) else type(batch))
        originals = [leaf for _, leaf in leaves(batch) if isinstance(leaf, Tensor)]
        assert all(tensor.device == torch.device("cpu") for tensor in originals)
    assert to_device(packed, meta).batch_sizes.device == torch.device("cpu")  # where PyTorch wants it


class Named(NamedTuple):
    """A batch as a named tuple."""

    x: Tensor
    rest: list[Tensor]


def kinds_of_tensors(x: Tensor) -> dict[str, Tensor]:
    """Return the same (4, 4) numbers in every form that PyTorch has for them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse and nested tensors are young, and quantized ones old
        return {
            "coo": x.to_sparse(),
            "csr": x.to_sparse_csr(),
            "csc": x.to_sparse_csc(),
            "bsr": x.to_sparse_bsr((2, 2)),
            "bsc": x.to_sparse_bsc((2, 2)),
            "nested": torch.nested.nested_tensor([x, x[:2]]),
            "jagged": torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged),
            "complex": torch.complex(x, x),
            "conjugate": torch.complex(x, x).conj(),
            "half": x.half(),
            "eight bits": x.to(torch.float8_e4m3fn),
            "quantized": torch.quantize_per_tensor(x, 0.5, 0, torch.quint8),
            "by channel": torch.quantize_per_channel(x, torch.ones(4), torch.zeros(4), 0, torch.qint8),
            "packed": pack_sequence([x, x[:2]]).data,
        }


@pytest.mark.parametrize("kind", kinds_of_tensors(torch.eye(4)))
@pytest.mark.parametrize("with_values", [False, True])
def test_batches_hold_tensors_of_every_kind(kind: str, with_values: bool) -> None:
    (x, y) = vectors(4)[0]
    numbers = torch.eye(4) + torch.ones(4, 4).triu(2)
    other = kinds_of_tensors(numbers)[kind]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        factor = batch[2].to_dense().sum() if with_values and kind in ("coo", "csr") else 1.0
        return factor * mean(model, batch[:2])

    operator = HessianOperator(Problem(model(), loss, (x, y, other)))
    assert torch.isfinite(operator.matvec(torch.ones(1011, dtype=torch.float64))).all()
    assert size_in_bytes(other) >= 16
    assert digest(other) == digest(kinds_of_tensors(numbers)[kind]) != digest(kinds_of_tensors(numbers * 2)[kind])


@pytest.mark.parametrize("kind", ["coo", "csr", "csc", "bsr", "nested", "jagged", "complex", "half", "eight bits"])
def test_non_finite_numbers_of_every_kind_are_named(kind: str) -> None:
    (x, y), numbers = vectors(4)[0], torch.eye(4)
    numbers[1, 1] = torch.nan
    message = r"batch 0 of the data holds NaN or Inf in batch\[2\] \(shape .*\); clean the data"
    with pytest.raises(ProblemError, match=message):
        Problem(model(), mean, (x, y, kinds_of_tensors(numbers)[kind])).prepare()


def test_tensors_without_values_are_refused() -> None:
    (x, y) = vectors(4)[0]
    with pytest.raises(ProblemError, match=r"batch\[2\] of batch 0 .* on the meta device, .*; give tensors"):
        Problem(model(), mean, (x, y, torch.ones(4, device="meta"))).prepare()


def test_a_sparse_adjacency_is_as_good_as_a_dense_one() -> None:
    torch.manual_seed(0)
    layer, x, dense = nn.Linear(3, 2).double(), torch.randn(5, 3).double(), torch.rand(5, 5).double().round()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.tanh(batch[1] @ model(batch[0])).square().mean()

    eye = torch.eye(8, dtype=torch.float64)
    wanted = dense_hessian(layer, lambda m: loss(m, (x, dense)), dict(layer.named_parameters()))
    for adjacency in (dense, dense.to_sparse()):
        for hvp in ("double_backward", "auto"):
            found = HessianOperator(Problem(layer, loss, (x, adjacency)), hvp=hvp).matmat(eye)
            assert float((found - wanted).norm()) <= 64 * torch.finfo(torch.float64).eps * float(wanted.norm())


# Data that can be read once


class Once(Reiterable):
    """Raises whenever it is read again, at a batch."""

    def __init__(self, batches: list[object], at: int | None, error: Exception) -> None:
        super().__init__(batches)
        self.at, self.error, self.passes = at, error, 0

    def __iter__(self) -> Iterator[object]:
        self.passes += 1
        if self.at is None and self.passes > 1:
            raise self.error
        return self.generate()

    def generate(self) -> Iterator[object]:
        for index, batch in enumerate(self.batches):
            if index == self.at and self.passes > 1:
                raise self.error
            yield batch


@pytest.mark.parametrize("at", [None, 0, 1])
@pytest.mark.parametrize("error", [ValueError("I/O operation on closed file"), RuntimeError("used up")])
def test_data_that_raises_when_it_is_read_again(at: int | None, error: Exception) -> None:
    problem = Problem(model(), mean, Once(vectors(4, 3), at, error))
    message = (
        rf"could be read once, but raised {type(error).__name__} at batch {at or 0} of a later pass: {error}; "
        r"give data that can be read again and again, as list\(data\) is"
    )
    with pytest.raises(ProblemError, match=message) as caught:
        HessianOperator(problem).matvec(torch.ones(1011, dtype=torch.float64))
    assert caught.value.__cause__ is error


def test_what_data_raises_at_first_is_its_own_error() -> None:
    class Broken(Squares):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            raise KeyError(index)

    with pytest.raises(KeyError):
        Problem(model(), mean, Broken()).prepare()


# Parameters


def test_selection_in_all_its_forms() -> None:
    network = model()
    network[0].requires_grad_(False)
    names = [name for name, _ in network.named_parameters()]
    forms = {
        None: names[2:],
        ".*": names,
        r"\d\.bias": ["0.bias", "2.bias", "4.bias"],
        ("4.bias", "0.weight"): ["0.weight", "4.bias"],
        (lambda name, parameter: parameter.ndim == 2): ["0.weight", "2.weight", "4.weight"],
    }
    for selection, wanted in forms.items():
        assert list(Problem(network, mean, vectors(4), parameters=selection).parameters) == wanted


@pytest.mark.parametrize("selection", ["head.*", ["head.weight"], lambda name, _: name == "head.weight"])
def test_tied_weight_by_its_second_name(selection: object) -> None:
    problem = Problem(SmallTransformer(), losses.causal_lm(), [(torch.ones(1, 4).long(),)], parameters=selection)
    assert list(problem.parameters) == ["embedding.weight"]
    assert problem.size == problem.model.head.weight.numel()


def with_parameter(parameter: nn.Parameter) -> nn.Module:
    network = mlp(nn.Tanh)
    network.register_parameter("odd", parameter)
    return network


@pytest.mark.parametrize(
    ("network", "selection", "message"),
    [
        (mlp(nn.Tanh), "1.*", "parameters='1.*' matches no parameter name in full; the closest names are"),
        (mlp(nn.Tanh), "0.weigth", r"closest names are '0\.weight'"),
        (mlp(nn.Tanh), "(", "is not a regular expression"),
        (mlp(nn.Tanh), ["0.weigth"], r"'0\.weigth' does not exist; the closest names are '0\.weight'"),
        (mlp(nn.Tanh), [], "selects no parameter"),
        (mlp(nn.Tanh), [3], "item of type int; give names"),
        (mlp(nn.Tanh), 3, "parameters is of type int; give None, a regular"),
        (mlp(nn.Tanh), lambda name, parameter: False, "selects no parameter; the first names are '0.weight'"),
        (mlp(nn.Tanh), lambda name: True, r"signature \(name\), which cannot .* \(name, parameter\): .*; give"),
        (mlp(nn.Tanh).requires_grad_(False), None, "no parameter has requires_grad=True; select frozen ones by name"),
        (nn.Tanh(), None, "the model .Tanh. has no parameters"),
        (with_parameter(nn.Parameter(torch.ones(2).int(), False)), "odd", r"'odd' has dtype torch\.int32; only float"),
        (with_parameter(nn.Parameter(torch.ones(2).bool(), False)), "odd", r"'odd' has dtype torch\.bool; only float"),
        (with_parameter(nn.Parameter(torch.empty(0))), "odd", "selected parameters have no elements: odd"),
        (with_parameter(nn.Parameter(torch.tensor([1.0, torch.nan]))), "0.*", "'odd' holds NaN or Inf"),
        (nn.Linear(8, 3, device="meta"), None, "'weight' is on the meta device .* load the weights"),
        (nn.Sequential(nn.LazyLinear(3)), None, r"'0\.weight' is not initialized .lazy module.; run one forward"),
        (torch.jit.trace(nn.Linear(8, 3), torch.ones(1, 8)), None, "TorchScript module; give the original"),
        ("model", None, r"model is of type str; give a torch\.nn\.Module"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_and_selections_that_are_refused(network: object, selection: object, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        Problem(network, mean, vectors(4), parameters=selection)


def test_hooked_and_inference_parameters_are_refused() -> None:
    network = model()
    network[0].weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    with pytest.raises(ProblemError, match=r"'0\.weight' has gradient hooks .*; remove them"):
        Problem(network, mean, vectors(4))
    assert Problem(network, mean, vectors(4), parameters="4.*").size == 63
    with torch.inference_mode():
        network = mlp(nn.Tanh)
    with pytest.raises(ProblemError, match=r"'0\.weight' was made in inference mode; build"):
        Problem(network, mean, vectors(4))


def backward_hook(*arguments: object) -> None:
    """Looks and does not touch, which cannot be told from outside."""


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
@pytest.mark.parametrize("register", ["full_backward_hook", "full_backward_pre_hook", "backward_hook"])
def test_module_backward_hooks_are_refused(register: str) -> None:
    network = model()
    network.register_forward_hook(backward_hook)
    problem = Problem(network, mean, vectors(4))
    handle = getattr(network[1], f"register_{register}")(backward_hook)
    with pytest.raises(ProblemError, match=r"module '1' has backward hooks .*; remove them"):
        Problem(network, mean, vectors(4))
    with pytest.raises(ProblemError, match=r"module '1' has backward hooks .*; remove them"):
        problem.prepare()
    handle.remove()
    problem.prepare()


@pytest.mark.parametrize("register", ["full_backward_hook", "full_backward_pre_hook"])
def test_global_backward_hooks_are_refused(register: str) -> None:
    handle = getattr(nn.modules.module, f"register_module_{register}")(backward_hook)
    try:
        with pytest.raises(ProblemError, match=r"backward hooks on all modules .*; remove them"):
            Problem(model(), mean, vectors(4))
    finally:
        handle.remove()
    assert Problem(model(), mean, vectors(4)).size == 1011


def test_parameters_on_two_devices() -> None:
    # The meta device is refused earlier, so a CPU-only machine needs a stand-in to have two devices.
    class Elsewhere(nn.Parameter):
        @property
        def device(self) -> torch.device:
            return torch.device("cuda:0")

    network = model()
    network[0].bias = Elsewhere(torch.zeros(32, dtype=torch.float64))
    with pytest.raises(ProblemError, match=r"several devices \(.*'0\.bias' on cuda:0\); move them to one device"):
        Problem(network, mean, vectors(4))


def test_columns_and_vectors() -> None:
    problem = Problem(model(), mean, vectors(4))
    tensors = [parameter.detach() for parameter in problem.parameters.values()]
    vector = problem.flatten(tensors)
    assert problem.offsets == [0, 256, 288, 928, 948, 1008]
    assert vector.shape == (problem.size,) == (1011,)
    assert all(torch.equal(a, b) for a, b in zip(problem.unflatten(vector), tensors, strict=True))
    assert problem.unflatten(vector)[1].data_ptr() == vector[256:].data_ptr()
    assert [problem.describe(column) for column in (0, 255, 256, 1010)] == ["0.weight", "0.weight", "0.bias", "4.bias"]
    assert problem.parameter_norm_squared == pytest.approx(float(vector @ vector), rel=1e-14)
    assert (problem.dtype, problem.device) == (torch.float64, torch.device("cpu"))
    with pytest.raises(ProblemError, match="column 1011 does not exist; give one of 0 to 1010"):
        problem.describe(1011)
    with pytest.raises(ProblemError, match="flatten got tensors of shapes"):
        problem.flatten(tensors[1:])
    with pytest.raises(ProblemError, match=r"shape \(1010,\); give a vector of shape \(1011,\)"):
        problem.unflatten(vector[1:])


def test_empty_parameter_among_others_has_no_columns() -> None:
    network, data = with_parameter(nn.Parameter(torch.empty(0))).double(), vectors(4)
    problem, without = (Problem(network, mean, data, parameters=selection) for selection in (None, r"\d.*"))
    vector = torch.ones(problem.size, dtype=torch.float64)
    assert list(problem.parameters) == ["odd", *without.parameters]
    assert problem.describe(0) == "0.weight"
    assert torch.equal(HessianOperator(problem).matvec(vector), HessianOperator(without).matvec(vector))


# Losses


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: mean(m, b).item(), r"of type float; return a scalar tensor with its graph \(no .item"),
        (lambda m, b: None, "of type NoneType; return a scalar"),
        (lambda m, b: (mean(m, b), 1, 2), "of type tuple; return a scalar"),
        (lambda m, b: functional.cross_entropy(m(b[0]), b[1], reduction="none"), r"shape \(4,\); return a scalar"),
        (lambda m, b: mean(m, b).long(), r"dtype torch\.int64; return a real"),
        (lambda m, b: mean(m, b) * 1j, r"dtype torch\.complex128; return a real"),
        (lambda m, b: mean(m, b).detach(), "does not depend on the selected parameters .*no_grad"),
        (lambda m, b: b[0].requires_grad_().sum(), "does not depend on the selected parameters"),
        (lambda m, b: mean(m, b) * torch.inf, "the loss of batch 0 is inf; a finite loss"),
        (lambda m, b: mean(m, b) * (torch.nan if len(b[1]) == 3 else 1), "the loss of batch 1 is nan; a finite loss"),
        (lambda m, b: (mean(m, b), -1), "count of batch 0 is -1.0; return a finite count"),
        (lambda m, b: (mean(m, b), torch.tensor(torch.nan)), "count of batch 0 is nan; return a finite count"),
        (lambda m, b: (mean(m, b), b[0]), r"count of batch 0 has shape \(4, 8\); return \(sum, count\)"),
        (lambda m, b: (mean(m, b), "4"), r"count of batch 0 is of type str; return \(sum, count\)"),
        (lambda m, b: (mean(m, b), 0), r"batch 0 is the sum \d.* of 0 terms; return the number of the terms, or"),
        (lambda m, b: (0 * mean(m, b), 0), "the 2 batches hold 0 loss terms; at least one"),
        (lambda m, b: (total(m, b), 4) if len(b[1]) == 4 else mean(m, b), "batch 1 is a mean, unlike that of batch 0"),
    ],
)  # fmt: skip
def test_losses_that_are_refused(loss: object, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        Problem(model(), loss, vectors(4, 3)).prepare()


def test_loss_and_mode_that_are_refused() -> None:
    with pytest.raises(ProblemError, match="loss of type str is not callable; give a function"):
        Problem(model(), "mean", vectors(4))
    with pytest.raises(ProblemError, match="mode is 'test'; give one of 'eval', 'train', 'as_is'"):
        Problem(model(), mean, vectors(4), mode="test")


@pytest.mark.parametrize(
    ("criterion", "name"),
    [
        (nn.CrossEntropyLoss(), "CrossEntropyLoss"),
        (functional.cross_entropy, "cross_entropy"),
        (partial(functional.cross_entropy, label_smoothing=0.1), "cross_entropy"),
    ],
)
def test_criterion_in_place_of_a_loss(criterion: object, name: str) -> None:
    with pytest.raises(ProblemError, match=rf"loss is the criterion {name}, .*; give hesd_fast\.losses\.supervised\("):
        Problem(model(), criterion, vectors(4))


def test_loss_and_accuracy_in_place_of_sum_and_count() -> None:
    def with_accuracy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return mean(model, batch), torch.tensor(0.75)

    with pytest.warns(HESDWarning, match=r"batch 1 is a pair, which means \(sum, count\): .* count is 0\.75") as warned:
        Problem(model(), with_accuracy, vectors(1, 4, 3)).prepare()
    assert len(warned) == 1


def test_small_counts_that_are_right_do_not_warn() -> None:
    light = losses.supervised(nn.CrossEntropyLoss(weight=torch.full((3,), 0.1, dtype=torch.float64)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Problem(model(), light, vectors(4)).total_count == pytest.approx(0.4, rel=1e-14)
        Problem(model(), lambda m, b: (mean(m, b), 0.5), vectors(1)).prepare()


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (True, "is of type bool; return"),
        (torch.tensor(True), r"has dtype torch\.bool; return"),
        (np.complex128(4), "is of type complex128; return"),
        (10**400, "is inf; return a finite count"),
    ],
)
def test_counts_that_are_no_numbers_of_terms_are_refused(count: object, message: str) -> None:
    with pytest.raises(ProblemError, match=f"the count of batch 0 {message}"):
        Problem(model(), lambda m, b: (mean(m, b) * 4, count), vectors(4)).prepare()


@pytest.mark.parametrize(("count", "total"), [(1.7e308, "inf"), (5e-324, "9.88131e-324")])
def test_counts_that_cannot_be_divided_by_are_refused(count: float, total: str) -> None:
    problem = Problem(model(), lambda m, b: (mean(m, b), count), vectors(1, 1))
    with pytest.raises(ProblemError, match=f"the 2 batches hold {total} loss terms, too few or too many.*; give"):
        problem.prepare()


@pytest.mark.parametrize("loss", [lambda: 0, lambda model: 0, lambda model, batch, more: 0, nn.Linear(2, 2)])
def test_a_loss_of_other_arguments_is_refused(loss: object) -> None:
    with pytest.raises(
        ProblemError, match=r"loss has the arguments .* with \(model, batch\): .*; give a function loss"
    ):
        Problem(model(), loss, vectors(4))


def test_a_count_of_other_arguments_is_refused() -> None:
    with pytest.raises(
        ProblemError, match=r"count has the arguments \(\), .* with \(batch\): .*; give a function count"
    ):
        Problem(model(), mean, vectors(4), count=lambda: 4)


def test_a_graph_that_the_loss_has_used_up_is_named() -> None:
    def loss(model: nn.Module, batch: object) -> torch.Tensor:
        value = mean(model, batch)
        value.backward()
        return value

    with pytest.raises(OperatorError, match=r"backward through the graph a second time.*; return .*no \.backward\(\)"):
        Problem(model(), loss, vectors(4)).prepare()


def test_an_error_of_the_users_own_backward_pass_is_handed_on() -> None:
    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            raise error

    error = RuntimeError("mine")
    with pytest.raises(RuntimeError) as caught:
        Problem(model(), lambda m, b: Refusing.apply(mean(m, b)), vectors(4)).prepare()
    assert caught.value is error


@pytest.mark.parametrize("batch", [[torch.ones(4, 8)], {"x": torch.ones(4, 8)}], ids=["list", "mapping"])
def test_a_batch_that_holds_itself_is_read(batch: object) -> None:
    if isinstance(batch, list):
        batch.append(batch)
    else:
        batch["self"] = batch

    def loss(m: nn.Module, b: object) -> torch.Tensor:
        return m(b[0] if isinstance(b, list) else b["x"]).square().mean()

    problem = Problem(model().float(), loss, [batch])
    assert problem.loss_value == float(loss(problem.model, batch).detach())


def test_memory_that_parameters_share_is_refused() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight.data = tied[0].weight.data.T
    message = r"'0\.weight' and '1\.weight' share memory.*; tie them.*head\.weight = embedding\.weight"
    for selection in (None, ["0.weight"], ["1.weight"]):
        with pytest.raises(ProblemError, match=message):
            Problem(tied, mean, vectors(4), parameters=selection)
    Problem(tied, mean, vectors(4), parameters=r".*\.bias")
    expanded = nn.Linear(8, 3)
    expanded.bias.data = torch.zeros(1).expand(3)
    with pytest.raises(
        ProblemError, match=r"'bias', of shape \(3,\) and stride \(0,\), share memory.*; give it memory"
    ):
        Problem(expanded, mean, vectors(4))


def test_memory_that_parameters_share_out_is_as_good_as_their_own() -> None:
    flat = torch.randn(4, 8)
    parted = nn.ParameterList([nn.Parameter(part) for part in (flat[:, :3], flat[:2, 3:], flat[2:, 3:], flat[:0])])
    parted.append(nn.Parameter(torch.randn(6, 5).T[::2]))
    problem = Problem(parted, lambda m, b: b * sum((p**3).sum() for p in m), torch.tensor(2.0))
    product = HessianOperator(problem).matvec(torch.ones(problem.size))
    assert torch.equal(product, 12 * torch.cat([p.detach().reshape(-1) for p in parted]))


def test_parameters_of_8_bits_may_be_there_but_have_no_hessian() -> None:
    network = nn.Linear(8, 3)
    network.register_parameter("scale", nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False))
    assert Problem(network, lambda m, b: m(b[0].float()).square().mean(), vectors(4)).loss_value > 0
    with pytest.raises(ProblemError, match=r"'scale' has dtype torch\.float8_e4m3fn, .*; convert it"):
        Problem(network, mean, vectors(4), parameters=".*")
    network.scale.data = torch.full((3,), torch.nan).to(torch.float8_e4m3fn)
    with pytest.raises(ProblemError, match="'scale' holds NaN or Inf"):
        Problem(network, mean, vectors(4))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_that_is_made_within_a_session_is_in_none(copied: object) -> None:
    problem = Problem(model(), mean, vectors(4, 3))
    vector = torch.ones(problem.size, dtype=torch.float64)
    wanted = HessianOperator(problem).matvec(vector)
    with problem.session():
        copy_of_it = copied(problem)
    assert torch.equal(HessianOperator(copy_of_it).matvec(vector), wanted)


@pytest.mark.parametrize("count", [4, 4.0, np.int64(4), np.float32(4), torch.tensor(4), torch.tensor(4.0)])
def test_counts_of_every_type(count: object) -> None:
    problem = Problem(model(), lambda m, b: (mean(m, b) * 4, count), vectors(4))
    assert problem.total_count == 4.0
    assert problem.loss_value == pytest.approx(float(mean(problem.model, problem.data[0]).detach()), rel=1e-14)


def test_batch_without_terms_contributes_nothing() -> None:
    torch.manual_seed(0)
    (full, empty) = vectors(4, 0)
    with_empty, without = (Problem(model(), mean, data) for data in ([full, empty], [full]))
    vector = torch.ones(without.size, dtype=torch.float64)
    assert with_empty.loss_value == without.loss_value
    assert torch.equal(HessianOperator(with_empty).matvec(vector), HessianOperator(without).matvec(vector))


def test_loss_with_its_own_random_source_is_named() -> None:
    generator = torch.Generator().manual_seed(0)

    class OwnDropout(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (torch.rand(x.shape, generator=generator) > 0.5) if self.training else x

    network = nn.Sequential(model(), OwnDropout())
    vector = torch.ones(1011, dtype=torch.float64)
    with pytest.raises(OperatorError, match=r"not deterministic: batch 0 gave .*or use mode='eval' for 1 .OwnDropout."):
        HessianOperator(Problem(network, mean, vectors(4), mode="train")).matvec(vector)
    HessianOperator(Problem(network, mean, vectors(4), mode="eval")).matvec(vector)


def test_loss_that_counts_its_calls_is_named() -> None:
    calls = []

    def drifting(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(1)
        return mean(model, batch) * (1 + 1e-12 * len(calls))

    with pytest.raises(OperatorError, match=r"not deterministic: batch 0 gave .*a counter that forward or loss keeps"):
        HessianOperator(Problem(model(), drifting, vectors(4, 3))).matvec(torch.ones(1011, dtype=torch.float64))


def test_terms_need_a_session() -> None:
    problem = Problem(model(), mean, vectors(4))
    with pytest.raises(RuntimeError, match=r"use `with problem.session"):
        next(problem.terms()).evaluate()


def test_terms_add_up_to_the_loss() -> None:
    problem = Problem(Wrapped().double(), CROSS_ENTROPY, vectors(4, 3, 1))
    with problem.session():
        total = sum(term.weight * float(term.evaluate().detach()) for term in problem.terms())
    assert problem.loss_value == pytest.approx(total, rel=1e-14)
    assert problem.total_count == 8


def test_single_batches_pass_through() -> None:
    batch = {"x": torch.ones(2)}
    assert as_batches(batch) == [batch]
