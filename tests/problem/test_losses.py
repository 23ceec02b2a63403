"""Ready-made losses against PyTorch's own means over all samples at once."""

from __future__ import annotations

import copy
from collections import UserDict
from functools import partial

import pytest
import torch
from models import gpt2, vectors
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from hesd_fast.errors import ProblemError
from hesd_fast.problem.losses import OutputLoss, causal_lm, is_ready_made, supervised
from hesd_fast.problem.problem import Problem

# Means and sums of a few dozen float64 numbers near 1.
ROUNDING = 64 * torch.finfo(torch.float64).eps


def same(value: float, wanted: float) -> bool:
    return abs(value - wanted) <= ROUNDING * max(abs(wanted), 1)


class Reshaped(nn.Module):
    """A linear model whose output has trailing dimensions, (N, 3, 2, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).view(-1, 3, 2, 2)


def uneven_value(model: nn.Module, criterion: object, targets: Tensor, log: bool = False) -> tuple[float, float]:
    """Return L from batches of 5 and 2, and the criterion on all 7 samples."""
    inputs = torch.randn(7, 8, dtype=torch.float64)
    body = nn.Sequential(model, nn.LogSoftmax(1)) if log else model
    problem = Problem(body, supervised(criterion), [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])])
    return problem.loss_value, float(criterion(body(inputs), targets).detach())


def half_squares(output: Tensor, targets: Tensor) -> Tensor:
    return (output - targets).square().mean() / 2


class Doubled(nn.MSELoss):
    """A subclass that computes something of its own."""

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return 2 * super().forward(output, targets)


CROSS_ENTROPIES = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(ignore_index=1),
    nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.5, 3.0], dtype=torch.float64)),
    nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.5, 3.0], dtype=torch.float64), ignore_index=0, label_smoothing=0.1),
    functional.cross_entropy,
]


def named(value: object) -> str:
    """Return a name that is the same in every process, as those of functions are not within a partial's."""
    if isinstance(value, partial):
        options = ",".join(f"{name}={number}" for name, number in value.keywords.items())
        return f"{value.func.__name__}({options})"
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("criterion", CROSS_ENTROPIES, ids=named)
@pytest.mark.parametrize("shape", [(7,), (7, 2, 2)])
def test_cross_entropy_of_uneven_batches_is_that_of_all(criterion: object, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 3).double() if len(shape) == 1 else Reshaped().double()
    value, wanted = uneven_value(model, criterion, torch.randint(3, shape))
    assert same(value, wanted)


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), nn.MultiLabelSoftMarginLoss()])
def test_criteria_with_something_of_their_own_are_called_as_they_are(criterion: nn.Module) -> None:
    torch.manual_seed(0)
    outputs = torch.randn(6, 3, dtype=torch.float64)
    targets = (torch.arange(6) % 3) if isinstance(criterion, nn.CrossEntropyLoss) else outputs.sigmoid()
    own = float(criterion(outputs, targets))
    before = vars(criterion).copy()
    total, count = supervised(criterion).of_outputs(outputs, (None, targets))
    assert same(float(total) / float(count), own)
    assert vars(criterion) == before
    subclass, hooked, patched = (copy.deepcopy(criterion) for _ in range(3))
    kind = type(criterion)
    subclass.__class__ = type("Own", (kind,), {"forward": lambda self, z, y: 2 * kind.forward(self, z, y)})
    hooked.register_forward_hook(lambda module, given, result: 3 * result)
    patched.forward = lambda z, y: 4 * kind.forward(patched, z, y)
    for factor, changed in ((2, subclass), (3, hooked), (4, patched)):
        loss = supervised(changed)
        assert not is_ready_made(loss)
        assert same(float(loss.of_outputs(outputs, (None, targets))), factor * own)


@pytest.mark.parametrize("weight", [None, torch.tensor([0.2, 1.5, 3.0], dtype=torch.float64)])
def test_other_forms_of_cross_entropy(weight: Tensor | None) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 3).double()
    assert same(*uneven_value(model, nn.NLLLoss(weight, ignore_index=2), torch.randint(3, (7,)), log=True))
    probabilities = torch.randn(7, 3, dtype=torch.float64).softmax(1)
    assert same(*uneven_value(model, nn.CrossEntropyLoss(weight), probabilities))
    probabilities = probabilities[..., None, None].expand(-1, -1, 2, 2)
    assert same(*uneven_value(Reshaped().double(), nn.CrossEntropyLoss(weight), probabilities))


@pytest.mark.parametrize(
    "criterion",
    [nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(), nn.BCEWithLogitsLoss(), nn.KLDivLoss(),
     nn.KLDivLoss(reduction="batchmean"), nn.KLDivLoss(log_target=True), nn.PoissonNLLLoss(), nn.SoftMarginLoss(),
     nn.HingeEmbeddingLoss(0.5), nn.MultiLabelSoftMarginLoss(), functional.mse_loss, functional.kl_div,
     functional.soft_margin_loss, partial(functional.huber_loss, delta=0.3), half_squares, Doubled()],
    ids=named,
)  # fmt: skip
@pytest.mark.parametrize("trailing", [(3,), (3, 2, 2)])
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
def test_other_means_of_uneven_batches_are_those_of_all(criterion: object, trailing: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 3).double() if len(trailing) == 1 else Reshaped().double()
    assert same(*uneven_value(model, criterion, torch.rand(7, *trailing, dtype=torch.float64)))


CLASS_WEIGHT = torch.tensor([0.2, 1.5, 3.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("criterion", "targets"),
    [
        (nn.MultiMarginLoss(), torch.tensor([0, 2, 1, 1, 0, 2, 2])),
        (nn.MultiMarginLoss(p=2, margin=0.7, weight=CLASS_WEIGHT), torch.tensor([0, 2, 1, 1, 0, 2, 2])),
        (nn.MultiLabelMarginLoss(), torch.tensor([[0, 2, -1], [1, -1, -1], [2, 1, 0]])[[0, 1, 2, 2, 1, 0, 1]]),
        (nn.MultiLabelSoftMarginLoss(weight=CLASS_WEIGHT), (torch.arange(21).view(7, 3) % 2).double()),
        (nn.BCEWithLogitsLoss(pos_weight=CLASS_WEIGHT), (torch.arange(21).view(7, 3) % 2).double()),
        (functional.multi_margin_loss, torch.tensor([0, 2, 1, 1, 0, 2, 2])),
        (partial(functional.cross_entropy, ignore_index=2), torch.tensor([0, 2, 1, 1, 0, 2, 2])),
        (partial(functional.cross_entropy, weight=CLASS_WEIGHT), torch.tensor([0, 2, 1, 1, 0, 2, 2])),
        (partial(functional.nll_loss, weight=CLASS_WEIGHT), torch.tensor([0, 2, 1, 1, 0, 2, 2])),
    ],
    ids=named,
)
def test_means_over_classes_of_uneven_batches_are_those_of_all(criterion: object, targets: Tensor) -> None:
    torch.manual_seed(0)
    assert same(*uneven_value(nn.Linear(8, 3).double(), criterion, targets))


def test_mean_of_a_batch_of_one_sample_without_a_leading_dimension() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(8, 3).double(), torch.randn(8, dtype=torch.float64)
    for criterion, target, wanted in (
        (nn.CrossEntropyLoss(), torch.tensor(2), 1),
        (nn.CrossEntropyLoss(), torch.tensor([0.2, 0.3, 0.5]).double(), 1),
        (nn.MultiMarginLoss(), torch.tensor(2), 1),
        (nn.MultiLabelSoftMarginLoss(), torch.ones(3).double(), 1),
        (nn.MSELoss(), torch.ones(3).double(), 3),
    ):
        total, count = supervised(criterion)(model, (x, target))
        assert count == wanted
        assert same(float(total.detach() / count), float(criterion(model(x), target).detach()))


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this PyTorch has no such loss")
def test_linear_cross_entropy_counts_as_cross_entropy() -> None:
    torch.manual_seed(0)
    for options in ({}, {"weight": CLASS_WEIGHT}, {"ignore_index": 1}):
        criterion = nn.LinearCrossEntropyLoss(4, 3, **options).double()
        assert same(*uneven_value(nn.Linear(8, 4).double(), criterion, torch.tensor([0, 2, 1, 1, 0, 2, 2])))


def test_time_before_samples_does_not_matter_to_a_mean_over_elements() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 3).double()
    batches = [(torch.randn(4, n, 8).double(), torch.randn(4, n, 3).double()) for n in (5, 2)]
    value = Problem(model, supervised(nn.MSELoss()), batches).loss_value
    inputs, targets = (torch.cat(parts, 1) for parts in zip(*batches, strict=True))
    assert same(value, float(functional.mse_loss(model(inputs), targets).detach()))


@pytest.mark.parametrize(
    ("criterion", "signature"),
    [
        (nn.GaussianNLLLoss(), r"GaussianNLLLoss has the arguments \(input.*target.*var"),
        (nn.CTCLoss(), "CTCLoss has the arguments .*input_lengths"),
        (nn.TripletMarginLoss(), "TripletMarginLoss has the arguments .*negative"),
        (nn.TripletMarginWithDistanceLoss(), "TripletMarginWithDistanceLoss has the arguments .*negative"),
        (nn.CosineEmbeddingLoss(), "CosineEmbeddingLoss has the arguments .*input2"),
        (nn.MarginRankingLoss(), "MarginRankingLoss has the arguments .*input2"),
        (functional.gaussian_nll_loss, "gaussian_nll_loss has the arguments .*var"),
        (lambda output, targets, lengths: output.mean(), r"<lambda> has the arguments \(output, targets, lengths"),
        (lambda output: output.mean(), r"<lambda> has the arguments \(output\)"),
    ],
)
def test_criteria_of_other_arguments_are_refused(criterion: object, signature: str) -> None:
    message = rf"the criterion {signature}.*, but supervised gives it two, .*; write a loss\(model, batch\)"
    with pytest.raises(ProblemError, match=message):
        supervised(criterion)
    assert supervised(lambda output, targets, scale=1.0: output.mean())


@pytest.mark.parametrize(
    ("criterion", "got"),
    [
        (lambda output, targets: (output - targets).square().mean(1), r"shape \(5,\)"),
        (lambda output, targets: float((output - targets).mean()), "type float"),
        (lambda output, targets: None, "type NoneType"),
    ],
)
def test_criteria_that_return_no_scalar_are_refused(criterion: object, got: str) -> None:
    problem = Problem(nn.Linear(8, 3), supervised(criterion), (torch.ones(5, 8), torch.ones(5, 3)))
    with pytest.raises(ProblemError, match=rf"the criterion <lambda> returned a value of {got}; wanted is a scalar"):
        problem.prepare()


class Whole(nn.Module):
    """Takes all inputs as one mapping or packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rnn = nn.Linear(8, 3), nn.GRU(8, 3)

    def forward(self, batch: object) -> Tensor:
        return self.rnn(batch)[1][0] if isinstance(batch, PackedSequence) else self.layer(batch["x"])


def test_inputs_are_handed_over_as_the_model_takes_them() -> None:
    torch.manual_seed(0)
    model, x, y = Whole(), torch.randn(4, 8), torch.randint(3, (4,))
    loss = supervised(nn.CrossEntropyLoss())
    wanted = functional.cross_entropy(model.layer(x), y, reduction="sum")
    for batch in ({"x": x, "labels": y}, UserDict({"x": x, "label": y}), ({"x": x}, y)):
        assert torch.equal(loss(model, batch)[0], wanted)
    packed = pack_sequence([torch.randn(t, 8) for t in (5, 3, 3, 1)])
    wanted = functional.cross_entropy(model.rnn(packed)[1][0], y, reduction="sum")
    total, count = loss(model, (packed, y))
    assert torch.equal(total, wanted)
    assert count == 4
    for inputs, form in (({"x": x, "mask": x}, r"keys \['mask', 'x'\]"), ((x, x), "tuple with 2 items")):
        with pytest.raises(ProblemError, match=rf"forward has the arguments .*, and the inputs are .*{form}, .*; give"):
            loss(nn.Linear(8, 3), (inputs, y))


def test_elementwise_terms_are_counted_after_broadcasting() -> None:
    model = nn.Linear(8, 3).double()
    _, count = supervised(nn.MSELoss())(model, (torch.ones(4, 8, dtype=torch.float64), torch.ones(4, 3).double()))
    assert count == 12


def test_sum_criterion_is_divided_by_the_samples() -> None:
    torch.manual_seed(0)
    value, total = uneven_value(nn.Linear(8, 3).double(), nn.MSELoss(reduction="sum"), torch.rand(7, 3).double())
    assert same(value, total / 7)


def test_ignored_targets_alone_contribute_nothing() -> None:
    torch.manual_seed(0)
    model, (kept, ignored) = nn.Linear(8, 3).double(), vectors(5, 2)
    ignored[1].fill_(-100)
    both, one = (Problem(model, supervised(nn.CrossEntropyLoss()), data) for data in ([kept, ignored], [kept]))
    assert both.total_count == 5
    assert same(both.loss_value, one.loss_value)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.layer(x) * scale


@pytest.mark.parametrize("mapping", [dict, UserDict])
@pytest.mark.parametrize("key", ["labels", "label", "targets", "target"])
def test_batches_as_mappings_and_tuples_of_inputs(mapping: type, key: str) -> None:
    torch.manual_seed(0)
    model, loss = Keywords(), supervised(nn.CrossEntropyLoss())
    x, scale, y = torch.randn(4, 8), torch.ones(1) * 2, torch.randint(3, (4,))
    total, count = loss(model, mapping({"x": x, "scale": scale, key: y}))
    as_pair, _ = loss(model, ((x, scale), y))
    assert count == 4
    assert torch.equal(total, as_pair)
    assert float(total.detach() / count) == pytest.approx(
        float(functional.cross_entropy(model(x, scale), y).detach()), rel=1e-6
    )


def test_bad_supervised_input() -> None:
    model, loss = nn.Linear(8, 3), supervised(nn.CrossEntropyLoss())
    x = torch.ones(2, 8)
    with pytest.raises(ProblemError, match="reduction='none'; use 'mean'"):
        supervised(nn.MSELoss(reduction="none"))
    with pytest.raises(ProblemError, match=r"criterion is the class MSELoss; give an instance, MSELoss\(\)"):
        supervised(nn.MSELoss)
    with pytest.raises(ProblemError, match="criterion of type str is not callable"):
        supervised("cross_entropy")
    with pytest.raises(ProblemError, match=r"keys \['x'\]; give a pair"):
        loss(model, {"x": x})
    with pytest.raises(ProblemError, match="tuple with 3 items; give a pair"):
        loss(model, (x, x, x))
    with pytest.raises(ProblemError, match="the model returned type dict with the keys"):
        loss(_Returning({"out": x}), (x, torch.zeros(2).long()))
    with pytest.raises(ProblemError, match=r"targets are of type list with 2 items, and CrossEnt.* wants a tensor"):
        loss(model, (x, [torch.zeros(2).long()] * 2))
    with pytest.raises(ProblemError, match=r"targets are of type PackedSequence.*give a tensor \(the \.data"):
        loss(model, (x, pack_sequence([torch.zeros(2).long()])))


class _Returning(nn.Module):
    def __init__(self, output: object) -> None:
        super().__init__()
        self.weight, self.output = nn.Parameter(torch.ones(1)), output

    def forward(self, x: Tensor) -> object:
        return self.output


class PlainLanguageModel(nn.Module):
    """A language model that knows nothing of Hugging Face."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(13, 6), nn.Linear(6, 13)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).tanh())


def by_hand(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    total, count = 0.0, 0
    for row, wanted in zip(logits.log_softmax(-1), labels, strict=True):
        for position in range(len(wanted) - 1):
            if wanted[position + 1] != -100:
                total -= float(row[position, wanted[position + 1]].detach())
                count += 1
    return total, count


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
MASKED = torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100]])
LABELS = torch.tensor([[-100, -100, 3, 4], [5, 6, 7, -100]])


@pytest.mark.parametrize("build", [gpt2, PlainLanguageModel])
@pytest.mark.parametrize(
    ("batch", "labels"),
    [
        (IDS, IDS),
        ((IDS,), IDS),
        ({"input_ids": IDS}, IDS),
        ({"input_ids": IDS, "attention_mask": MASK}, MASKED),
        (UserDict({"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}), LABELS),
    ],
    ids=["tensor", "1-tuple", "mapping", "mask", "labels"],
)
def test_causal_lm(build: object, batch: object, labels: Tensor) -> None:
    torch.manual_seed(0)
    model = build().double().eval()
    masked = build is gpt2 and not isinstance(batch, Tensor) and "attention_mask" in batch
    output = model(IDS, attention_mask=MASK) if masked else model(IDS)
    total, count = causal_lm()(model, batch)
    wanted_total, wanted_count = by_hand(output if build is PlainLanguageModel else output.logits, labels)
    assert int(count) == wanted_count
    assert same(float(total.detach()), wanted_total)


def test_causal_lm_agrees_with_the_models_own_loss() -> None:
    torch.manual_seed(0)
    model = gpt2().double().eval()
    total, count = causal_lm()(model, {"input_ids": IDS, "labels": LABELS})
    wanted = float(model(IDS, labels=LABELS).loss.detach())  # computed in float32
    assert abs(float(total.detach() / count) - wanted) <= 4 * torch.finfo(torch.float32).eps * wanted


def test_causal_lm_hands_over_what_the_model_takes() -> None:
    seen = {}

    class Watching(PlainLanguageModel):
        def forward(self, input_ids: Tensor, use_cache: bool = True, **others: object) -> Tensor:
            seen.update(others, use_cache=use_cache)
            return super().forward(input_ids)

    causal_lm()(Watching(), {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS})
    assert seen.keys() == {"use_cache", "attention_mask"}
    assert seen["use_cache"] is False


def test_cross_entropy_sums_in_float32_at_least() -> None:
    total, _ = causal_lm()(PlainLanguageModel().bfloat16(), IDS)
    assert total.dtype == torch.float32
    weight = torch.tensor([0.5, 1.0, 2.0]).bfloat16()
    batch = torch.ones(600, 8).bfloat16(), torch.randint(3, (600,))
    for criterion in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight)):
        total, count = supervised(criterion)(nn.Linear(8, 3).bfloat16(), batch)
        assert total.dtype == torch.float32
        wanted = 600 if criterion.weight is None else weight[batch[1]].double().sum()
        assert float(count) == wanted  # which bfloat16 could not hold


BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}


@pytest.mark.parametrize(
    ("loss", "model", "batch"),
    [
        (causal_lm(), PlainLanguageModel(), BATCH),
        (causal_lm(), gpt2(), BATCH),
        (causal_lm(), PlainLanguageModel(), (IDS,)),
        (supervised(nn.CrossEntropyLoss(ignore_index=1)), nn.Linear(8, 3), vectors(6)[0]),
        (supervised(nn.CrossEntropyLoss(torch.tensor([0.2, 1.5, 3.0]).double())), nn.Linear(8, 3), vectors(6)[0]),
        (supervised(nn.CrossEntropyLoss(label_smoothing=0.1)), nn.Linear(8, 3), vectors(6)[0]),
        (supervised(nn.CrossEntropyLoss()), nn.Linear(8, 3), {"labels": vectors(6)[0][1], "input": vectors(6)[0][0]}),
        (supervised(nn.CrossEntropyLoss()), Reshaped(), (vectors(6)[0][0], torch.randint(3, (6, 2, 2)))),
        (supervised(nn.MSELoss()), nn.Linear(8, 3), (vectors(6)[0][0], torch.rand(6, 3).double())),
        (supervised(nn.MSELoss(reduction="sum")), nn.Linear(8, 3), (vectors(6)[0][0], torch.rand(6, 3).double())),
        (supervised(nn.SoftMarginLoss()), nn.Linear(8, 3), (vectors(6)[0][0], torch.ones(6, 3).double())),
        (supervised(functional.cross_entropy), nn.Linear(8, 3), vectors(6)[0]),
    ],
)
def test_a_loss_is_that_of_its_outputs_and_of_its_terms(loss: OutputLoss, model: nn.Module, batch: object) -> None:
    model = model.double().eval()
    total, count = loss(model, batch)
    outputs = loss.outputs(model, batch)
    again, same_count = loss.of_outputs(outputs, batch)
    assert torch.equal(again, total)
    assert same_count == count
    sums, counts = loss.terms_of_outputs(outputs, batch)
    assert sums.shape == counts.shape == (len(sums),)
    assert same(float(sums.sum().detach()), float(total.detach()))
    assert same(float(counts.sum()), float(count))
    assert is_ready_made(loss)
    assert not is_ready_made(lambda model, batch: loss(model, batch))


def test_terms_are_samples_or_tokens() -> None:
    x, y = vectors(6)[0]
    sums, counts = supervised(nn.CrossEntropyLoss(ignore_index=1)).terms_of_outputs(x[:, :3], (x, y))
    assert torch.equal(counts, (y != 1).double())
    wanted = functional.cross_entropy(x[:, :3], y, ignore_index=1, reduction="none")
    torch.testing.assert_close(sums, wanted, rtol=0, atol=ROUNDING)
    sums, counts = causal_lm().terms_of_outputs(torch.zeros(2, 4, 13), BATCH)
    assert sums.tolist() == pytest.approx([float(torch.tensor(13.0).log())] * 4)
    assert counts.tolist() == [1, 1, 1, 1]
    sums, counts = supervised(nn.MSELoss()).terms_of_outputs(torch.zeros(2, 4), (x, torch.ones(2, 4)))
    assert (sums.tolist(), counts.tolist()) == ([4, 4], [4, 4])


def test_terms_are_refused_where_the_criterion_has_none() -> None:
    x, y = vectors(6)[0]
    for criterion, name in ((half_squares, "half_squares"), (Doubled(), "Doubled")):
        with pytest.raises(ProblemError, match=rf"{name} gives one loss for a batch, .* torch loss module"):
            supervised(criterion).terms_of_outputs(x, (x, y))


@pytest.mark.parametrize(
    ("criterion", "targets", "remedy"),
    [
        (nn.CrossEntropyLoss(), torch.full((6,), 3), "int64 classes"),
        (nn.CrossEntropyLoss(), torch.ones(6, dtype=torch.bool), "int64 classes"),
        (nn.NLLLoss(), torch.ones(5, dtype=torch.int64), "int64 classes"),
        (nn.MSELoss(), torch.ones(6, 4), "shapes and dtypes that fit"),
        (nn.MultiMarginLoss(), torch.full((6,), 7), "shapes and dtypes that fit"),
    ],
)
def test_targets_that_a_criterion_refuses_are_named(criterion: object, targets: Tensor, remedy: str) -> None:
    message = rf"{type(criterion).__name__} cannot be computed of outputs of shape \(6, 3\), torch.float32, and targets"
    with pytest.raises(ProblemError, match=rf"{message}.*; give .*{remedy}.* PyTorch says: ") as caught:
        supervised(criterion)(nn.Linear(4, 3), (torch.ones(6, 4), targets))
    assert caught.value.__cause__ is not None


def test_numpy_batches_are_refused_by_name() -> None:
    x, y = torch.ones(4, 8), torch.zeros(4).long()
    loss = supervised(nn.CrossEntropyLoss())
    for batch, path in (((x, y.numpy()), r"batch\[1\]"), ({"x": x.numpy(), "labels": y}, r"batch\['x'\]")):
        with pytest.raises(
            ProblemError, match=rf"{path} is a NumPy array \(.*shape \(4.*; give a tensor, as torch\.from"
        ):
            Problem(nn.Linear(8, 3), loss, [batch]).prepare()
    with pytest.raises(ProblemError, match=r"batch\['input_ids'\] is a NumPy array"):
        causal_lm()(PlainLanguageModel(), {"input_ids": IDS.numpy()})
    own = Problem(nn.Linear(8, 3), lambda m, b: m(torch.from_numpy(b[0])).square().mean(), [(x.numpy(), y)])
    assert own.loss_value > 0


def test_bad_causal_lm_input() -> None:
    with pytest.raises(ProblemError, match=r"type dict with the keys \['tokens'\]; give token ids"):
        causal_lm()(PlainLanguageModel(), {"tokens": IDS})
    with pytest.raises(ProblemError, match=r"logits of shape \(2, 3\) for labels of shape \(2, 4\)"):
        causal_lm()(_Returning(torch.ones(2, 3)), IDS)
