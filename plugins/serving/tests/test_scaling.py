"""Each engine's scaling rule, against the change of the weight that peft itself computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tunerkit
from plugins.serving.tests.serving_folders import Decoder, close, paths, uniform
from tunerkit.plugin import factors_of
from tunerkit_serving import ENGINES, Folder, check, chosen, read_folder, sglang, vllm
from tunerkit_serving.scaling import misscaled, peft_scale, scaled

peft = pytest.importorskip("peft", reason="the oracle is peft")

Delta = Callable[[Folder], Any]
DELTAS: dict[str, Delta] = {name: engine.delta for name, engine in ENGINES.items()} | {"vllm 0.31": vllm.delta_before}


def made_by_peft(path: Path, config: Any) -> dict[str, Tensor]:
    """Save an adapter of peft with random factors, and return what peft adds to each weight."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Decoder(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(path)
    return changes(model)


def changes(model: Any) -> dict[str, Tensor]:
    inner = model.get_base_model()
    return {path: inner.get_submodule(path).get_delta_weight("default").detach() for path in paths()}


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(target_modules=[*("q_proj", "k_proj", "v_proj", "o_proj")], r=8, lora_alpha=16, **settings)


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"layers.1.self_attn.q_proj": 3, r".*\.v_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"self_attn.q_proj": 4, "model.layers.0.self_attn.(k|o)_proj": 2.5}},
    "both": {"use_rslora": True, "rank_pattern": {"k_proj": 5}, "alpha_pattern": {"k_proj": 5, "q_proj": 1}},
}
# What is silently wrong, or not there at all. MLX-LM and SGLang have one rank, so they refuse unequal ones.
WRONG = {
    "plain": set[str](),
    "rsLoRA": {"sglang", "llama.cpp", "ollama", "mlx"},
    "rank_pattern": {"sglang", "mlx", "tgi", "vllm 0.31"},
    "alpha_pattern": {"sglang", "llama.cpp", "ollama", "mlx", "tgi", "vllm 0.31"},
    "both": {"sglang", "llama.cpp", "ollama", "mlx", "tgi", "vllm 0.31"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_our_reading_of_peft_is_pefts(name: str, tmp_path: Path) -> None:
    """B·A times the scale that the settings name is what peft adds to the weight."""
    wanted = made_by_peft(tmp_path, lora(**CONFIGS[name]))
    folder = read_folder(tmp_path)
    assert close(scaled(folder, peft_scale(folder)), wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_engines_are_wrong_where_their_sources_say_so(name: str, tmp_path: Path) -> None:
    """With settings that an engine does not read its change of the weight is another one."""
    wanted = made_by_peft(tmp_path, lora(**CONFIGS[name]))
    folder = read_folder(tmp_path)
    assert {engine for engine, delta in DELTAS.items() if not close(delta(folder), wanted)} == WRONG[name]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rank", [8, 16, 32, 64])
def test_the_uniform_form_is_right_in_every_engine(name: str, rank: int, tmp_path: Path) -> None:
    """One rank, alpha = r and no patterns: all of them add what peft adds."""
    wanted = made_by_peft(tmp_path / "peft", lora(**CONFIGS[name]))
    source = read_folder(tmp_path / "peft")
    scales = peft_scale(source)
    folder = read_folder(uniform(tmp_path / "uniform", factors(source, scales), rank))
    assert {engine for engine, delta in DELTAS.items() if not close(delta(folder), wanted)} == set()
    assert not list(misscaled(folder, sglang.scale(folder)))


def factors(folder: Folder, scale: Callable[[str], float]) -> dict[str, tuple[Tensor, Tensor]]:
    from safetensors.torch import load_file

    tensors = load_file(folder.path / "adapter_model.safetensors")
    return {path: (tensors[pair.a], scale(path) * tensors[pair.b]) for path, pair in folder.pairs.items()}


@pytest.mark.parametrize("rank", [8, 16, 32, 64])
def test_a_pruned_adalora_of_peft_is_right_in_its_uniform_form(rank: int, tmp_path: Path) -> None:
    """Modules without any rank are zeros, and the others are what peft adds."""
    config = peft.AdaLoraConfig(
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_r=6, target_r=2, lora_alpha=9, total_step=10
    )
    made_by_peft(tmp_path, config)
    model = peft.get_peft_model(Decoder(), config)
    folded = {}
    for number, path in enumerate(paths()):
        layer = model.get_base_model().get_submodule(path)
        a, b, e = (getattr(layer, name)["default"] for name in ("lora_A", "lora_B", "lora_E"))
        for tensor in (a, b, e):
            torch.nn.init.normal_(tensor)
        with torch.no_grad():
            e[number % 4 :] = 0  # ranks 0 to 3
        kept = slice(0, number % 4)
        folded[path] = (a * e)[kept].detach(), (9 / (6 + 1e-5) * b)[:, kept].detach()
    folder = read_folder(uniform(tmp_path / "uniform", folded, rank))
    assert {engine for engine, delta in DELTAS.items() if not close(delta(folder), changes(model))} == set()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rank", [8, 16, 32, 64])
def test_what_we_export_is_right_in_every_engine(name: str, rank: int, tmp_path: Path) -> None:
    """An adapter of peft, loaded and exported in the uniform form: all engines add what peft adds."""
    wanted = made_by_peft(tmp_path / "peft", lora(**CONFIGS[name]))
    model = tunerkit.load(Decoder(), tmp_path / "peft")
    tunerkit.export(model, tmp_path / "uniform", format="peft", rank=rank)
    folder = read_folder(tmp_path / "uniform")
    assert {engine for engine, delta in DELTAS.items() if not close(delta(folder), wanted)} == set()
    findings = check(folder, chosen("vllm,sglang,tgi"), max_rank=rank)
    assert {finding.severity.value for finding in findings} - {"ignored"} == {"fine"}


def test_the_compact_form_is_right_where_patterns_or_own_ranks_are_read(tmp_path: Path) -> None:
    """Not in SGLang, MLX-LM, TGI and older vLLM: they have one scale, and the check says so."""
    wanted = made_by_peft(tmp_path / "peft", lora(**CONFIGS["both"]))
    tunerkit.export(tunerkit.load(Decoder(), tmp_path / "peft"), tmp_path / "compact", format="peft", form="compact")
    folder = read_folder(tmp_path / "compact")
    wrong = {engine for engine, delta in DELTAS.items() if not close(delta(folder), wanted)}
    assert wrong == {"sglang", "mlx", "tgi", "vllm 0.31"}
    bad = {finding.engine for finding in check(folder, ENGINES.values()) if "scale" in finding.rule}
    assert {"sglang", "vllm"} <= bad


def test_a_trained_adalora_is_right_in_its_uniform_form(tmp_path: Path) -> None:
    """With modules of rank 0 among its targets."""
    pytest.importorskip("tunerkit_adalora", reason="the plugin tunerkit-adalora is not installed")
    settings = {
        "targets": ["re:.*_proj"],
        "init_rank": 2,
        "target_rank": 1,
        "total_steps": 8,
        "t_init": 1,
        "delta_t": 1,
        "t_final": 1,
    }
    model = tunerkit.wrap(Decoder(), "adalora", settings, seed=0)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.1)
    tunerkit.attach(model, optimizer)
    for _ in range(8):
        layers = [model.get_submodule(path) for path in paths()]
        # The later a layer, the smaller its gradients: the last ones are pruned to nothing.
        sum(layer(torch.ones(1, 16)).pow(2).sum() * 0.1**number for number, layer in enumerate(layers)).backward()
        optimizer.step()
        optimizer.zero_grad()
    tuner = tunerkit.tuner(model)
    assert 0 in tuner.ranks().values()
    tunerkit.export(model, tmp_path / "uniform", format="peft", rank=8)
    folder = read_folder(tmp_path / "uniform")
    wanted = {path: each.p @ each.q for path, each in factors_of(tuner).items()}
    assert len(folder.pairs) == len(wanted) == 8
    assert {engine for engine, delta in DELTAS.items() if not close(delta(folder), wanted)} == set()


def test_tgi_drops_a_type_of_layer_that_one_layer_lacks(tmp_path: Path) -> None:
    """What peft trained only in some layers is missing in the answer."""
    wanted = made_by_peft(tmp_path / "peft", lora())
    source = read_folder(tmp_path / "peft")
    some = {path: pair for path, pair in factors(source, peft_scale(source)).items() if path != paths("q_proj")[1]}
    folder = read_folder(uniform(tmp_path / "some", some, 8))
    got = ENGINES["tgi"].delta(folder)
    assert close(got, {path: wanted[path] for path in paths("k_proj", "v_proj", "o_proj")})


def test_tgi_overwrites_r_with_the_padded_rank(tmp_path: Path) -> None:
    """With rank 4 the first type of layer is right, and all later ones have half their change."""
    wanted = made_by_peft(tmp_path, peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], r=4))
    got = ENGINES["tgi"].delta(read_folder(tmp_path))
    right = {path: change if path.endswith("q_proj") else change / 2 for path, change in wanted.items()}
    assert close(got, right)
