"""Reports of different things are not compared: the refusal names both, what differs, and what to do."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

import hesd_fast as hesd

LOSS = hesd.losses.supervised(nn.CrossEntropyLoss())


def network(width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


def samples(count: int = 40, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return inputs, (inputs[:, 0] > 0).long()


def report(model=None, data=None, **options):
    options = {"block_size": 2, "max_steps": 4, "progress": False, **options}
    return hesd.analyze(network() if model is None else model, LOSS, samples() if data is None else data, **options)


@pytest.fixture(scope="module")
def reference():
    return report()


class Other(nn.Sequential):
    """Another class with the same parameters."""


def trained():
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-6
    return model


def with_buffer():
    model = network()
    model.register_buffer("steps", torch.tensor(3))
    return model


def double(data):
    return data[0].double(), data[1]


DIFFERENT = {
    "operator": (
        lambda: report(operator="gauss_newton"),
        r"is of the operator 'gauss_newton', .* is of the operator 'hessian'; compare spectra of the same operator",
    ),
    "model": (
        lambda: report(Other(*network())),
        r"is of a model of the class 'Other', .* of the class 'Sequential'; compare reports of one architecture",
    ),
    "shapes": (
        lambda: report(network(5)),
        r"is of 4 parameters, among them '0.weight' of shape \(5, 3\), .* among them '0.weight' of shape \(4, 3\); "
        "select the same parameters of the same architecture in both",
    ),
    "selection": (
        lambda: report(parameters=r".*\.weight"),
        r"is of 2 parameters, .* is of 4 parameters, among them '0.bias' of shape \(4,\); select the same parameters",
    ),
    "mode": (lambda: report(mode="train"), r"is of mode 'train', .* 'eval'; analyse both in the same module mode"),
    "precision": (
        lambda: report(network().double(), double(samples())),
        r"was computed in float64, .* was computed in float32; convert the model to one precision and analyse both",
    ),
    "protocol": (
        lambda: report(block_size="auto", max_steps=None, protocol="lla"),
        r"has the protocol 'lla', .* has the protocol None; numbers of a published protocol .* the same protocol",
    ),
    "weights": (
        lambda: report(trained()),
        r"is of weights with the digest '[0-9a-f]{32}', .*; what is compared are data sets, so analyse the same "
        r"weights on both; to compare checkpoints of one network say weights_may_differ=True \(hesd compare --weights",
    ),
    "buffers": (lambda: report(with_buffer()), r"is of weights with the digest"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_differs_is_named_in_either_order(reference, what):
    make, message = DIFFERENT[what]
    other = make()
    with pytest.raises(hesd.ProblemError, match=f"^'b' {message}") as forwards:
        hesd.compare({"a": reference, "b": other})
    with pytest.raises(hesd.ProblemError) as backwards:
        hesd.compare({"b": other, "a": reference})
    assert ", the reference 'a' " in str(forwards.value)
    assert ", the reference 'b' " in str(backwards.value)
    assert str(forwards.value).split("; ", 1)[1] == str(backwards.value).split("; ", 1)[1]
    if what in ("weights", "buffers"):
        (note,) = hesd.compare({"a": reference, "b": other}, weights_may_differ=True).notes
        assert "so this compares checkpoints of a network, not data sets" in note
    else:
        with pytest.raises(hesd.ProblemError, match=f"^'b' {message}"):
            hesd.compare({"a": reference, "b": other}, weights_may_differ=True)


def of_groups(seed: int = 1, **groups):
    return hesd.analyze_groups(
        network(), LOSS, samples(seed=seed), groups=groups, block_size=2, max_steps=4, progress=False
    )


def test_groups_compare_with_the_same_parameters_only():
    first, second = of_groups(**{"in": "0.*", "out": "2.*"}), of_groups(seed=2, **{"in": "0.*"})
    assert hesd.compare({"train": first["in"], "shifted": second["in"]}).notes == ()
    with pytest.raises(
        hesd.ProblemError, match=r"'out' is of 2 parameters, among them '2\.weight' .*; select the same"
    ):
        hesd.compare(first)


def test_the_same_parameters_compare_under_any_name():
    named, otherwise = of_groups(**{"first": "0.*"})["first"], of_groups(other=["0.weight", "0.bias"])["other"]
    selected = report(parameters="0.*")
    assert hesd.compare({"a": named, "b": otherwise, "c": selected}).notes == ()
    assert hesd.compare({"c": selected, "a": named}).notes == ()


def test_data_seeds_and_strategies_may_differ_without_a_word(reference):
    others = {
        "data": report(data=samples(seed=2)),
        "batches": report(data=[samples(20, seed=3), samples(20, seed=4)]),
        "seed": report(seed=7),
        "hvp": report(hvp="double_backward"),
        "partial": report(reorthogonalization="partial"),
    }
    assert hesd.compare({"train": reference, **others}).notes == ()


def test_differences_that_a_reader_must_know_are_noted(reference):
    others = {
        "fewer": report(data=samples(30)),
        "longer": report(max_steps=6),
        "wider": report(block_size=3),
        "copies": report(reorthogonalization="none"),
    }
    assessment = hesd.compare({"train": reference, **others})
    numbers = {name: [note for note in assessment.notes if note.startswith(f"'{name}'")] for name in others}
    assert all(len(notes) == 1 for notes in numbers.values())
    assert len(assessment.notes) == 4
    assert numbers["fewer"][0] == (
        "'fewer' has 30 loss terms, the reference 'train' has 40 loss terms, "
        "and k_mass tends to fall as their number grows, so take as many of both"
    )
    assert "has 6 Lanczos steps of 2 probes, the reference 'train' has 4 Lanczos steps of 2" in numbers["longer"][0]
    assert "K_Hn depends on how many Ritz values there are" in numbers["longer"][0]
    assert "has 4 Lanczos steps of 3 probes" in numbers["wider"][0]
    assert "has 4 Lanczos steps of 2 probes, and copies among them" in numbers["copies"][0]
    for note in assessment.notes:
        assert f"note: {note}" in str(assessment).split("\n")


@dataclasses.dataclass(frozen=True)
class ByHand:
    hesd_type: hesd.HESDType
    type_evidence: hesd.TypeEvidence
    criteria: hesd.Criteria


def test_a_measure_made_by_hand_is_compared_for_what_it_has(reference):
    measure = hesd.SpectralMeasure([-0.1, 2.0], [0.5, 0.5])
    criteria = hesd.criteria(measure)
    by_hand = ByHand(*hesd.classify(measure, criteria), criteria)
    for pair in itertools.permutations([("hand", by_hand), ("run", reference)]):
        assert hesd.compare(dict(pair)).notes == ()
    other = report(mode="train")
    for three in itertools.permutations([("hand", by_hand), ("run", reference), ("train mode", other)]):
        with pytest.raises(hesd.ProblemError, match=r"'(run|train mode)' is of mode '.*'(run|train mode)' is of mode"):
            hesd.compare(dict(three))
    exponents = ByHand(by_hand.hesd_type, by_hand.type_evidence, hesd.criteria(measure, exponent=1.0))
    with pytest.raises(
        hesd.ProblemError, match=r"'hand' has the criterion exponents \(1\.0, 1\.0\), .* same exponents"
    ):
        hesd.compare({"run": reference, "hand": exponents})


def test_saved_reports_are_compared_as_those_in_memory(reference, tmp_path):
    reference.save(tmp_path / "a.json")
    loaded = hesd.load_report(tmp_path / "a.json")
    assert hesd.compare({"a": reference, "b": loaded}) == hesd.compare({"a": reference, "b": copy.copy(reference)})
    with pytest.raises(hesd.ProblemError, match="is of weights with the digest"):
        hesd.compare({"a": loaded, "b": report(trained())})


def test_an_assessment_does_nothing_to_a_terminal(reference):
    names = {"\x1b[2Jtrain\n": reference, "\ud800\x9b": report(data=samples(30))}
    text = str(hesd.compare(names))
    assert all(line.isprintable() for line in text.split("\n"))
    assert r"reference \x1b[2Jtrain\n: " in text
    assert "\n\\ud800\\x9b: " in text
