"""Methods that PEFT has for convolutions compute there what PEFT's do."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tunerkit
from tunerkit.hooks import registry

KINDS = {
    "1d": lambda: (nn.Conv1d(6, 8, 3, padding=1), torch.randn(2, 6, 9)),
    "2d": lambda: (nn.Conv2d(6, 8, (3, 2), stride=2, padding_mode="zeros"), torch.randn(2, 6, 7, 8)),
    "1x1": lambda: (nn.Conv2d(6, 8, 1), torch.randn(2, 6, 4, 4)),
    "grouped": lambda: (nn.Conv2d(6, 8, 3, groups=2, dilation=2), torch.randn(2, 6, 7, 8)),
}
ROWS = {
    "loha": ({"rank": 2}, peft.LoHaConfig, {"r": 2, "alpha": 8}, tuple(KINDS)),
    # W₂ as a product, and in full. PEFT multiplies a full one wrongly at a Conv1d.
    "lokr": ({"rank": 1}, peft.LoKrConfig, {"r": 1, "alpha": 8}, tuple(KINDS)),
    "lokr, full": ({"rank": 8}, peft.LoKrConfig, {"r": 8, "alpha": 8}, ("2d", "1x1", "grouped")),
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, row in ROWS.items() for kind in row[3]])
def test_computes_what_peft_computes(name: str, kind: str) -> None:
    """From the same weights, PEFT's layer and ours add the same to a convolution's output."""
    torch.manual_seed(0)
    settings, config, arguments, _ = ROWS[name]
    method = name.split(",")[0]
    made, x = KINDS[kind]()
    base = nn.Sequential(made).double()
    theirs: Any = peft.get_peft_model(
        copy.deepcopy(base), config(target_modules=["0"], init_weights=False, **arguments)
    ).double()
    ours = tunerkit.wrap(base, method, {"targets": "re:0", "adapter_dtype": "float64", **settings})
    layer, mine = theirs.base_model.model[0], dict(tunerkit.tuner(ours).adapters()["0"].named_parameters())
    for own, leaf in registry.get(method).foreign["peft"]["tensors"].items():
        held = getattr(layer, leaf if isinstance(leaf, str) else leaf["name"])
        assert (own in mine) == ("default" in held)
        if own in mine:
            assert mine[own].shape == held["default"].shape
            mine[own].data.copy_(held["default"])
    x = x.double()
    with tunerkit.disabled(ours):
        assert (ours(x) - theirs(x)).abs().max() > 1e-3
    assert (ours(x) - theirs(x)).abs().max() <= 1e-12 * theirs(x).abs().max()


def test_a_core_of_another_size_is_damage(tmp_path: Path) -> None:
    """The error names the tensor."""
    base = nn.Sequential(nn.Conv2d(6, 8, 3))
    config = peft.LoHaConfig(r=2, target_modules=["0"], use_effective_conv2d=True)
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(str(tmp_path))  # type: ignore[arg-type]
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: each.flatten() if "hada_t1" in name else each for name, each in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(tunerkit.errors.FileError, match="hada_t1' does not fit the layer's other tensors"):
        tunerkit.load(base, tmp_path)
