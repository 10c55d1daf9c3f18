"""LoRA's starts on a base that bitsandbytes quantises."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tunerkit
from tunerkit.errors import FileError, TargetError

pytest.importorskip("bitsandbytes", reason="bitsandbytes quantises the base")


def dense() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16))


def quantised() -> nn.Sequential:
    library: Any = importlib.import_module("bitsandbytes")
    model = dense()
    for at in (0, 2):
        old = model[at]
        assert isinstance(old, nn.Linear)
        new = library.nn.LinearNF4(old.in_features, old.out_features, compute_dtype=torch.float32)
        new.load_state_dict(old.state_dict())
        model[at] = new.to("cpu")
    return model


INPUTS = torch.randn(12, 64, generator=torch.Generator().manual_seed(2))
LOFTQ = {"start": "loftq", "rank": 8, "targets": ["0", "2"]}


def test_loftq_makes_up_for_what_quantising_lost(tmp_path: Path) -> None:
    """Law: Q + ΔW is the best approximation of W by rank r beyond Q; the output is nearer to the original's.

    The base stays as it is, and neither the file nor loading needs the original.
    """
    save_file(dense().state_dict(), tmp_path / "model.safetensors")
    base = quantised()
    model = tunerkit.wrap(base, "lora", {**LOFTQ, "original": str(tmp_path)})
    for path, adapter in tunerkit.tuner(model).adapters().items():
        weight = dense().get_submodule(path).get_parameter("weight").detach()
        layer: Any = quantised().get_submodule(path)
        stored = importlib.import_module("bitsandbytes.functional").dequantize_4bit(
            layer.weight.data, layer.weight.quant_state
        )
        left = torch.linalg.svdvals(weight - stored - (2.0 * adapter.b @ adapter.a).detach())  # type: ignore[operator]
        torch.testing.assert_close(left[:-8], torch.linalg.svdvals(weight - stored)[8:], atol=1e-5, rtol=1e-4)
    original = dense()(INPUTS)
    error, before = (float((each(INPUTS) - original).detach().norm()) for each in (model, quantised()))
    assert error < 0.8 * before
    saved = tunerkit.save(model, tmp_path / "adapter")
    assert str(tmp_path).encode() not in saved.read_bytes()
    assert torch.equal(tunerkit.load(quantised(), saved)(INPUTS), model(INPUTS))
    assert torch.equal(tunerkit.unwrap(model)(INPUTS), quantised()(INPUTS))


@pytest.mark.parametrize("case", ["unnamed", "missing", "empty", "index", "another", "incomplete"])
def test_loftq_says_what_it_needs(case: str, tmp_path: Path) -> None:
    """Law: one line for an original that is missing, unreadable, another's, or incomplete."""
    words = {
        "unnamed": "set original to the folder",
        "missing": "has no safetensors file",
        "empty": "cannot be read",
        "index": "names no file for each tensor in 'weight_map'",
        "another": "has another weight for '0' than the base",
        "incomplete": "has no tensor for '2.weight'",
    }
    weights = dense().state_dict()
    if case == "another":
        weights["0.weight"] = torch.randn(64, 64)
    if case == "incomplete":
        del weights["2.weight"]
    if case == "empty":
        (tmp_path / "model.safetensors").touch()
    elif case == "index":
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ["0.weight"]}', encoding="utf-8")
    elif case != "missing":
        save_file(weights, tmp_path / "model.safetensors")
    original = {} if case == "unnamed" else {"original": str(tmp_path)}
    with pytest.raises((TargetError, FileError), match=words[case]):
        tunerkit.wrap(quantised(), "lora", {**LOFTQ, **original})


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_at_parts_of_a_packed_weight_adds_nothing(start: str) -> None:
    """Law: the triplets are those of the dequantised weight, and the base stays packed as it is."""
    model = tunerkit.wrap(quantised(), "lora", {**LOFTQ, "start": start})
    assert torch.equal(model(INPUTS), quantised()(INPUTS))
    (adapter, _) = tunerkit.tuner(model).adapters().values()
    assert bool(adapter.get_parameter("b").any())
