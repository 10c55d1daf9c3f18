"""A process group without the plugin that keeps its adapters alike: refused, never trained apart in silence."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.toys import Toys
from tunerkit.extras import install
from tunerkit.hooks import specs
from tunerkit.hooks.loading import Catalog
from tunerkit.layers import as_base_layer, weights
from tunerkit.plugin import Engine, optimizer_of, resize_obstacle
from tunerkit_testing.small import trainable

TARGETS = {"targets": ["layers.0"]}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plugin knows of processes, whatever is installed."""
    monkeypatch.setattr(weights.plugins, "holdings", tuple)
    asked, unknown = Catalog.asked, (specs.tunerkit_restrictions, specs.tunerkit_engine)
    monkeypatch.setattr(Catalog, "asked", lambda self, hook: [] if hook in unknown else asked(self, hook))
    monkeypatch.setattr(Catalog, "absence", lambda self, name: f"{name} is not installed")


def attached(toys: "Toys", **options: Any) -> Any:
    model = tunerkit.wrap(toys.net(), "toy-low-rank", TARGETS)
    tunerkit.attach(model, torch.optim.SGD(trainable(model), lr=0.1), total_steps=3, **options)
    return model


def calls(model: nn.Module, base: nn.Module, path: Path) -> dict[str, Callable[[], object]]:
    return {
        "merge": lambda: tunerkit.merge(model),
        "save": lambda: tunerkit.save(model, path),
        "wrap": lambda: tunerkit.wrap(base, "toy-low-rank", TARGETS),
    }


@pytest.mark.usefixtures("group_of_one")
def test_a_process_of_a_group_is_refused_with_the_extra(toys: "Toys") -> None:
    """Also one of one process: DDP may be around it. Meant to be apart, it trains, and its shapes stay."""
    said = re.escape(f"tunerkit-distributed is not installed ({install('distributed')})")
    for asked in (None, True):
        with pytest.raises(tunerkit.errors.StepError, match=said):
            attached(toys, data_parallel=asked)
    with pytest.warns(tunerkit.TunerkitWarning, match="Wrap the model first, then put it into DDP"):
        model = attached(toys, data_parallel=False)
    optimizer = optimizer_of(tunerkit.tuner(model))
    assert "DDP" in str(resize_obstacle(trainable(model), optimizer))


def test_a_launcher_is_believed_and_one_process_trains(toys: "Toys", monkeypatch: pytest.MonkeyPatch) -> None:
    """WORLD_SIZE says that there are others; without it, and with 1, there are none."""
    for world in ("", "1"):
        monkeypatch.setenv("WORLD_SIZE", world)
        assert type(tunerkit.tuner(attached(toys)).engine) is Engine
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(tunerkit.errors.StepError, match="would silently train its own"):
        attached(toys)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(tunerkit.errors.StepError, match="no installed plugin synchronizes adapters"):
        attached(toys, data_parallel=True)
    wrong: Any = "yes"
    with pytest.raises(tunerkit.errors.StepError, match="data_parallel: expected True, False or None, got 'yes'"):
        attached(toys, data_parallel=wrong)


@pytest.mark.usefixtures("group_of_one")
def test_weights_that_are_cut_are_refused_with_the_extra(toys: "Toys", tmp_path: Path) -> None:
    """Taken for whole ones, a merge would write into parts of them, and a file would hold parts."""
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model = toys.trained(targets=TARGETS["targets"])
    fully_shard(model, mesh=mesh)
    for verb, call in calls(model, fully_shard(toys.net(), mesh=mesh), tmp_path / "out").items():
        said = rf"cannot {verb} with (FSDP|DTensor), found .* tunerkit-distributed is not installed \(pip install"
        with pytest.raises(tunerkit.errors.AdapterError, match=said):
            call()
    assert not (tmp_path / "out").exists()


LEFT_BY: dict[str, tuple[str, str, Callable[[Any], object]]] = {
    "deepspeed": ("wrap", "distributed", lambda layer: setattr(layer.weight, "ds_id", 0)),
    "accelerate": ("merge", "distributed", lambda layer: setattr(layer, "_hf_hook", object())),
    "peft": ("save", "peft", lambda layer: into(layer, "peft.tuners.lora.layer", "Linear")),
    "torchao": ("merge", "quant", lambda layer: packed_by(layer, "torchao.utils")),
    "bitsandbytes": ("merge", "quant", lambda layer: packed_by(layer, "bitsandbytes.nn.modules")),
    "optimum-quanto": ("merge", "quant", lambda layer: packed_by(layer, "optimum.quanto.tensor.qtensor")),
}


def into(layer: nn.Module, module: str, name: str) -> None:
    layer.__class__ = type(name, (nn.Linear,), {"__module__": module})


def packed_by(layer: nn.Linear, module: str) -> None:
    library: Any = type("Packed", (torch.Tensor,), {"__module__": module})
    layer._parameters["weight"] = layer.weight.detach().as_subclass(library)  # type: ignore[assignment]


@pytest.mark.parametrize("library", LEFT_BY)
def test_what_a_library_has_left_in_a_model_is_refused_with_its_extra(
    toys: "Toys", library: str, tmp_path: Path
) -> None:
    """Without the plugin that knows the library, nothing is done that may come out wrong."""
    verb, extra, leave = LEFT_BY[library]
    model = toys.net() if verb == "wrap" else toys.trained(targets=TARGETS["targets"])
    leave(model.layers[0])
    with pytest.raises(tunerkit.errors.AdapterError, match=rf"found at 'layers\.0.*: tunerkit-{extra} .*not installed"):
        calls(model, model, tmp_path / "out")[verb]()


def test_a_weight_that_accelerate_has_offloaded_is_not_read_without_the_plugin() -> None:
    """Between forwards it is on the meta device, and a product with it is uninitialised memory."""
    layer = nn.Linear(3, 3)
    base = as_base_layer(layer)
    assert base is not None
    vars(layer.to("meta"))["forward"] = layer.forward
    with pytest.raises(tunerkit.errors.AdapterError, match=r"on the meta device, and no installed plugin can load it"):
        base.dense()
