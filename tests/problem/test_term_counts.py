"""How many terms a mean is of: dense Hessians over all data at once, where it can be told and where it is given."""

from __future__ import annotations

import functools
import warnings
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from catalogue import CASES, Case
from dense import dense_hessian
from models import gpt2
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, Dataset

import hesd_fast as hesd
from hesd_fast.errors import HESDWarning, ProblemError
from hesd_fast.operators import HessianOperator
from hesd_fast.problem.losses import causal_lm, supervised
from hesd_fast.problem.problem import Problem
from hesd_fast.problem.reading_check import ReadingCheck

# Hessians of a few dozen float64 numbers, by two ways of differentiating.
ROUNDING = 256 * torch.finfo(torch.float64).eps

REMEDIES = r"return \(sum, count\) from the loss, or give count=, a function of the batch"


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def hessian(problem: Problem) -> Tensor:
    return HessianOperator(problem, hvp="double_backward").matmat(torch.eye(problem.size))


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).norm()) <= ROUNDING * float(wanted.norm())


# Every kind of batch whose mean is not one over the leading dimension of its first tensor


class Detector(nn.Module):
    """Images of different sizes and boxes of different numbers, in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.box = nn.Conv2d(3, 2, 3), nn.Linear(2, 4)

    def forward(self, images: Any, targets: Any) -> Tensor:
        found = [self.box(torch.tanh(self.body(image[None])).mean((2, 3))) for image in images]
        losses = [(box - target["boxes"]).square().mean() for box, target in zip(found, targets, strict=True)]
        return torch.stack(losses).mean()


def detections(numbers: list[int], kind: type) -> list[Any]:
    def sample(k: int) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.randn(3, 5 + k % 3, 6), {"boxes": torch.randn(1 + k % 4, 4)}

    return [tuple(kind(part) for part in zip(*map(sample, range(n)), strict=True)) for n in numbers]


class Recurrent(nn.Module):
    """Takes (steps, samples, 3) or a packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor | PackedSequence) -> Tensor:
        return self.head(self.rnn(x)[1][0])


class Graphs(nn.Module):
    """Pools the nodes of each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, graph: Any) -> Tensor:
        h = self.layer(graph.x)
        h = torch.tanh(h + torch.zeros_like(h).index_add(0, graph.edges[1], h[graph.edges[0]]))
        return self.head(torch.zeros(len(graph.y), 4).index_add(0, graph.ids, h))


@dataclass
class GraphBatch:
    """A graph batch as a dataclass."""

    x: Tensor
    edges: Tensor
    ids: Tensor
    y: Tensor


class GraphObject:
    """A graph batch as an object that is nothing else, with slots."""

    __slots__ = ("edges", "ids", "x", "y")

    def __init__(self, x: Tensor, edges: Tensor, ids: Tensor, y: Tensor) -> None:
        self.x, self.edges, self.ids, self.y = x, edges, ids, y


class GraphStore:
    """A graph batch that holds all it has behind ``to_dict``, as those of torch_geometric."""

    def __init__(self, **parts: Tensor) -> None:
        self._parts = parts

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_") or name not in self._parts:
            raise AttributeError(name)
        return self._parts[name]

    def to_dict(self) -> dict[str, Tensor]:
        return dict(self._parts)


def graphs(numbers: list[int], kind: Callable[..., Any]) -> list[Any]:
    def batch(n: int) -> Any:
        sizes = torch.tensor([2 + (n + k) % 4 for k in range(n)])
        nodes = int(sizes.sum())
        ids = torch.repeat_interleave(torch.arange(n), sizes)
        return kind(x=torch.randn(nodes, 3), edges=torch.randint(nodes, (2, nodes)), ids=ids, y=torch.randn(n, 1))

    return [batch(n) for n in numbers]


class Tagger(nn.Module):
    """Labels every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 3), nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).tanh())


def tokens(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.randint(7, shape), torch.randint(3, shape)


def graph_loss(model: nn.Module, batch: Any) -> Tensor:
    return functional.mse_loss(model(batch), batch.y)


def squares(model: nn.Module, batch: Any) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


def token_loss(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def pairs(numbers: tuple[int, ...]) -> list[Any]:
    return [(torch.randn(n, 3), torch.randn(n, 2)) for n in numbers]


def packed(lengths: list[int]) -> tuple[PackedSequence, Tensor]:
    return pack_sequence([torch.randn(t, 3) for t in lengths]), torch.randn(len(lengths), 1)


def text_loss(model: nn.Module, batch: Any) -> Tensor:
    lengths = torch.tensor([[float(len(text))] for text in ([batch] if isinstance(batch, str) else batch)])
    return model(lengths).square().mean()


class Bags(nn.Linear):
    """Classifies the mean of the rows of a sample."""

    def __init__(self) -> None:
        super().__init__(3, 2)


def bags(number: int, rows: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(rows, 3), torch.tensor(k % 2)) for k in range(number)]


def sample_by_sample(model: nn.Module, samples: Any) -> Tensor:
    losses = [functional.cross_entropy(model(x).mean(0), torch.as_tensor(label)) for x, label in samples]
    return torch.stack(losses).mean()


@dataclass
class Plain:
    """A batch or a sample as a dataclass, without a number."""

    x: Tensor
    y: Tensor


@dataclass
class Ambiguous:
    """Batches of different shapes whose number of terms shapes do not tell."""

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    batches: Callable[[], list[Any]]
    count: Callable[[Any], int]
    cause: str

    def __str__(self) -> str:
        return self.name


AMBIGUOUS = [
    Ambiguous("lists", Detector, lambda m, b: m(*b), lambda: detections([5, 4, 1], list), lambda b: len(b[0]),
              r"batch\[0\]\[0\] sits in a list, which may be one of samples"),
    Ambiguous("tuples", Detector, lambda m, b: m(*b), lambda: detections([3, 4], tuple), lambda b: len(b[0]),
              r"batch\[1\]\[0\]\['boxes'\] sits in a tuple, which may be one of samples"),
    Ambiguous("samples-in-a-list", Bags, sample_by_sample, lambda: [bags(2, 5), bags(2, 7)], len,
              r"batch\[0\]\[0\] sits in a list, which may be one of samples"),
    Ambiguous("mappings-in-a-list", Bags, lambda m, b: sample_by_sample(m, [tuple(s.values()) for s in b]),
              lambda: [[{"x": x, "label": y} for x, y in bags(2, t)] for t in (5, 7)], len,
              r"batch\[0\]\['x'\] sits in a list, which may be one of samples"),
    Ambiguous("dataclasses-in-a-list", Bags, lambda m, b: sample_by_sample(m, [(s.x, s.y) for s in b]),
              lambda: [[Plain(*s) for s in bags(2, t)] for t in (5, 7)], len,
              r"batch\[0\]\.x sits in a list, which may be one of samples"),
    Ambiguous("samples-in-a-tuple", Bags, sample_by_sample, lambda: [tuple(bags(2, 5)), tuple(bags(2, 7))], len,
              r"batch\[0\]\[0\] sits in a tuple, which may be one of samples"),
    Ambiguous("one-sample", Bags, lambda m, b: sample_by_sample(m, [b]), lambda: [bags(1, 5)[0], bags(1, 50)[0]],
              lambda b: 1, r"batch\[0\] has no tensor beside it, only batch\[1\], so the batch may be one sample"),
    Ambiguous("one-sample-with-a-number", Bags, lambda m, b: sample_by_sample(m, [(b["x"], b["label"])]),
              lambda: [{"x": bags(1, t)[0][0], "label": t % 2} for t in (5, 50)], lambda b: 1,
              r"batch\['x'\] has no tensor beside it, only batch\['label'\], so the batch may be one sample"),
    Ambiguous("one-sample-with-a-text", Bags, lambda m, b: sample_by_sample(m, [(b[0], len(b[1]))]),
              lambda: [(bags(1, 5)[0][0], "a"), (bags(1, 50)[0][0], "")], lambda b: 1,
              r"batch\[0\] has no tensor beside it, only batch\[1\], so the batch may be one sample"),
    Ambiguous("one-sample-with-several-labels", Bags, lambda m, b: sample_by_sample(m, [(b[0], b[1][0])]),
              lambda: [(bags(1, 5)[0][0], [1, 0]), (bags(1, 50)[0][0], [0, 0])], lambda b: 1,
              r"batch\[0\] has no tensor beside it, only batch\[1\], so the batch may be one sample"),
    Ambiguous("tuples-of-images", lambda: nn.Conv2d(3, 1, 3),
              lambda m, b: torch.stack([m(x[None]).square().mean() for x in b]).mean(),
              lambda: [tuple(torch.randn(3, 5, 5) for _ in range(n)) for n in (4, 2)], len,
              r"their structures differ: batch\[2\] is not the same in both"),
    Ambiguous("time-first", Recurrent, squares,
              lambda: [(torch.randn(4, n, 3), torch.randn(n, 1)) for n in (6, 2)], lambda b: len(b[1]),
              "the leading dimensions of its tensors differ"),
    Ambiguous("time-first-both", lambda: nn.Linear(3, 2), squares,
              lambda: [(torch.randn(4, n, 3), torch.randn(4, n, 2)) for n in (6, 2)], lambda b: b[0].shape[1],
              r"batch\[0\] differs in more than its leading dimension, \(4, 6, 3\) and \(4, 2, 3\), and a mean over"),
    Ambiguous("tokens", Tagger, token_loss, lambda: [tokens((3, 5)), tokens((2, 7))], lambda b: b[0].numel(),
              r"batch\[0\] differs in more than its leading dimension, \(3, 5\) and \(2, 7\), and a mean over tokens"),
    Ambiguous("packed", Recurrent, squares, lambda: [packed([5, 4, 4]), packed([2])], lambda b: len(b[1]),
              r"batch\[0\] differs in more than its leading dimension, \(3, 13, 3\) and \(1, 2, 3\)"),
    Ambiguous("graph-dataclass", Graphs, graph_loss, lambda: graphs([3, 5], GraphBatch), lambda b: len(b.y),
              "the leading dimensions of its tensors differ"),
    Ambiguous("graph-mapping", Graphs, lambda m, b: graph_loss(m, SimpleNamespace(**b)),
              lambda: graphs([3, 5], dict), lambda b: len(b["y"]), "the leading dimensions of its tensors differ"),
    Ambiguous("graph-object", Graphs, graph_loss, lambda: graphs([3, 5], GraphObject), lambda b: len(b.y),
              "batch of type GraphObject is neither a tensor, a container nor a plain value"),
    Ambiguous("graph-namespace", Graphs, graph_loss, lambda: graphs([3, 5], SimpleNamespace), lambda b: len(b.y),
              "batch of type SimpleNamespace is neither"),
    Ambiguous("graph-store", Graphs, graph_loss, lambda: graphs([3, 5], GraphStore), lambda b: len(b.y),
              "batch of type GraphStore is neither"),
    Ambiguous("texts", lambda: nn.Linear(1, 2), text_loss, lambda: [["a", "bc", "def"], ["ghij", "k"]], len,
              "no tensor has a leading dimension"),
    Ambiguous("adjacency", lambda: nn.Linear(3, 1), lambda m, b: (b[1] @ m(b[0])).square().mean(),
              lambda: [(torch.randn(n, 3), torch.rand(n, n).round()) for n in (5, 3)], lambda b: len(b[0]),
              r"batch\[1\] differs in more than its leading dimension, \(5, 5\) and \(3, 3\)"),
    Ambiguous("sparse-adjacency", lambda: nn.Linear(3, 1), lambda m, b: torch.sparse.mm(b[1], m(b[0])).square().mean(),
              lambda: [(torch.randn(n, 3), torch.rand(n, n).round().to_sparse()) for n in (5, 3)], lambda b: len(b[0]),
              r"batch\[1\] differs in more than its leading dimension, \(5, 5\) and \(3, 3\)"),
    Ambiguous("nested", lambda: nn.Linear(3, 2),
              lambda m, b: torch.stack([m(part).square().mean() for part in b[0].unbind()]).mean(),
              lambda: [(torch.nested.nested_tensor([torch.randn(t, 3) for t in ts]),) for ts in ([2, 4, 3], [5])],
              lambda b: b[0].size(0), r"batch\[0\] differs in more than its leading .*, \(3, 27\) and \(1, 15\)"),
    Ambiguous("missing", lambda: nn.Linear(3, 2), squares,
              lambda: [(*pair, mask) for pair, mask in zip(pairs((4, 2)), (None, torch.ones(2)), strict=True)],
              lambda b: len(b[0]), r"their structures differ: batch\[2\] is not the same in both"),
    Ambiguous("plain-values", lambda: nn.Linear(3, 2), squares,
              lambda: [(*pair, names) for pair, names in zip(pairs((4, 2)), (["a", "b"], ["c"]), strict=True)],
              lambda b: len(b[0]), r"batch\[2\] has 2 items and 1, unlike the leading dimension"),
]  # fmt: skip


def weighted_mean(case: Ambiguous, batches: list[Any]) -> Callable[[nn.Module], Tensor]:
    """Return the mean over all terms of all batches, each term as often as it is there."""
    counts = [case.count(batch) for batch in batches]
    return lambda model: sum(n * case.loss(model, b) for n, b in zip(counts, batches, strict=True)) / sum(counts)


@pytest.mark.parametrize("case", AMBIGUOUS, ids=str)
def test_terms_that_shapes_do_not_tell_are_asked_for(case: Ambiguous) -> None:
    model, batches = case.model(), case.batches()
    with pytest.raises(ProblemError, match=rf"returns a mean, .* cannot be told here: {case.cause}.*{REMEDIES}"):
        Problem(model, case.loss, batches).prepare()
    wanted = dense_hessian(model, weighted_mean(case, batches), dict(model.named_parameters()))
    given = Problem(model, case.loss, batches, count=case.count)
    assert given.total_count == sum(map(case.count, batches))
    assert given.loss_description == f"the mean over {int(given.total_count)} terms, counted by count="
    assert_same(hessian(given), wanted)

    def with_count(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        return case.loss(model, batch) * case.count(batch), case.count(batch)

    returned = Problem(model, with_count, batches)
    assert_same(hessian(returned), wanted)
    assert returned.loss_description.endswith(f"{int(given.total_count)} terms, counted by the loss, (sum, count)")


@pytest.mark.parametrize("case", AMBIGUOUS, ids=str)
def test_one_batch_needs_no_count(case: Ambiguous) -> None:
    model, batch = case.model(), case.batches()[0]
    problem = Problem(model, case.loss, [batch])
    wanted = dense_hessian(model, lambda m: case.loss(m, batch), dict(model.named_parameters()))
    assert_same(hessian(problem), wanted)
    between_batches = any(words in case.cause for words in ("in more than", "structures", "items"))
    assert problem.loss_description.startswith("the loss of one batch, as returned")
    assert problem.loss_description.endswith("terms") == between_batches


# Of batches that are ambiguous only next to others: the terms of two of them, as their leading dimension counts them.
LEADING_DIMENSIONS = {
    "tuples-of-images": 6, "time-first-both": 8, "tokens": 6, "packed": 6, "adjacency": 10, "sparse-adjacency": 10,
    "nested": 6, "missing": 8, "plain-values": 8,
}  # fmt: skip


@pytest.mark.parametrize("case", AMBIGUOUS, ids=str)
def test_batches_of_the_same_shapes_need_no_count(case: Ambiguous) -> None:
    torch.manual_seed(1)
    model, first = case.model(), case.batches()[0]
    torch.manual_seed(1)
    case.model()
    batches = [first, case.batches()[0]]
    if case.name == "texts":
        with pytest.raises(ProblemError, match=f"no tensor has a leading dimension.*{REMEDIES}"):
            Problem(model, case.loss, batches).prepare()
        return
    problem = Problem(model, case.loss, batches)
    wanted = dense_hessian(model, weighted_mean(case, batches), dict(model.named_parameters()))
    assert_same(hessian(problem), wanted)
    assert problem.total_count == LEADING_DIMENSIONS.get(case.name, 2)
    assert ("leading dimension" in problem.loss_description) == (case.name in LEADING_DIMENSIONS)


def test_ambiguous_batches_of_the_same_shapes_are_a_mean_of_means() -> None:
    problem = Problem(Recurrent(), squares, [(torch.randn(4, 2, 3), torch.randn(2, 1)) for _ in range(3)])
    assert problem.loss_description == "the mean of the mean losses of 3 batches of the same shapes"
    assert problem.total_count == 3


@pytest.mark.parametrize("data", [
    [None], [None] * 3, (), [()] * 3, {}, [{}] * 2, [[]] * 2, ["text"], [3, 4], [np.float64(2)] * 3, torch.tensor(2.0),
    [(torch.tensor(2.0),)] * 2, [{"points": 5}, {"points": 5}], [(None, 2.5, torch.float32)] * 2, [("a", None, 2)],
], ids=repr)  # fmt: skip
def test_batches_of_nothing_in_particular(data: object) -> None:
    """As a loss has them that makes its points itself."""
    model, x = nn.Linear(3, 2), torch.randn(5, 3)

    def loss(model: nn.Module, batch: object) -> Tensor:
        return model(x).square().mean()

    wanted = dense_hessian(model, lambda m: loss(m, None), dict(model.named_parameters()))
    assert_same(hessian(Problem(model, loss, data)), wanted)


@pytest.mark.parametrize("data", [["some text", "other text"], [("a", None, 2)] * 2, [object(), object()]])
def test_batches_whose_terms_nothing_shows(data: list[object]) -> None:
    problem = Problem(nn.Linear(3, 2), lambda m, b: m.weight.square().mean(), data)
    with pytest.raises(ProblemError, match=f"cannot be told here: .*batch 0 has no tensor; .*{REMEDIES}"):
        problem.prepare()


# Leading dimensions that count


class Named(Dataset):
    """Samples with names and nested parts, for a DataLoader to collate."""

    def __init__(self) -> None:
        self.x, self.y = torch.randn(7, 3), torch.randn(7, 2)

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Any:
        return self.x[index], {"target": self.y[index], "name": f"sample {index}"}, (self.y[index], index)


def test_samples_as_a_loader_collates_them_are_counted() -> None:
    model, dataset = nn.Linear(3, 2), Named()
    for data in (dataset, DataLoader(dataset, batch_size=5)):
        problem = Problem(
            model,
            lambda m, b: functional.mse_loss(m(b[0]), b[1]["target"]),
            data,
            batch_size=3 if data is dataset else None,
        )
        wanted = dense_hessian(
            model, lambda m: functional.mse_loss(m(dataset.x), dataset.y), dict(model.named_parameters())
        )
        assert_same(hessian(problem), wanted)
        assert problem.loss_description == "the mean over 7 terms, counted by the batches' leading dimension"


@dataclass(frozen=True)
class Pair:
    """A batch as a frozen dataclass, with a number."""

    x: Tensor
    y: Tensor
    scale: float = 1.0


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: {"x": x, "y": y},
        lambda x, y: UserDict({"y": y, "x": x, "temperature": torch.tensor(2.0)}),
        lambda x, y: Pair(x, y),
        lambda x, y: (x.numpy(), y),
        lambda x, y: {"in": {"x": x}, "out": ((y,), "name", 3)},
        lambda x, y: (x, y, torch.zeros(len(x), 4).to_sparse()),
        lambda x, y: (x, y, list(range(len(x)))),
        lambda x, y: (x, y, (224, 224)),
    ],
)
def test_uneven_batches_of_samples_are_one_batch(form: Callable[[Tensor, Tensor], Any]) -> None:
    model, x, y = nn.Linear(3, 2), torch.randn(7, 3), torch.randn(7, 2)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        leaves = [leaf for _, leaf in hesd.problem.batches.leaves(batch)]
        tensors = [torch.as_tensor(leaf) for leaf in leaves if isinstance(leaf, Tensor | np.ndarray)]
        inputs, targets = (next(t for t in tensors if t.ndim == 2 and t.shape[1] == n) for n in (3, 2))
        return functional.mse_loss(model(inputs), targets)

    problem = Problem(model, loss, [form(x[:5], y[:5]), form(x[5:], y[5:])])
    wanted = dense_hessian(model, lambda m: functional.mse_loss(m(x), y), dict(model.named_parameters()))
    assert_same(hessian(problem), wanted)
    assert problem.loss_description == "the mean over 7 terms, counted by the batches' leading dimension"


def test_packed_sequences_of_as_many_steps_are_counted_by_sequences() -> None:
    model, batches = Recurrent(), [packed([4, 3]), packed([3, 2, 2])]
    problem = Problem(model, squares, batches)
    wanted = dense_hessian(
        model,
        lambda m: sum(len(b[1]) * squares(m, b) for b in batches) / 5,
        dict(model.named_parameters()),
    )
    assert problem.total_count == 5
    assert_same(hessian(problem), wanted)


def test_criteria_of_ones_own_in_supervised_follow_the_same_rule() -> None:
    def criterion(output: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(output.flatten(0, 1), targets.flatten())

    model = nn.Linear(3, 4)
    batches = [(torch.randn(4, n, 3), torch.randint(4, (4, n))) for n in (5, 2)]
    with pytest.raises(ProblemError, match=f"a mean over tokens, pixels or steps cannot be told.*{REMEDIES}"):
        Problem(model, supervised(criterion), batches).prepare()
    x, y = (torch.cat(parts, 1) for parts in zip(*batches, strict=True))
    wanted = dense_hessian(model, lambda m: criterion(m(x), y), dict(model.named_parameters()))
    assert_same(hessian(Problem(model, supervised(criterion), batches, count=lambda b: b[1].numel())), wanted)


# Targets that a mean leaves out


def language_batches() -> list[dict[str, Tensor]]:
    batches = [{"input_ids": torch.randint(13, (2, 5)), "attention_mask": torch.ones(2, 5).long()} for _ in range(2)]
    for batch, kept in zip(batches, (5, 2), strict=True):
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][1, kept:] = -100
    batches[0]["labels"][0, 0] = -100
    return batches


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def test_ignored_labels_of_a_model_that_computes_its_loss() -> None:
    model, batches = gpt2().double(), language_batches()
    with pytest.raises(
        ProblemError,
        match=r"batch\['labels'\] of batch 0 holds -100, .*if these are no labels, give count=; use "
        rf"hesd_fast\.losses\.causal_lm\(\) .*{REMEDIES}",
    ):
        Problem(model, own_loss, batches).prepare()
    counted = Problem(model, own_loss, batches, count=lambda b: (b["labels"][:, 1:] != -100).sum())
    ready = Problem(model, causal_lm(), batches)
    assert counted.total_count == ready.total_count == 13
    # The model computes its loss in float32.
    assert abs(counted.loss_value - ready.loss_value) <= 16 * torch.finfo(torch.float32).eps * ready.loss_value
    one = Problem(model, own_loss, batches[:1])
    assert one.loss_description == "the loss of one batch, as returned"


def test_ignored_targets_of_a_criterion() -> None:
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 2, 1])) for _ in range(3)]
    batches[2][1][1] = -100
    model = nn.Linear(3, 3)
    with pytest.raises(ProblemError, match=rf"batch\[1\] of batch 2 holds -100.*{REMEDIES}"):
        Problem(model, lambda m, b: functional.cross_entropy(m(b[0]), b[1]), batches).prepare()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    wanted = dense_hessian(model, lambda m: functional.cross_entropy(m(x), y), dict(model.named_parameters()))
    assert_same(hessian(Problem(model, supervised(functional.cross_entropy), batches)), wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.float64])
def test_numbers_that_are_no_labels_may_be_minus_100(dtype: torch.dtype) -> None:
    x = torch.tensor([[156.0 if dtype is torch.uint8 else -100.0, 3.0]] * 3).to(dtype)  # 156 = -100 modulo 256
    data = [(x, torch.randn(3, 2)), (x[:2], torch.randn(2, 2))]
    problem = Problem(nn.Linear(2, 2), lambda m, b: squares(m, (b[0].double(), b[1])), data)
    assert problem.total_count == 5


# count=


def test_counts_given_and_returned_at_once_are_refused() -> None:
    data = pairs((4, 3))
    for loss in (supervised(nn.MSELoss()), lambda m, b: (squares(m, b), 1.0)):
        with pytest.raises(
            ProblemError, match=r"returns \(sum, count\), and count= is given as well; leave count= out"
        ):
            Problem(nn.Linear(3, 2), loss, data, count=len).prepare()


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (lambda batch: "4", "count of batch 0 is of type str; return a number from count="),
        (lambda batch: batch[0], r"count of batch 0 has shape \(5, 3\); return a number from count="),
        (lambda batch: -1, "count of batch 0 is -1.0; return a finite count"),
        (lambda batch: float("nan"), "count of batch 0 is nan; return a finite count"),
        (lambda batch: 0, "the 2 batches hold 0 loss terms; at least one"),
    ],
)
def test_bad_counts(count: Callable[[Any], Any], message: str) -> None:
    data = [(torch.randn(5, 3), torch.randn(5, 2))] * 2
    with pytest.raises(ProblemError, match=message):
        Problem(nn.Linear(3, 2), squares, data, count=count).prepare()
    with pytest.raises(ProblemError, match=r"count is of type int; give a function count\(batch\)"):
        Problem(nn.Linear(3, 2), squares, data, count=5)


def test_analyze_and_its_groups_take_a_count() -> None:
    model = Recurrent()
    batches = [(torch.randn(4, n, 3), torch.randn(n, 1)) for n in (6, 2)]

    def count(batch: Any) -> int:
        return len(batch[1])

    report = hesd.analyze(model, squares, batches, count=count, max_steps=3, progress=False)
    assert report.problem.function == "the mean over 8 terms, counted by count="
    assert report.problem.terms == 8
    text = str(report).splitlines()[1]
    assert text.split(maxsplit=1) == ["loss", "the mean over 8 terms, counted by count=; 2 batches"]
    groups = {"head": r"head\..*"}
    reports = hesd.analyze_groups(model, squares, batches, groups=groups, count=count, max_steps=2, progress=False)
    assert reports["head"].problem.function == report.problem.function
    with pytest.raises(ProblemError, match="got a Problem and also count; give them to the Problem"):
        hesd.analyze(Problem(model, squares, batches, count=count), count=count)


def test_a_report_keeps_its_description(tmp_path: Path) -> None:
    report = hesd.analyze(nn.Linear(3, 2), supervised(nn.MSELoss()), pairs((4, 3)), max_steps=2, progress=False)
    report.save(tmp_path / "report.json")
    assert hesd.load_report(tmp_path / "report.json").problem.function == report.problem.function
    assert report.problem.function == "the mean over 14 terms, counted by the loss, (sum, count)"


def test_the_gauss_newton_matrix_follows_a_count_that_is_given() -> None:
    model, data = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)), pairs((4, 3))
    own = supervised(lambda output, targets: (output - targets).square().mean())
    eye = torch.eye(14)
    found, wanted, by_dimension = (
        hesd.GaussNewtonOperator(problem).matmat(eye)
        for problem in (
            Problem(model, own, data, count=lambda batch: 2 * len(batch[0])),
            Problem(model, supervised(nn.MSELoss()), data),
            Problem(model, own, data),
        )
    )
    assert_same(found, wanted)
    assert_same(by_dimension, wanted)


# Sums


def test_a_sum_is_divided_by_its_samples_and_the_report_says_so() -> None:
    model, x, y = nn.Linear(3, 2), torch.randn(7, 3), torch.randn(7, 2)

    class Squares(nn.Module):
        reduction = "sum"

        def forward(self, output: Tensor, targets: Tensor) -> Tensor:
            return (output - targets).square().sum()

    wanted = dense_hessian(model, lambda m: (m(x) - y).square().sum() / 7, dict(model.named_parameters()))
    for criterion in (nn.MSELoss(reduction="sum"), Squares()):
        problem = Problem(model, supervised(criterion), [(x[:4], y[:4]), (x[4:], y[4:])])
        assert problem.loss_description == "the criterion's sum divided by its 7 terms"
        assert_same(hessian(problem), wanted)


# Means and sums taken for each other


def sum_of_squares(model: nn.Module, batch: Any) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1], reduction="sum")


PAIRS = [(5, 2), (1, 4), (3, 3)]


@pytest.mark.parametrize("numbers", PAIRS)
@pytest.mark.parametrize(
    "loss",
    [
        sum_of_squares,
        supervised(lambda output, targets: (output - targets).square().sum()),
        lambda m, b: sum_of_squares(m, b) / 256,
        lambda m, b: -sum_of_squares(m, b),
    ],
    ids=["sum", "criterion", "divided", "negative"],
)
def test_a_sum_without_a_count_is_noticed(loss: Any, numbers: tuple[int, ...]) -> None:
    with pytest.raises(
        ProblemError,
        match=r"of its two halves, of \d and \d terms, .*that is their sum, .* taken for the mean .*; return the mean, "
        r"or \(sum, count\) with the undivided sum; where every .* as it is, give count=lambda batch: 1$",
    ):
        Problem(nn.Linear(3, 2), loss, pairs(numbers)).prepare()


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (squares, {}),
        (lambda m, b: (sum_of_squares(m, b), b[1].numel()), {}),
        (lambda m, b: sum_of_squares(m, b) / 8, {"count": lambda batch: 1}),
    ],
    ids=["mean", "sum-and-count", "every-batch-as-it-is"],
)
def test_the_advice_for_a_sum_divided_by_a_fixed_number_gives_the_mean(loss: Any, options: dict[str, Any]) -> None:
    model, data = nn.Linear(3, 2), pairs((4, 4, 4))
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    wanted = dense_hessian(model, lambda m: functional.mse_loss(m(x), y), dict(model.named_parameters()))
    with pytest.raises(ProblemError, match="also if it is divided by a fixed number"):
        Problem(model, lambda m, b: sum_of_squares(m, b) / 8, data).prepare()
    assert_same(hessian(Problem(model, loss, data, **options)), wanted)


def test_a_sum_of_one_batch_is_the_function_whose_hessian_it_is() -> None:
    model, data = nn.Linear(3, 2), pairs((5,))
    problem = Problem(model, sum_of_squares, data)
    assert problem.loss_description == "the loss of one batch, as returned, of 5 terms"
    wanted = dense_hessian(model, lambda m: sum_of_squares(m, data[0]), dict(model.named_parameters()))
    assert_same(hessian(problem), wanted)


@pytest.mark.parametrize("numbers", [*PAIRS, (4,)])
@pytest.mark.parametrize(
    "loss",
    [
        lambda m, b: (squares(m, b), len(b[0])),
        lambda m, b: (squares(m, b), b[1].numel()),
        lambda m, b: (squares(m, b) + 0.1 * sum(p.square().sum() for p in m.parameters()), len(b[0])),
        lambda m, b: (squares(m, b), torch.tensor(float(len(b[0])))),
    ],
    ids=["samples", "elements", "weight-decay", "tensor"],
)
def test_a_mean_with_a_count_is_noticed(loss: Any, numbers: tuple[int, ...]) -> None:
    with pytest.raises(
        ProblemError,
        match=r"of its two halves, .*that is their mean, but \(sum, count\) was returned, so the Hessian would be "
        r"\d+ times too small; return the sum of the terms, as in \(mean \* count, count\), or the mean",
    ):
        Problem(nn.Linear(3, 2), loss, pairs(numbers)).prepare()


def hits(batch: Any) -> Tensor:
    """Number of samples that are classified as they should be."""
    return batch[2].sum()


@pytest.mark.parametrize(
    ("second", "shown"),
    [(hits, "4"), (lambda b: 100 * hits(b) / len(b[0]), "66.6667"), (lambda b: hits(b) / len(b[0]), "0.666667")],
    ids=["number", "percent", "share"],
)
def test_a_mean_with_the_accuracy_is_noticed(second: Any, shown: str) -> None:
    met = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    data = [(*pair, met) for pair in pairs((6, 6))]
    problem = Problem(nn.Linear(3, 2), lambda m, b: (squares(m, b), second(b)), data)
    message = rf"is their mean, but \(sum, count\) was returned, so the Hessian would be {shown} times too small"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HESDWarning)
        with pytest.raises(ProblemError, match=message):
            problem.prepare()


def test_a_sum_of_no_terms_is_refused_unless_it_is_zero() -> None:
    model, data = nn.Linear(3, 2), pairs((4, 2))

    def loss(model: nn.Module, batch: Any, rest: Any) -> tuple[Tensor, int]:
        total = sum_of_squares(model, batch)
        return (total, 4) if len(batch[0]) == 4 else (rest(total, model), 0)

    for rest in (lambda total, m: total, lambda total, m: 0 * total + decay(m, 0.1)):
        with pytest.raises(
            ProblemError,
            match=r"the loss of batch 1 is the sum \d.* of 0 terms; return the number of the terms, or a sum of 0 ",
        ):
            Problem(model, functools.partial(loss, rest=rest), data).prepare()
    wanted = dense_hessian(model, lambda m: sum_of_squares(m, data[0]) / 4, dict(model.named_parameters()))
    for rest in (lambda total, m: 0 * total, lambda total, m: total * torch.nan):
        assert_same(hessian(Problem(model, functools.partial(loss, rest=rest), data)), wanted)


def decay(model: nn.Module, factor: float) -> Tensor:
    return factor * sum(p.square().sum() for p in model.parameters())


def single_sample_only(model: nn.Module, batch: Any) -> Tensor:
    if len(batch[0]) not in (4, 6):
        raise RuntimeError("shape mismatch")
    return sum_of_squares(model, batch)


HARMLESS = {
    "mean": squares,
    "mean-and-decay": lambda m, b: squares(m, b) + decay(m, 0.1),
    "mean-and-much-decay": lambda m, b: squares(m, b) + decay(m, 1e6),
    "sum": lambda m, b: (sum_of_squares(m, b), len(b[0])),
    "sum-and-decay": lambda m, b: (sum_of_squares(m, b) + decay(m, 0.1), len(b[0])),
    "sum-and-decay-per-sample": lambda m, b: (sum_of_squares(m, b) + len(b[0]) * decay(m, 10.0), len(b[0])),
    "one-term-a-batch": lambda m, b: (squares(m, b), 1),
    "eight-terms-a-batch": lambda m, b: (squares(m, b), 8),
    "decay-alone": lambda m, b: decay(m, 1.0),
    "root": lambda m, b: squares(m, b).sqrt(),
    "variance": lambda m, b: m(b[0]).var(),
    "pairs-of-samples": lambda m, b: torch.cdist(m(b[0]), m(b[0]).detach()).square().sum(),
    "log": lambda m, b: sum_of_squares(m, b).log(),
    "near-zero": lambda m, b: squares(m, b) - squares(m, b).detach() + 1e-9 * m(b[0]).mean(),
    "halves-fail": single_sample_only,
    "weighted-mean": lambda m, b: (squares(m, b) * b[0][:, 0].exp()).sum() / b[0][:, 0].exp().sum(),
    "contrastive": lambda m, b: functional.cross_entropy(m(b[0]) @ b[1].T, torch.arange(len(b[0]))),
}


@pytest.mark.parametrize("numbers", [(4, 6), (6, 4, 4)])
@pytest.mark.parametrize("loss", HARMLESS.values(), ids=HARMLESS)
def test_what_is_no_clear_contradiction_is_let_pass(loss: Any, numbers: tuple[int, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Problem(nn.Linear(3, 2), loss, pairs(numbers)).prepare()


def test_layers_that_depend_on_the_batch_are_let_pass() -> None:
    for layer in (nn.BatchNorm1d(2), nn.Dropout(0.5)):
        model = nn.Sequential(nn.Linear(3, 2), layer, nn.Linear(2, 2))
        before = [tensor.clone() for tensor in model.state_dict().values()]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one = Problem(model, squares, pairs((6, 4)), mode="train")
            one.prepare()
            two = Problem(model, squares, pairs((6, 6)), mode="train")
            two.prepare()
        assert one.loss_description == "the mean of the mean losses of 2 batches, weighted by their leading dimension"
        assert (one.total_count, two.total_count) == (10, 2)
        assert two.loss_description == "the mean of the mean losses of 2 batches of the same shapes"
        Problem(model, lambda m, b: (sum_of_squares(m, b), len(b[0])), pairs((6, 4)), mode="train").prepare()
        assert all(map(torch.equal, before, model.state_dict().values()))


def test_numbers_in_a_batch_that_may_be_its_size_are_let_pass() -> None:
    for wrap in (lambda n: n, float, torch.tensor, np.float64):
        data = [(x, y, wrap(len(x))) for x, y in pairs((4, 6))]
        Problem(nn.Linear(3, 2), lambda m, b: sum_of_squares(m, b) / b[2], data).prepare()


@pytest.mark.parametrize(
    ("form", "parts"),
    [
        (lambda x, y: [x, y], lambda b: b),
        (lambda x, y: UserDict({"x": x, "y": y}), lambda b: [b["x"], b["y"]]),
        (Plain, lambda b: [b.x, b.y]),
        (lambda x, y: (x.numpy(), y, ["name"] * len(x), None), lambda b: [torch.from_numpy(b[0]), b[1]]),
    ],
)
def test_a_sum_in_batches_of_every_form_is_noticed(form: Any, parts: Any) -> None:
    data = [form(x, y) for x, y in pairs((4, 6))]
    with pytest.raises(ProblemError, match="that is their sum"):
        Problem(nn.Linear(3, 2), lambda m, b: sum_of_squares(m, parts(b)), data).prepare()


class Encoding(UserDict):
    """A mapping that the loss reads by attribute, as those of tokenizers."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


class Synchronous(dict):
    """A mapping with attributes of its own, that refuses update."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        setattr(self, key, value)

    def update(self, *_: Any) -> None:
        raise RuntimeError("set items one by one")


@pytest.mark.parametrize("kind", [Encoding, Synchronous])
def test_a_sum_of_mappings_that_are_read_by_attribute_is_noticed(kind: Any) -> None:
    data = []
    for x, y in pairs((4, 6)):
        data.append(kind())
        data[-1]["x"], data[-1]["y"] = x, y
    with pytest.raises(ProblemError, match="that is their sum"):
        Problem(nn.Linear(3, 2), lambda m, b: sum_of_squares(m, (b.x, b.y)), data).prepare()
    assert [len(batch["x"]) for batch in data] == [4, 6]


@pytest.mark.parametrize(("one", "other"), [(1, 0.5), (None, "a"), (True, np.float64(2.0)), ("a", torch.float32)])
def test_the_type_of_a_plain_value_is_no_structure(one: Any, other: Any) -> None:
    model, (first, second) = nn.Linear(3, 2), pairs((4, 2))
    x, y = (torch.cat(parts) for parts in zip(first, second, strict=True))
    wanted = dense_hessian(model, lambda m: functional.mse_loss(m(x), y), dict(model.named_parameters()))
    assert_same(hessian(Problem(model, squares, [(*first, one), (*second, other)])), wanted)


class Inputs(Dataset):
    """Samples with two inputs in a tuple, for a DataLoader to collate."""

    def __init__(self) -> None:
        self.x, self.y = torch.randn(5, 3), torch.randn(5, 2)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return {"inputs": (self.x[index], torch.ones(4)), "y": self.y[index]}


@pytest.mark.parametrize("size", [3, 2], ids=["last-as-long-as-the-list", "first-as-long-as-the-list"])
def test_lists_that_a_loader_makes_inside_of_a_mapping_are_no_samples(size: int) -> None:
    model, data = nn.Linear(3, 2), Inputs()
    loader = DataLoader(data, batch_size=size)
    problem = Problem(model, lambda m, b: functional.mse_loss(m(b["inputs"][0]), b["y"]), loader)
    wanted = dense_hessian(model, lambda m: functional.mse_loss(m(data.x), data.y), dict(model.named_parameters()))
    assert_same(hessian(problem), wanted)
    assert problem.loss_description == "the mean over 5 terms, counted by the batches' leading dimension"


def test_lists_that_may_be_of_samples_inside_of_a_mapping_are_asked_for() -> None:
    data = [{"images": [torch.randn(n, 3) for _ in range(n)], "y": torch.randn(n, 2)} for n in (4, 2)]
    with pytest.raises(ProblemError, match=r"batch\['images'\]\[0\] sits in a list, which may be one of samples"):
        Problem(nn.Linear(3, 2), lambda m, b: m(b["images"][0]).square().mean(), data).prepare()


def masked(model: nn.Module, batch: Any) -> Tensor:
    mask = batch[2]
    return (((model(batch[0]) - batch[1]).square().mean(1) * mask).sum() / mask.sum().clamp(min=1)).to(mask.dtype)


def ignoring(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[2].long(), ignore_index=255)


MASKS = {
    "mask": (masked, [1, 1, 0, 1, 0, 1, 0, 0, 1], [1, 1, 1, 1, 0, 1, 1, 1, 1]),
    "weights": (masked, [0.1, 1, 0.3, 2, 0.1, 1, 0.2, 0.6, 1], [1, 1, 1, 3, 0.2, 1, 1, 1, 1]),
    "ignored": (ignoring, [255, 1, 255, 1, 0, 0, 255, 1, 1], [0, 1, 1, 1, 0, 0, 255, 1, 1]),
    "a-half-without-terms": (ignoring, [255, 255, 255, 255, 0, 0, 0, 1, 1], [0, 1, 1, 1, 0, 0, 255, 1, 1]),
    "a-half-of-zeros": (masked, [0, 0, 0, 0, 1, 0, 0, 1, 0], [1, 1, 1, 1, 0, 1, 1, 1, 1]),
}


@pytest.mark.parametrize("numbers", [(9, 9), (9, 7)])
@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_values_that_decide_what_counts_are_warned_of(case: Any, numbers: tuple[int, int]) -> None:
    loss, *values = case
    data = [(x, y, torch.tensor(v[: len(x)]).double()) for (x, y), v in zip(pairs(numbers), values, strict=True)]
    problem = Problem(nn.Linear(3, 2), loss, data)
    with pytest.warns(HESDWarning, match=rf"some samples have more than others, as with a mask, .*{REMEDIES}"):
        problem.prepare()
    means = "the mean of the mean losses of 2 batches"
    assert problem.loss_description == (
        f"{means} of the same shapes" if numbers == (9, 9) else f"{means}, weighted by their leading dimension"
    )
    counted = Problem(nn.Linear(3, 2), loss, data, count=lambda b: 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counted.prepare()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_models_whose_samples_count_alike_are_not_warned_of(case: Case) -> None:
    torch.set_default_dtype(torch.float32)
    model, loss, data = case.build()

    def mean(model: nn.Module, batch: Any) -> Tensor:
        value = loss(model, batch)
        return value[0] / value[1] if isinstance(value, tuple) else value

    with warnings.catch_warnings():
        warnings.simplefilter("error", HESDWarning)
        Problem(model, mean, [data[0], data[0]], mode=case.mode).prepare()


def test_a_mean_over_what_only_one_half_has_is_no_sum() -> None:
    for kept in (3, 5):
        mask = torch.zeros(8)
        mask[:kept] = 1
        data = [(*pair, mask) for pair in pairs((8, 8))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HESDWarning)
            problem = Problem(nn.Linear(3, 2), masked, data)
            assert problem.batch_count == 2


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, "array"])
def test_indices_into_a_batch_are_not_cut_on_a_device(dtype: Any) -> None:
    # A read out of range ends a device's context for the whole process, while the CPU raises.
    seen: list[int] = []

    def loss(index: int, batch: Any) -> tuple[Tensor, None]:
        seen.append(len(batch[0]))
        return batch[0].square().mean(), None

    for largest in (3, 7, 8):
        neighbours = torch.full((8, 2), largest)
        batch = (torch.randn(8, 3), neighbours.numpy() if dtype == "array" else neighbours.to(dtype))
        for device in ("cpu", "cuda"):
            seen.clear()
            check = ReadingCheck(loss, None, torch.finfo(torch.float64).eps, torch.device(device))
            for index in range(2):
                check.see(index, batch, float(batch[0].square().mean()), None)
            assert seen == ([] if (largest, device) == (7, "cuda") else [4, 4])


def test_a_loss_that_writes_to_its_batch_is_not_asked_for_halves() -> None:
    def writing(model: nn.Module, batch: Any) -> Tensor:
        batch[0].mul_(0.5)
        return squares(model, batch)

    data = pairs((4, 4))
    kept = [x.clone() for x, _ in data]
    Problem(nn.Linear(3, 2), writing, data).prepare()
    assert all(torch.equal(x, 0.5 * before) for (x, _), before in zip(data, kept, strict=True))


def test_loss_and_accuracy_still_warn() -> None:
    with pytest.warns(HESDWarning, match=r"this count is 0\.75"):
        Problem(nn.Linear(3, 2), lambda m, b: (squares(m, b), torch.tensor(0.75)), pairs((4, 6))).prepare()
