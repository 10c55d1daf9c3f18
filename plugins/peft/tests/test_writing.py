"""What a written folder holds: settings, tensors, the card; and what its options do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from plugins.peft.tests import peft_adapters, peft_folders
from plugins.peft.tests.peft_models import CASES
from tunerkit.plugin import factors_of
from tunerkit_peft.card import MARK
from tunerkit_peft.targets import target_modules

RANKS = {"re:layers\\.0\\.query": 3, "re:layers\\.1\\.query": 0}


def trained(**config: Any) -> nn.Module:
    """A LoRA of rank 2, at one module 3 and at one 0, with random values."""
    torch.manual_seed(2)
    given = {"rank": 2, "targets": ["query", "value"], "rank_pattern": RANKS, **config}
    model = tunerkit.wrap(peft_folders.net(), "lora", given)
    peft_adapters.randomize_(model)
    return model


def test_the_uniform_form_has_one_rank_and_a_scale_of_one(tmp_path: Path) -> None:
    """All modules have the next rank that servers allow, r = lora_alpha, no patterns, and zeros as padding."""
    folder = tunerkit.export(trained(), tmp_path / "out")
    settings = peft_folders.settings(folder)
    assert (settings["r"], settings["lora_alpha"]) == (8, 8)
    assert isinstance(settings["lora_alpha"], int)
    assert (settings["rank_pattern"], settings["alpha_pattern"], settings["bias"]) == ({}, {}, "none")
    assert settings["use_rslora"] is False
    assert settings["init_lora_weights"] is True
    assert settings["target_modules"] == ["query", "value"]
    tensors = peft_folders.held(folder)
    assert {tuple(each.shape) for name, each in tensors.items() if "lora_A" in name} == {(8, 4)}
    assert not tensors["layers.1.query.lora_A.weight"].any()
    assert not tensors["layers.0.query.lora_A.weight"][3:].any()


def test_the_compact_form_has_the_rank_of_each_module(tmp_path: Path) -> None:
    """lora_alpha is the largest rank, P is multiplied by k/R, and rank 0 is one row of zeros."""
    model = trained()
    folder = tunerkit.export(model, tmp_path / "out", form="compact")
    settings = peft_folders.settings(folder)
    assert (settings["r"], settings["lora_alpha"], settings["alpha_pattern"]) == (3, 3, {})
    assert settings["rank_pattern"] == {
        r"layers\.0\.value": 2,
        r"layers\.1\.query": 1,
        r"layers\.1\.value": 2,
    }
    tensors = peft_folders.held(folder)
    assert not tensors["layers.1.query.lora_A.weight"].any()
    product = factors_of(tunerkit.tuner(model))["layers.0.value"]
    assert torch.allclose(tensors["layers.0.value.lora_B.weight"], product.p * 2 / 3)


@pytest.mark.parametrize(("largest", "rank"), [(1, 8), (2, 8), (8, 8), (9, 16), (33, 64), (400, 512), (513, 513)])
def test_the_rank_is_the_next_that_servers_allow(tmp_path: Path, largest: int, rank: int) -> None:
    """Or the largest itself, if no server has room for it."""
    model = tunerkit.wrap(nn.Sequential(nn.Linear(2, 2)), "lora", {"rank": largest, "targets": ["0"]})
    assert peft_folders.settings(tunerkit.export(model, tmp_path / "out"))["r"] == rank


def test_the_rank_can_be_chosen(tmp_path: Path) -> None:
    """A rank below the largest one is refused."""
    model = trained()
    assert peft_folders.settings(tunerkit.export(model, tmp_path / "out", rank=5))["r"] == 5
    with pytest.raises(tunerkit.errors.ConfigError, match="expected >= 3, the largest rank of a module, got 2"):
        tunerkit.export(model, tmp_path / "lower", rank=2)
    with pytest.raises(tunerkit.errors.ConfigError, match="rank"):
        tunerkit.export(model, tmp_path / "compact", form="compact", rank=8)
    with pytest.raises(tunerkit.errors.ConfigError, match="expected <= 4096"):
        tunerkit.export(model, tmp_path / "large", rank=10**9)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("form", ["uniform", "compact", "adalora"])
def test_an_adapter_without_products_is_refused(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to write, in any form."""
    model = trained()
    monkeypatch.setattr("tunerkit_peft.lora_writing.factors_of", lambda _: {})
    with pytest.raises(tunerkit.errors.AdapterError, match="adds nothing to any weight"):
        tunerkit.export(model, tmp_path / "out", form=form)


@pytest.mark.parametrize("text", ["{}", '{"r": 8}', ""])
def test_settings_of_something_else_are_not_replaced(tmp_path: Path, text: str) -> None:
    """A file of the same name that is not PEFT's is kept."""
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(tunerkit.errors.FileError, match="is there already"):
        tunerkit.export(trained(), tmp_path)
    assert (tmp_path / "adapter_config.json").read_text() == text


def test_the_card_warns_of_a_weight_that_two_targets_share(tmp_path: Path) -> None:
    """PEFT's merge adds both parts to it."""
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(6, 4), "lm_head": nn.Linear(4, 6, bias=False)})
    model["lm_head"].weight = model["embed_tokens"].weight
    tunerkit.wrap(model, "lora", {"rank": 2, "targets": ["embed_tokens", "lm_head"]})
    peft_adapters.randomize_(model)
    text = (tunerkit.export(model, tmp_path / "out") / "README.md").read_text()
    assert "`merge_and_unload` is wrong here" in text
    assert "merge_and_unload" not in (tunerkit.export(trained(), tmp_path / "plain") / "README.md").read_text()


def test_the_name_of_the_base_is_recorded(tmp_path: Path) -> None:
    """As given, or as the model has it; in the card's front matter only if it can be a repository."""
    case = CASES["llama"]
    model: Any = tunerkit.wrap(case.build(), "lora", {"targets": ["q_proj"]})
    model.config._name_or_path = "org/base"
    first = tunerkit.export(model, tmp_path / "first")
    assert peft_folders.settings(first)["base_model_name_or_path"] == "org/base"
    assert peft_folders.settings(first)["task_type"] == "CAUSAL_LM"
    assert 'base_model: "org/base"' in (first / "README.md").read_text()
    second = tunerkit.export(model, tmp_path / "second", base="/a/folder")
    assert peft_folders.settings(second)["base_model_name_or_path"] == "/a/folder"
    assert "base_model:" not in (second / "README.md").read_text()
    assert peft_folders.settings(tunerkit.export(trained(), tmp_path / "third"))["base_model_name_or_path"] is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrices_can_be_written_in_half_precision(tmp_path: Path, dtype: str) -> None:
    """They are rounded; a value that the dtype does not hold is refused."""
    model = trained()
    written = peft_folders.held(tunerkit.export(model, tmp_path / "out", dtype=dtype))
    assert {each.dtype for each in written.values()} == {getattr(torch, dtype)}
    with torch.no_grad():
        next(iter(tunerkit.tuner(model).adapters().values())).b.fill_(1e6)  # type: ignore[operator, union-attr]
    if dtype == "float16":
        with pytest.raises(tunerkit.errors.FileError, match="largest of float16; use bfloat16"):
            tunerkit.export(model, tmp_path / "large", dtype=dtype)


def test_the_card_says_what_the_adapter_is(tmp_path: Path) -> None:
    """It has the method, the ranks, both ways to load it, and the mark by which it may be replaced."""
    text = (tunerkit.export(trained(), tmp_path / "out") / "README.md").read_text()
    front, mark = text.split("\n---\n", 1)
    assert front.startswith("---\n")
    assert mark.startswith(MARK + "\n")
    for part in (
        "`lora`",
        "| `query` | 2 | 0 to 3 |",
        "| `value` | 2 | 2 |",
        "PeftModel.from_pretrained",
        "tunerkit.load",
    ):
        assert part in text


def test_files_are_the_same_each_time(tmp_path: Path) -> None:
    """Settings are sorted and end with a line break; two exports have equal bytes, and everyone may read them."""
    first, second = (tunerkit.export(trained(), tmp_path / name) for name in ("first", "second"))
    assert {file.name for file in first.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()
        assert file.stat().st_mode == (first / "adapter_config.json").stat().st_mode
    text = (first / "adapter_config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize(("bias", "setting"), [("none", "none"), ("adapters", "lora_only"), ("all", "all")])
def test_trained_biases_have_pefts_names(tmp_path: Path, bias: str, setting: str) -> None:
    """Those of targets lie below base_layer; others make the setting "all"."""
    folder = tunerkit.export(trained(bias=bias), tmp_path / "out")
    assert peft_folders.settings(folder)["bias"] == setting
    names = {name for name in peft_folders.held(folder) if name.endswith("bias")}
    inside = {f"layers.{layer}.{name}.base_layer.bias" for layer in (0, 1) for name in ("query", "value")}
    assert names == {"none": set(), "lora_only": inside, "all": inside | {"head.bias"}}[setting]


def test_a_bias_that_peft_does_not_save_is_refused(tmp_path: Path) -> None:
    """The bias of attention's projections has a name that PEFT does not know."""
    model = tunerkit.wrap(CASES["attention"].build(), "lora", {"targets": ["attention"], "bias": "adapters"})
    with pytest.raises(tunerkit.errors.FileError, match=r"(?s)nn.MultiheadAttention.*keep_merged.*attention"):
        tunerkit.export(model, tmp_path / "out")


def test_an_adalora_folder_needs_layers_that_peft_adapts(tmp_path: Path) -> None:
    """An embedding is refused, with the forms that hold it."""
    model = tunerkit.wrap(peft_folders.net(), "lora", {"targets": ["embed_tokens", "query"]})
    with pytest.raises(tunerkit.errors.FileError, match=r"(?s)form='uniform'.*embed_tokens \(Embedding\)"):
        tunerkit.export(model, tmp_path / "out", form="adalora")


def test_an_adalora_folder_holds_triplets_and_masks(tmp_path: Path) -> None:
    """Orthonormal singular vectors, and a list of true and false for each module."""
    folder = tunerkit.export(trained(), tmp_path / "out", form="adalora")
    settings = peft_folders.settings(folder)
    assert (settings["peft_type"], settings["init_r"], settings["lora_alpha"]) == ("ADALORA", 3, 3)
    assert settings["rank_pattern"]["layers.1.query.lora_E"] == [False, False, False]
    tensors = peft_folders.held(folder)
    assert tensors["layers.1.query.lora_A"].shape == (0, 4)
    p = tensors["layers.0.query.lora_B"]
    assert torch.allclose(p.T @ p, torch.eye(3), atol=1e-6)


def test_the_shortest_form_selects_the_targets_alone() -> None:
    """Names where they are enough, else paths, else an escaped expression."""
    present = ["a.q", "b.q", "b.v", "x.a.q"]
    assert target_modules(["a.q", "b.q", "x.a.q"], present) == ["q"]
    assert target_modules(["b.q"], present) == ["b.q"]
    assert target_modules(["a.q", "b.q"], present) == r"a\.q|b\.q"


def test_many_modules_with_ranks_of_their_own_are_written_and_read(tmp_path: Path) -> None:
    """Hundreds of patterns stay within the steps that those of a file may take."""
    wide = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2), "v": nn.Linear(2, 2)}) for _ in range(200))
    ranks = {f"{number}.{name}": 1 + (number + (name == "v")) % 3 for number in range(200) for name in "qv"}
    model = nn.ModuleDict({"layers": wide})
    tensors = {}
    for path, rank in ranks.items():
        tensors[f"base_model.model.layers.{path}.lora_A.weight"] = torch.ones(rank, 2)
        tensors[f"base_model.model.layers.{path}.lora_B.weight"] = torch.ones(2, rank)
    pattern = {f"layers.{path}": rank for path, rank in ranks.items()}
    peft_folders.folder(tmp_path / "in", {"rank_pattern": pattern, "r": 7}, tensors)
    tunerkit.load(model, tmp_path / "in")
    folder = tunerkit.export(model, tmp_path / "out", form="compact")
    tunerkit.unwrap(model)
    assert tunerkit.tuner(tunerkit.load(model, folder)).ranks() == {f"layers.{path}": r for path, r in ranks.items()}
