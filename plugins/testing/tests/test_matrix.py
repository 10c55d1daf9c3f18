"""Models of the conformance matrix are small, the same at every build, and without dropout."""

import importlib.util
from collections.abc import Callable

import pytest
import torch

from tunerkit.config import AdapterConfig
from tunerkit.hooks import gather_knowledge
from tunerkit.records import Method
from tunerkit.targets import scan, select
from tunerkit_testing import matrix
from tunerkit_testing.conformance import Case

FAMILIES = {
    "transformers": {"bert", "deberta-v2", "gpt2", "llama", "qwen3", "gemma3", "t5", "whisper", "vit", "clip"},
    "diffusers": {"unet", "unet-convolutions"},
    "timm": {"convnext", "resnet"},
}


def test_the_matrix_holds_every_family_of_the_installed_libraries() -> None:
    """Law: there is a family for each way in which layers are built and called."""
    expected = set()
    for library, names in FAMILIES.items():
        expected |= names if importlib.util.find_spec(library) else {library}
    assert {case.id for case in matrix.cases()} == expected


def test_a_missing_library_skips_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the cases of a missing library are one skipped test that names it; the others stay."""
    find: Callable[[str], object] = importlib.util.find_spec
    monkeypatch.setattr(matrix, "find_spec", lambda name: None if name == "timm" else find(name))
    skipped = [case for case in matrix.cases() if case.id == "timm"]
    assert [case.marks[0].kwargs["reason"] for case in skipped] == [
        "the cases are timm models, and timm is not installed"
    ]
    assert not {"convnext", "resnet"} & {case.id for case in matrix.cases()}


@pytest.mark.parametrize("case", matrix.cases())
def test_a_case_is_small_and_the_same_at_every_build(case: Case) -> None:
    """Law: two builds and their outputs are equal bit for bit, and a build has few parameters."""
    first, second = case.build(), case.build()
    assert sum(parameter.numel() for parameter in first.parameters()) < 50_000
    others = second.state_dict()
    assert all(torch.equal(tensor, others[name]) for name, tensor in first.state_dict().items())
    assert torch.equal(case.output(first.eval()), case.output(second.eval()))


@pytest.mark.parametrize("case", matrix.cases())
def test_a_case_trains_as_it_is_evaluated(case: Case) -> None:
    """Law: without dropout, dropped layers or updated statistics, training mode changes neither loss nor state."""
    model = case.build().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = case.loss(model)
    case.start_training(model)
    assert model.training
    assert all(torch.equal(case.loss(model), expected) for _ in range(3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("case", matrix.cases())
def test_every_layer_that_a_case_names_can_be_adapted(case: Case) -> None:
    """Law: a case's targets and the default both find layers, and the loss reaches each of them."""
    model = case.build()
    for wanted in (case.settings.get("targets"), None):
        found = select(scan(model, gather_knowledge()), targets=wanted, method=Method("any", AdapterConfig))  # type: ignore[arg-type]
        model.zero_grad()
        case.loss(model).backward()
        weights = [target.module.get_parameter("weight") for target in found]
        assert weights
        assert all(weight.grad is not None and weight.grad.count_nonzero() for weight in weights)
