"""Folders of other types than LoRA: read and written by the names that a method declares."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tunerkit
from plugins.peft.tests import example_methods
from plugins.peft.tests.example_methods import EXAMPLES, NAMES, Example
from plugins.peft.tests.peft_models import CASES, Case
from tunerkit_peft import kinds

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
PAIRS = [(name, case) for name, example in EXAMPLES.items() for case in example.cases]


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The examples are installed, and of methods that declare PEFT's names they alone."""
    undo = [example_methods.registered(name) for name in EXAMPLES]
    known = list(kinds.declarations())
    monkeypatch.setattr(kinds, "declarations", lambda: [each for each in known if each[0].startswith("example-")])
    yield
    for each in undo:
        each()


def randomize_(model: nn.Module) -> None:
    """Give all that is trained other values."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def theirs(case: Case, example: Example, names: tuple[str, ...], folder: Path, **fields: Any) -> Tensor:
    """Let peft make an adapter and save it; the output of its model."""
    model: Any = peft.get_peft_model(case.build(), example.config(target_modules=list(names), **fields))  # type: ignore[arg-type]
    randomize_(model)
    model.save_pretrained(str(folder))
    with torch.no_grad():
        return case.output(model.eval())


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs are equal in fp32."""
    return bool((found - expected).abs().max() <= 2e-6 * expected.abs().max())


@pytest.mark.parametrize(("name", "at"), PAIRS)
def test_a_folder_of_peft_is_read_and_written(tmp_path: Path, name: str, at: str) -> None:
    """Outputs equal peft's; what is written, peft and tunerkit load, with the same tensors."""
    case, example = CASES[at], EXAMPLES[name]
    expected = theirs(case, example, example.cases[at], tmp_path / "theirs")
    model = tunerkit.load(case.build(), tmp_path / "theirs")
    assert tunerkit.tuner(model).method == example.name
    with torch.no_grad():
        assert close(case.output(model), expected)
        tunerkit.export(model, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(case.build(), str(tmp_path / "ours"))  # type: ignore[arg-type]
        assert close(case.output(again.eval()), expected)
        assert torch.equal(case.output(tunerkit.load(case.build(), tmp_path / "ours")), case.output(model))
    first, second = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "ours"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_adapter_of_ours_goes_to_peft(tmp_path: Path, name: str) -> None:
    """What tunerkit trained computes the same in peft."""
    case, example = CASES["llama"], EXAMPLES[name]
    model = tunerkit.wrap(case.build(), example.name, {"targets": ["k_proj", "up_proj"], **example.settings}, seed=0)
    randomize_(model)
    written = tunerkit.export(model, tmp_path / "ours")
    assert json.loads((written / "adapter_config.json").read_text())["peft_type"] == NAMES[name]["type"]
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(case.build(), str(written))  # type: ignore[arg-type]
        assert close(case.output(again.eval()), case.output(model))
