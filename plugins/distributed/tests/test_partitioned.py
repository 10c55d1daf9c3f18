"""Weights that ZeRO-3 has emptied, without DeepSpeed: what each verb answers."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit.errors import AdapterError

if TYPE_CHECKING:
    from tests.support.toys import Toys

TARGETS = {"targets": ["layers.0", "layers.1"]}


def partitioned_(model: nn.Module) -> nn.Module:
    """Do what an engine with ZeRO-3 does: number parameters, keep the shape aside, empty the tensor, mark modules.

    A stand-in: DeepSpeed is not installed here. It sets these attributes on each parameter and each module.
    """
    for module in model.modules():
        vars(module)["_original_parameters"] = {}
    for number, parameter in enumerate(model.parameters()):
        kept = {"ds_id": number, "ds_shape": parameter.shape, "ds_status": "NOT_AVAILABLE", "ds_tensor": parameter.data}
        vars(parameter).update(kept)
        parameter.data = torch.empty(0)
    return model


@pytest.fixture(autouse=True)
def _imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are looked at only once DeepSpeed is imported, which this stands in for."""
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))


def refused(call: Callable[[], object], error: type[Exception], *words: str) -> None:
    """``call`` raises ``error``, and its message has all ``words``."""
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_partitioned_weights_are_neither_wrapped_nor_saved_nor_merged(toys: "Toys", tmp_path: Path) -> None:
    """ZeRO-3 leaves parameters of shape (0,): a file would hold these, and there would be nothing to merge into."""
    net = partitioned_(toys.net())
    refused(lambda: tunerkit.wrap(net, "toy-low-rank", TARGETS), AdapterError, "DeepSpeed", "Wrap the model first")
    model = partitioned_(toys.trained(targets=TARGETS["targets"]))
    refused(lambda: tunerkit.save(model, tmp_path / "out"), AdapterError, "is sharded", "call tunerkit.attach")
    refused(lambda: tunerkit.merge(model), AdapterError, "ZeRO-3", "partitions", "Save the adapter in every process")
    assert not (tmp_path / "out").exists()
