"""Stacks of experts: PEFT's packed folders both ways, its two layouts, the form of engines, and config objects."""

import ast
import importlib
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import tunerkit
from plugins.peft.tests import peft_folders
from plugins.peft.tests.peft_adapters import randomize_
from tunerkit.errors import BaseMismatchError, ConfigError, FileError, TunerkitWarning
from tunerkit.plugin import Factors, factors_of
from tunerkit_peft import stacks as peft_stacks
from tunerkit_peft.reading import describe

pytest.importorskip("tunerkit_experts", reason="the stacks of these models")

IDS: Final = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6, 5, 4, 3]])
SIZES: Final[dict[str, Any]] = {
    **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2},
}


def qwen(width: int = 12) -> nn.Module:
    """Four experts of ``width``, with halves of gate and up: at 8, gate_up is square."""
    settings = {**SIZES, "moe_intermediate_size": width, "num_experts": 4, "head_dim": 8, "mlp_only_layers": []}
    return built(hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**settings)))


def mixtral() -> nn.Module:
    """Its checkpoints have other names than the model."""
    return built(hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=4)))


def gpt_oss() -> nn.Module:
    """Transposed, gate and up alternate, and down is square."""
    settings = {**SIZES, "intermediate_size": 16, "head_dim": 8, "num_local_experts": 4}
    return built(hf.GptOssForCausalLM(hf.GptOssConfig(**settings, layer_types=["full_attention"] * 2)))


def built(model: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


MODELS: Final[Mapping[str, Callable[[], nn.Module]]] = {"qwen": qwen, "mixtral": mixtral, "gpt_oss": gpt_oss}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
GATE_UP, DOWN = "model.layers.0.mlp.experts.stacks.gate_up_proj", "model.layers.0.mlp.experts.stacks.down_proj"


def by_peft(model: nn.Module, folder: Path, **settings: Any) -> Tensor:
    """Let PEFT adapt a model and save that; return its output."""
    given: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **given, **settings}))  # type: ignore[arg-type]
    randomize_(adapted)
    adapted.eval().save_pretrained(str(folder))
    return output(adapted)


def ours(build: Callable[[], nn.Module], **settings: Any) -> nn.Module:
    """A LoRA of ours on the experts and on q, with random values."""
    torch.manual_seed(4)
    targets = ["q_proj", "gate_up_proj", "down_proj"]
    model = tunerkit.wrap(build(), "lora", {"rank": 3, "alpha": 5, "dropout": 0.1, "targets": targets, **settings})
    randomize_(model)
    return model.eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def close(got: Tensor, wanted: Tensor) -> bool:
    return bool((got - wanted).abs().max() <= 2e-5 * wanted.abs().max())


def products(model: nn.Module) -> dict[str, Factors]:
    return factors_of(tunerkit.tuner(model))


def same(first: Mapping[str, Factors], second: Mapping[str, Factors]) -> bool:
    """Whether two adapters have the same factors, bit for bit."""
    return first.keys() == second.keys() and all(
        torch.equal(a, b) for path in first for a, b in zip(first[path], second[path], strict=True)
    )


@each_model
def test_a_folder_of_pefts_computes_the_same_here(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Law: with ranks and alphas by pattern and rsLoRA, beside layers, ours is PEFT's output."""
    patterns = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"gate_up_proj": 7}, "use_rslora": True}
    wanted = by_peft(build(), tmp_path, **patterns)
    assert not close(output(build()), wanted)
    model = tunerkit.load(build(), tmp_path)
    assert close(output(model), wanted)
    ranks = tunerkit.tuner(model).ranks()
    assert (ranks[GATE_UP], ranks[DOWN], ranks["model.layers.1.self_attn.q_proj"]) == (3, 2, 3)


@pytest.mark.parametrize("named", ["experts.gate_up_proj", "experts.down_proj"])
def test_one_of_two_stacks_is_found_by_its_name(named: str, tmp_path: Path) -> None:
    """Law: PEFT's names are the same for either parameter alone; the settings say which one it is."""
    wanted = by_peft(qwen(), tmp_path, target_parameters=[named], target_modules=[])
    assert close(output(tunerkit.load(qwen(), tmp_path)), wanted)


@each_model
@pytest.mark.parametrize("form", [None, "compact"])
def test_peft_computes_the_same_from_a_folder_of_ours(
    build: Callable[[], nn.Module], form: str | None, tmp_path: Path
) -> None:
    """Law: the packed folder is PEFT's own form; and the uniform one comes back bit for bit."""
    model = ours(build, rank_pattern={"down_proj": 2})
    folder = tunerkit.export(model, tmp_path / "out", form=form)
    settings = peft_folders.settings(folder)
    assert settings["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert (settings["target_modules"], settings["lora_dropout"]) == (["q_proj"], 0.0)
    adapted: Any = peft.PeftModel.from_pretrained(build(), str(folder))  # type: ignore[arg-type]
    assert close(output(adapted.eval()), output(model))
    if form is None:
        assert same(products(tunerkit.load(build(), folder)), products(model))


@each_model
def test_the_form_of_engines_comes_back_bit_for_bit(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Law: each expert has matrices of two dimensions; gate and up have one A, and the rows of the stack's B."""
    model = ours(build)
    folder = tunerkit.export(model, tmp_path / "out", form="experts", rank=4)
    held = peft_folders.held(folder)
    gate, up, down, at = (
        ("w1", "w3", "w2", "block_sparse_moe") if build is mixtral else ("gate_proj", "up_proj", "down_proj", "mlp")
    )
    start = f"model.layers.0.{at}.experts.3"
    assert {name.removeprefix(f"{start}.") for name in held if name.startswith(start)} == {
        f"{leaf}.lora_{side}.weight" for leaf in (gate, up, down) for side in "AB"
    }
    assert "target_parameters" not in peft_folders.settings(folder)
    assert torch.equal(held[f"{start}.{gate}.lora_A.weight"], held[f"{start}.{up}.lora_A.weight"])
    a, b = held[f"{start}.{gate}.lora_A.weight"], held[f"{start}.{gate}.lora_B.weight"]
    whole = products(model)[GATE_UP]
    wanted = (whole.p @ whole.q)[3]
    assert torch.allclose(b @ a, wanted[::2] if build is gpt_oss else wanted.chunk(2)[0], atol=1e-6)
    assert same(products(tunerkit.load(build(), folder)), products(model))


def test_peft_reads_the_form_of_engines_where_it_knows_the_model(tmp_path: Path) -> None:
    """As an adapter of transformers 4, whose experts were modules."""
    model = ours(mixtral)
    folder = tunerkit.export(model, tmp_path / "out", form="experts")
    adapted: Any = peft.PeftModel.from_pretrained(mixtral(), str(folder))  # type: ignore[arg-type]
    assert close(output(adapted.eval()), output(model))


@each_model
def test_gate_and_up_with_a_of_their_own_get_both(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Law: the stack has both A's, at twice the rank and the scale of one, and each half its own."""
    folder = tunerkit.export(ours(build), tmp_path / "out", form="experts", rank=4)
    held = {name: torch.randn_like(tensor) for name, tensor in peft_folders.held(folder).items()}
    changed = {**peft_folders.settings(folder), "lora_alpha": 6}
    peft_folders.folder(folder, changed, {f"base_model.model.{name}": each for name, each in held.items()})
    model = tunerkit.load(build(), folder)
    assert tunerkit.tuner(model).ranks()[GATE_UP] == 8
    q, p = products(model)[GATE_UP]
    up = f"model.layers.0.{'block_sparse_moe.experts.1.w3' if build is mixtral else 'mlp.experts.1.up_proj'}"
    wanted = held[f"{up}.lora_B.weight"] @ held[f"{up}.lora_A.weight"] * 6 / 4
    rows = (p @ q)[1]
    assert torch.allclose(rows[1::2] if build is gpt_oss else rows.chunk(2)[1], wanted, atol=1e-5)


def in_layout(folder: Path, version: str | None, *, swapped: bool) -> tuple[Path, dict[str, Tensor]]:
    """Write random matrices at both stacks of layer 0, as PEFT did; return the changes of the parameters.

    PEFT's formula: A.reshape(E, r, -1) and B.reshape(-1, r, E), with s1 for the input (up to 0.18), or s2.
    """
    model, rank, count = qwen(8), 2, 4
    experts: Any = model.get_submodule("model.layers.0.mlp.experts")
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for name, level in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
        _, s1, s2 = getattr(experts, name).shape
        inputs, outputs = (s2, s1) if swapped else (s1, s2)
        a, b = torch.randn(count * rank, inputs), torch.randn(outputs, rank * count)
        order = "ore,eri->eoi" if swapped else "ore,eri->eio"
        deltas[name] = torch.einsum(order, b.reshape(outputs, rank, count), a.reshape(count, rank, inputs))
        start = f"base_model.model.model.layers.0.mlp.experts{level}"
        tensors |= {f"{start}.lora_A.weight": a, f"{start}.lora_B.weight": b}
    names = [f"layers.0.mlp.experts.{name}" for name in deltas]
    settings = {
        "peft_version": version,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [],
        "target_parameters": names,
    }
    return peft_folders.folder(folder, settings, tensors), deltas


@pytest.mark.parametrize(("version", "swapped"), [("0.18.1", False), ("0.19.0", False), ("0.19.1", True), (None, True)])
def test_both_layouts_of_pefts_are_read(version: str | None, swapped: bool, tmp_path: Path) -> None:
    """Law: shapes say which one it is, also for a square stack beside another one."""
    folder, deltas = in_layout(tmp_path, version, swapped=swapped)
    found = products(tunerkit.load(qwen(8), folder))
    for path, name in ((GATE_UP, "gate_up_proj"), (DOWN, "down_proj")):
        assert torch.allclose(found[path].p @ found[path].q, deltas[name], atol=1e-5)


@pytest.mark.parametrize(("version", "swapped"), [("0.18.1", False), ("0.19.0", False), ("0.21.2", True)])
def test_square_experts_alone_go_by_the_version(version: str, swapped: bool, tmp_path: Path) -> None:
    """Law: where shapes fit both layouts, the release of PEFT decides; without one the folder is refused."""
    folder, deltas = in_layout(tmp_path, version, swapped=swapped)
    tensors = {f"base_model.model.{name}": each for name, each in peft_folders.held(folder).items() if "base_l" in name}
    tensors = {name.replace(".base_layer", ""): each for name, each in tensors.items()}
    settings = {**peft_folders.settings(folder), "target_parameters": ["layers.0.mlp.experts.gate_up_proj"]}
    product = products(tunerkit.load(qwen(8), peft_folders.folder(folder, settings, tensors)))[GATE_UP]
    assert torch.allclose(product.p @ product.q, deltas["gate_up_proj"], atol=1e-5)
    for unclear in (None, "0.19.1.dev0@main"):
        peft_folders.folder(folder, {**settings, "peft_version": unclear}, tensors)
        peft_folders.refused(folder, "square", "'peft_version'", "'0.21.2'", model=qwen(8))


def test_what_is_not_whole_is_refused(tmp_path: Path) -> None:
    """A layer without its tensors, settings without a parameter, and experts of another size."""
    by_peft(qwen(), tmp_path)
    settings = peft_folders.settings(tmp_path)
    held = {f"base_model.model.{name}": tensor for name, tensor in peft_folders.held(tmp_path).items()}
    first = {name: tensor for name, tensor in held.items() if "layers.1.mlp" not in name}
    lost = peft_folders.folder(tmp_path / "lost", settings, first)
    peft_folders.refused(lost, "incomplete", "model.layers.1.mlp.experts.gate_up_proj", model=qwen())
    unnamed = peft_folders.folder(tmp_path / "unnamed", {**settings, "target_parameters": ["gate_up_proj"]}, held)
    peft_folders.refused(unnamed, "2 parameters", "names 'gate_up_proj'", model=qwen())
    with pytest.raises(BaseMismatchError, match=r"4 experts of \[20, 16\] need \[4 r, 16\] and \[20, 4 r\]"):
        tunerkit.load(qwen(10), tmp_path)
    single = tunerkit.export(ours(qwen), tmp_path / "single", form="experts")
    held = {
        f"base_model.model.{name}": each for name, each in peft_folders.held(single).items() if ".3.up_" not in name
    }
    few = peft_folders.folder(tmp_path / "few", peft_folders.settings(single), held)
    peft_folders.refused(few, "experts.3.up_proj is missing", model=qwen())


def test_experts_that_no_plugin_knows_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder, packed or not, and in a config object."""
    packed, single = tmp_path / "packed", tmp_path / "single"
    by_peft(qwen(), packed)
    tunerkit.export(ours(qwen), single, form="experts")
    for module in ("packed_experts", "object_targets"):
        monkeypatch.setattr(f"tunerkit_peft.{module}.stacks_of", lambda modules: {})
    peft_folders.refused(packed, "'target_parameters'", "tunerkit[experts]", "merge_and_unload", model=qwen())
    with pytest.raises(FileError, match=r"an expert by itself, .*tunerkit\[experts\]"):
        tunerkit.load(qwen(), single)
    with pytest.raises(ConfigError, match=r"'gate_up_proj', which is no stack .*tunerkit\[experts\]"):
        tunerkit.wrap(qwen(), "lora", peft.LoraConfig(target_modules=[], target_parameters=["gate_up_proj"]))


def test_a_folder_is_described_without_a_model(tmp_path: Path) -> None:
    """The rank is that of one expert, and the settings name the parameters."""
    by_peft(qwen(), tmp_path)
    told = describe(tmp_path)
    start = "model.layers.1.mlp.experts"
    assert (told.ranks[start], told.ranks[f"{start}.base_layer"]) == (3, 3)
    named: Any = told.settings["target_parameters"]
    assert sorted(named) == ["experts.down_proj", "experts.gate_up_proj"]  # a set in PEFT


def _targets(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Rank and scale by path, as PEFT names it."""
    tuner: Any = tunerkit.tuner(model)
    return {path.replace(".stacks.", "."): (adapter.rank, adapter.scale) for path, adapter in tuner.adapters().items()}


@pytest.mark.parametrize(
    ("build", "given"),
    [
        (qwen, {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": []}),
        (qwen, {"target_parameters": ["experts.down_proj"], "target_modules": ["q_proj"], "layers_to_transform": [1]}),
        (
            qwen,
            {
                "target_parameters": ["gate_up_proj"],
                "target_modules": ["q_proj"],
                "rank_pattern": {"mlp.experts.gate_up_proj": 2},
                "alpha_pattern": {"gate_up_proj": 3, "q_proj": 9},
            },
        ),
        (qwen, {"target_modules": ["gate_proj", "up_proj", "down_proj", "v_proj"]}),
        (mixtral, {"target_modules": ["w2"]}),
        (gpt_oss, {"target_modules": "all-linear"}),
        (gpt_oss, {"target_modules": ["q_proj", "down_proj"]}),
    ],
)
def test_a_config_object_means_the_stacks_that_peft_adapts(
    build: Callable[[], nn.Module], given: dict[str, Any]
) -> None:
    """Law: the same parameters with the same ranks and scales, and no others."""
    adapted: Any = peft.get_peft_model(build(), peft.LoraConfig(r=4, lora_alpha=6, **given))  # type: ignore[arg-type]
    wanted = {}
    for path, layer in adapted.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            name = getattr(layer, "parameter_name", "")
            wanted[path.replace(".base_layer", "") + f".{name}" * bool(name)] = (
                layer.r["default"],
                layer.scaling["default"],
            )
    assert _targets(tunerkit.wrap(build(), "lora", peft.LoraConfig(r=4, lora_alpha=6, **given))) == wanted


def test_routers_of_all_linear_are_refused() -> None:
    """PEFT adapts them for this model, and tunerkit does not."""
    with pytest.raises(ConfigError, match=r"'gate\.weight', which is no stack of experts of this model: .*routers"):
        tunerkit.wrap(qwen(), "lora", peft.LoraConfig(target_modules="all-linear"))


ROUTED: Final[dict[str, Any]] = {
    **{**SIZES, "num_key_value_heads": 4, "moe_intermediate_size": 12, "n_routed_experts": 4, "n_group": 2},
    **{"topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
}


def deepseek() -> nn.Module:
    """A dense layer, and one with a shared expert."""
    latent: dict[str, Any] = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    return built(hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**ROUTED, **latent, v_head_dim=4)))


def glm() -> nn.Module:
    """The same with plain attention."""
    return built(hf.Glm4MoeForCausalLM(hf.Glm4MoeConfig(**{**ROUTED, "head_dim": 8})))


SHARING: Final[Mapping[str, Callable[[], nn.Module]]] = {"deepseek": deepseek, "glm": glm}
each_sharing = pytest.mark.parametrize("build", SHARING.values(), ids=SHARING)
each_way = pytest.mark.parametrize("installed", [True, False], ids=["by-peft", "by-table"])
SHARED: Final = "model.layers.1.mlp.shared_experts.down_proj"
OF_PEFT: Final = "peft.utils.transformers_weight_conversion"


def adapted_at(model: nn.Module, targets: list[str] | None, **settings: Any) -> nn.Module:
    """A LoRA of ours with random values; None for the default targets."""
    torch.manual_seed(4)
    given: dict[str, Any] = {"targets": targets} if targets else {}
    tunerkit.wrap(model, "lora", {"rank": 3, "alpha": 5, **given, **settings})
    randomize_(model)
    return model.eval()


def read_by_peft(build: Callable[[], nn.Module], folder: Path) -> Tensor:
    adapted: Any = peft.PeftModel.from_pretrained(build(), str(folder))  # type: ignore[arg-type]
    return output(adapted.eval())


@each_sharing
@each_way
@pytest.mark.parametrize("form", ["uniform", "compact"])
@pytest.mark.parametrize(
    "targets", [["down_proj"], ["experts", "shared_experts.down_proj"], None, ["shared_experts.down_proj"]], ids=str
)
def test_dense_layers_and_shared_experts_that_peft_would_lose_are_refused(
    build: Callable[[], nn.Module],
    installed: bool,
    form: str,
    targets: list[str] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Law: nothing is written, with PEFT and without it; and with the error's ``exclude`` PEFT computes the same."""
    if not installed:
        monkeypatch.setitem(sys.modules, OF_PEFT, None)
    with pytest.raises(FileError, match=r"names of projections, such as 'down_proj', for the stacks") as caught:
        tunerkit.export(adapted_at(build(), targets), tmp_path / "out", format="peft", form=form)
    text = str(caught.value)
    assert f"\n- {SHARED}\n" in text
    assert ".experts." not in text
    assert "unwrap(model, keep_merged=True)" in text
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    found = re.search(r"exclude=(\[.*\])", text)
    assert found
    if targets == ["shared_experts.down_proj"]:
        assert "form='adalora'" in text
        return
    monkeypatch.undo()
    model = adapted_at(build(), targets, exclude=ast.literal_eval(found[1]))
    folder = tunerkit.export(model, tmp_path / "out", format="peft", form=form)
    assert close(read_by_peft(build, folder), output(model))


@each_sharing
@each_way
@pytest.mark.parametrize("form", ["uniform", "compact", "experts"])
@pytest.mark.parametrize("targets", [["experts"], ["o_proj", "experts"]], ids=str)
def test_peft_computes_the_same_beside_dense_layers_that_are_no_targets(
    build: Callable[[], nn.Module],
    installed: bool,
    form: str,
    targets: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Law: stacks alone, and with attention, are written without a warning."""
    model = adapted_at(build(), targets)
    if not installed:
        monkeypatch.setitem(sys.modules, OF_PEFT, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TunerkitWarning)
        folder = tunerkit.export(model, tmp_path / "out", format="peft", form=form)
    monkeypatch.undo()
    assert not close(output(build()), output(model))
    assert close(read_by_peft(build, folder), output(model))


@each_way
@pytest.mark.parametrize(
    ("build", "targets", "lost"),
    [
        (deepseek, None, SHARED),
        (glm, ["shared_experts.down_proj"], SHARED),
        (qwen, ["gate_up_proj"], "model.layers.0.mlp.experts.gate_up_proj"),
        (gpt_oss, ["experts", "q_proj"], "model.layers.1.mlp.experts.down_proj"),
    ],
)
def test_the_form_of_engines_warns_where_peft_computes_something_else(
    build: Callable[[], nn.Module],
    installed: bool,
    targets: list[str] | None,
    lost: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Law: it is written, comes back here, and PEFT's output is another one."""
    model = adapted_at(build(), targets)
    if not installed:
        monkeypatch.setitem(sys.modules, OF_PEFT, None)
    with pytest.warns(TunerkitWarning, match="PEFT itself does not read this form of this adapter") as caught:
        folder = tunerkit.export(model, tmp_path / "out", format="peft", form="experts")
    assert f"\n- {lost}" in str(caught[0].message)
    monkeypatch.undo()
    assert same(products(tunerkit.load(build(), folder)), products(model))
    assert not close(read_by_peft(build, folder), output(model))


def test_an_adalora_has_names_that_peft_leaves_as_they_are(tmp_path: Path) -> None:
    """The way out that the error names where no stack is adapted."""
    model = adapted_at(deepseek(), ["shared_experts.down_proj"])
    folder = tunerkit.export(model, tmp_path / "out", format="peft", form="adalora")
    assert close(read_by_peft(deepseek, folder), output(model))


def test_an_adalora_of_stacks_is_refused_by_their_paths(tmp_path: Path) -> None:
    """PEFT's name of a wrapper says nothing."""
    with pytest.raises(FileError, match=r"\n- model\.layers\.0\.mlp\.experts\.gate_up_proj \(a stack of exp") as caught:
        tunerkit.export(ours(qwen), tmp_path / "out", format="peft", form="adalora")
    assert "base_layer" not in str(caught.value)


def test_the_table_for_environments_without_peft_is_pefts() -> None:
    """Law: the same types of models, and the same names."""
    conversion = importlib.import_module(OF_PEFT)
    names = conversion._MOE_TARGET_MODULE_MAPPING
    wanted = {kind: names[like] for kind, like in conversion._MODEL_TO_CONVERSION_PATTERN.items() if names.get(like)}
    assert wanted == peft_stacks._TYPES
