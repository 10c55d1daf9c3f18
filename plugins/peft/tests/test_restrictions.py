"""Models in which peft has put layers: neither wrapped nor saved."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit.errors import AdapterError

if TYPE_CHECKING:
    from tests.support.toys import Toys

TARGETS = {"targets": ["layers.0", "layers.1"]}


def refused(call: Callable[[], object], error: type[Exception], *words: str) -> None:
    """``call`` raises ``error``, and its message has all ``words``."""
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize("form", ["the model", "around it", "inside it"])
def test_a_model_with_adapters_of_peft_is_named_as_one(toys: "Toys", form: str) -> None:
    """Without the refusal, tunerkit would adapt peft's own layers. What the message advises can be wrapped."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    wrapped = peft.get_peft_model(toys.net(), peft.LoraConfig(target_modules=["layers.0"]))
    model = {"the model": wrapped, "around it": nn.Sequential(wrapped), "inside it": wrapped.base_model.model}[form]
    where = {"the model": "in the model itself", "around it": "at '0'", "inside it": "at 'layers.0'"}[form]
    refused(
        lambda: tunerkit.wrap(model, "toy-low-rank", {"targets": "all-linear"}),
        AdapterError,
        "this is a PeftModel",
        where,
        "merge_and_unload()",
    )
    unloaded = tunerkit.wrap(wrapped.merge_and_unload(), "toy-low-rank", TARGETS)
    assert list(tunerkit.tuner(unloaded).adapters()) == TARGETS["targets"]


def test_adapters_of_peft_on_top_are_named(toys: "Toys", tmp_path: Path) -> None:
    """Peft replaces layers of the wrapped model, so the file would fit no base. Without peft's, all works again."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = toys.trained(targets=TARGETS["targets"])
    optimizer = torch.optim.SGD(list(tunerkit.tuner(model).parameters()), lr=0.1)
    twice = peft.get_peft_model(model, peft.LoraConfig(target_modules=["conv"]))
    for call in (
        lambda: tunerkit.save(model, tmp_path / "out"),
        lambda: tunerkit.attach(model, optimizer),
    ):
        refused(call, AdapterError, "peft has put layers of its own", "unload()", "tunerkit.thaw(model, 'default')")
    assert not (tmp_path / "out").exists()
    tunerkit.save(twice.unload(), tmp_path / "out")
    tunerkit.thaw(model, "default")
    tunerkit.attach(model, optimizer)
