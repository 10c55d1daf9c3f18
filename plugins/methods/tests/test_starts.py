"""What methods draw: from a seed the same numbers always, and at the start nothing is added."""

from pathlib import Path

import pytest
import torch
from torch import nn

import tunerkit

# What a seed has to give: 777 for FourierFT, 0 for RandLoRA. PEFT draws the same.
PLACES = [103, 385, 303, 39, 411, 421]
A = [-0.01312255859375, 0.9375, -1.4453125, -1.2890625]
B = [-0.515625, -1.1328125, -0.126953125, 1.4140625]


def wrapped(method: str, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    return tunerkit.wrap(nn.Sequential(nn.Linear(32, 16)), method, {"targets": "re:0", **settings})


def test_fourierft_draws_the_places_that_files_rely_on() -> None:
    """Neither our files nor PEFT's hold the places, so a seed must give the same in every version."""
    places = tunerkit.tuner(wrapped("fourierft", count=6)).adapters()["0"].get_buffer("places")
    assert places.tolist() == PLACES


@pytest.mark.skipif(torch.__version__ < "2.12", reason="older versions draw other numbers in bf16")
def test_randlora_draws_the_bases_that_files_rely_on() -> None:
    """Files need not hold the bases, so a seed must give the same in every version from torch 2.12 on."""
    bases = tunerkit.tuner(wrapped("randlora", rank=4)).adapters()["0"].shared
    assert bases.get_parameter("a")[0, 0, :4].tolist() == A
    assert bases.get_parameter("b")[-1, -1].tolist() == B


def test_randlora_without_its_bases_in_the_file_loads_to_the_same(tmp_path: Path) -> None:
    """The file is shorter by the bases, and an adapter that was loaded computes what was saved."""
    x, sizes = torch.randn(3, 32), {}
    for save in (True, False):
        model = wrapped("randlora", rank=4, save_bases=save)
        with torch.no_grad():
            for parameter in tunerkit.tuner(model).parameters():
                parameter.add_(torch.randn_like(parameter))
        path = tunerkit.save(model, tmp_path / f"{save}.safetensors")
        torch.manual_seed(0)
        again = tunerkit.load(nn.Sequential(nn.Linear(32, 16)), path)
        assert torch.equal(again(x), model(x))
        sizes[save] = Path(path).stat().st_size
    held = sum(each.numel() for each in tunerkit.tuner(wrapped("randlora", rank=4)).adapters()["0"].shared.parameters())
    assert sizes[True] - sizes[False] >= 4 * held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("top", [2, 4])
def test_vblora_starts_at_zero_and_leaves_it(top: int, dtype: str) -> None:
    """Each piece of A mixes v and −v alike, and yet the logits and the bank have gradients."""
    # So many that in bf16 some of the largest logits are equal.
    model = wrapped("vblora", rank=16, vectors=2048, length=8, top=top, adapter_dtype=dtype)
    x = torch.randn(5, 32)
    with tunerkit.disabled(model):
        before = model(x)
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    (adapter,) = tunerkit.tuner(model).adapters().values()
    assert adapter.get_parameter("in_logits").grad.abs().max() > 0  # type: ignore[union-attr]
    assert adapter.shared.get_parameter("bank").grad.abs().max() > 0  # type: ignore[union-attr]
