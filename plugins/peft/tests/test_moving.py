"""Paths that have other prefixes in the model than in the file."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from plugins.peft.tests import peft_folders
from plugins.peft.tests.peft_folders import PREFIX


def blocks(number: int = 1) -> nn.ModuleDict:
    """A body with layers."""
    return nn.ModuleDict({"layers": nn.ModuleList(peft_folders.Block() for _ in range(number))})


def both() -> nn.ModuleDict:
    """Text and vision below one wrapper, and a head beside it."""
    inner = nn.ModuleDict({"language_model": blocks(2), "vision_tower": blocks(2), "projector": nn.Linear(4, 4)})
    return nn.ModuleDict({"model": inner, "lm_head": nn.Linear(4, 4)})


def load(model: nn.Module, path: Path, tensors: Mapping[str, Tensor], **config: object) -> tuple[nn.Module, str]:
    """Load, and return the text of the warnings."""
    folder = peft_folders.folder(path, config, tensors)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tunerkit.load(model, folder)
    return model, "\n".join(str(each.message) for each in caught)


OLD = tuple(f"{part}.layers.{n}.query" for part in ("language_model.model", "vision_tower") for n in (0, 1))


def test_parts_that_moved_each_in_its_own_way_are_found(tmp_path: Path) -> None:
    """Text lost one wrapper and got another, vision got one; a head and a lone layer are found too. Each is told."""
    tensors = peft_folders.tensors((*OLD, "projector"))
    tensors |= {f"{PREFIX}language_model.lm_head.{name}": torch.ones(4, 4)[:size] for name, size in (("weight", 4),)}
    tensors[f"{PREFIX}language_model.lm_head.bias"] = torch.ones(4)
    model, told = load(both(), tmp_path, tensors, modules_to_save=["lm_head"])
    tuner = tunerkit.tuner(model)
    expected = {f"model.{part}.layers.{n}.query" for part in ("language_model", "vision_tower") for n in (0, 1)}
    assert tuner.ranks().keys() == {*expected, "model.projector"}
    assert [each.path for each in tuner.copies] == ["lm_head"]
    assert "under 'model.language_model.' instead of 'language_model.model.'" in told
    assert "under 'model.' instead of 'the model itself'" in told


def test_layers_that_the_model_lacks_are_not_moved_elsewhere(tmp_path: Path) -> None:
    """A group of which one path is as in the model stays, and the others are reported."""
    model = nn.ModuleDict({"layers": blocks(1)["layers"], "model": blocks(2)})
    tensors = peft_folders.tensors(("layers.0.query", "layers.1.query"))
    with pytest.raises(tunerkit.errors.BaseMismatchError, match=r"layers\.1\.query"):
        load(model, tmp_path, tensors)


def test_a_change_that_is_not_the_only_one_is_not_made(tmp_path: Path) -> None:
    """With two places for the same paths, they are reported as they are."""
    model = nn.ModuleDict({"model": blocks(2), "language_model": blocks(2)})
    with pytest.raises(tunerkit.errors.BaseMismatchError, match=r"layers\.0\.query"):
        load(model, tmp_path, peft_folders.tensors())


@pytest.mark.parametrize("process", ["module.", "_orig_mod.", "module._orig_mod."])
def test_the_names_of_processes_and_compilers_are_left_out(tmp_path: Path, process: str) -> None:
    """Adapters, copies and biases are found, with a remark."""
    tensors = {**peft_folders.tensors(), f"{PREFIX}head.weight": torch.ones(3, 4), f"{PREFIX}head.bias": torch.ones(3)}
    for layer in (0, 1):
        tensors[f"{PREFIX}layers.{layer}.query.base_layer.bias"] = torch.ones(4)
    settings = {"modules_to_save": ["head"], "bias": "lora_only"}
    plain, _ = load(peft_folders.net(), tmp_path / "plain", tensors, **settings)
    named = {name.replace(PREFIX, PREFIX + process): each for name, each in tensors.items()}
    model, told = load(peft_folders.net(), tmp_path / "named", named, **settings)
    assert torch.equal(model(peft_folders.IDS), plain(peft_folders.IDS))
    assert "'_orig_mod.'" in told


def test_a_module_of_the_model_may_have_such_a_name(tmp_path: Path) -> None:
    """Paths that are in the model stay as they are."""
    model, told = load(
        nn.ModuleDict({"module": peft_folders.net()}),
        tmp_path,
        peft_folders.tensors(("module.layers.0.query", "module.layers.1.query")),
    )
    assert tunerkit.tuner(model).ranks().keys() == {"module.layers.0.query", "module.layers.1.query"}
    assert not told


def test_experts_by_themselves_are_explained(tmp_path: Path) -> None:
    """In transformers 4 they were modules; the error says so."""
    model = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.Linear(4, 4)})})])}
    )
    tensors = peft_folders.tensors(("layers.0.block_sparse_moe.experts.0.w1",))
    with pytest.raises(tunerkit.errors.BaseMismatchError, match=r"experts\.0\.w1.*transformers 4.*merge_and_unload"):
        load(model, tmp_path, tensors)
