"""Changes to a model after wrapping: an error or a warning whenever an adapter would silently have no effect."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.model_checks import sgd
from tests.support.toys import Toys
from tunerkit.errors import AdapterError

GONE = "the adapted {} is not in the model any more"


def widen_linear(model: Any) -> None:
    layer = model.layers[0]
    layer.weight.data, layer.out_features = torch.zeros(9, 4), 9


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "replaced": (lambda m: m.layers.__setitem__(1, nn.Linear(8, 8)), f"layers.1: {GONE.format('Linear')}"),
    "removed": (lambda m: setattr(m, "norm", None), f"norm: {GONE.format('LayerNorm')}"),
    "converted": (nn.SyncBatchNorm.convert_sync_batchnorm, f"batch_norm: {GONE.format('BatchNorm2d')}"),
    "without its hook": (lambda m: m.layers[0]._forward_hooks.clear(), "layers.0: its forward hook is gone"),
    "widened": (widen_linear, "layers.0: the Linear was resized after wrapping"),
    "a wider head": (
        lambda m: setattr(m.head[2].weight, "data", torch.zeros(4, 6)),
        "head.2: the Linear was resized after wrapping",
    ),
}


def calls(model: nn.Module, folder: Path) -> list[Callable[[], object]]:
    optimizer = sgd(model)
    return [
        lambda: tunerkit.attach(model, optimizer),
        lambda: tunerkit.save(model, folder),
        lambda: tunerkit.merge(model),
    ]


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("number", range(3), ids=["attach", "save", "merge"])
def test_a_place_that_was_changed_is_named(
    toys: "Toys", tmp_path: Path, change: Callable[[Any], object], words: str, number: int
) -> None:
    """Replaced, removed, resized or without its hook: no useless training, no file that fits nothing, no merge."""
    model = toys.trained(batch_norm=True, train_modules=["head"], targets=["layers.*"], bias="all")
    change(model)
    with pytest.raises(AdapterError, match=f"- {re.escape(words)}\nConvert, replace or resize modules first"):
        calls(model, tmp_path)[number]()
    assert not list(tmp_path.iterdir())


def test_an_owner_that_lost_its_hooks_is_an_error(toys: "Toys", tmp_path: Path) -> None:
    """If attention's weights are overridden, attention's hooks are the ones that matter."""
    model: Any = toys.fill_(
        tunerkit.wrap(nn.TransformerEncoderLayer(8, 2, 8), "toy-low-rank", {"targets": "all-linear"})
    )
    tunerkit.save(model, tmp_path)
    model.self_attn._forward_pre_hooks.clear()
    with pytest.raises(AdapterError, match=r"self_attn, self_attn\.out_proj: its forward hook is gone"):
        tunerkit.save(model, tmp_path)


def test_a_module_that_is_held_by_another_now_is_still_there(toys: "Toys", tmp_path: Path) -> None:
    """Inside a compiled or data-parallel module, or next to a new one, it works as before."""
    model = toys.trained(targets=["layers.*"])
    output = model(toys.x())
    model.layers[0] = nn.Sequential(model.layers[0], nn.Identity())
    model.layers[1] = nn.DataParallel(model.layers[1])
    for call in calls(model, tmp_path):
        call()
    assert toys.close(model(toys.x()), output)
