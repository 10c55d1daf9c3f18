"""The rules of the engines: which folders each applies to, and that the uniform form is free of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from plugins.serving.tests.serving_folders import paths, random_folder, write
from tunerkit_serving import ENGINES, Finding, Severity, check, chosen, read_folder, vllm
from tunerkit_serving.scaling import peft_scale

ALL_LEAVES = ("q_proj", "k_proj", "v_proj")
ZEROS = torch.zeros(4)


def plain(path: Path, **settings: Any) -> Path:
    return random_folder(path, *ALL_LEAVES, **settings)


def with_tensors(*names: str, **settings: Any) -> Callable[[Path], Path]:
    """A folder with further tensors in layer 0, and perhaps further settings."""

    def made(path: Path) -> Path:
        pairs = {name: (torch.randn(8, 16), torch.randn(16, 8)) for name in paths(*ALL_LEAVES)}
        return write(path, pairs, dict.fromkeys(names, ZEROS), r=8, lora_alpha=8, **settings)

    return made


def with_settings(**settings: Any) -> Callable[[Path], Path]:
    return lambda path: plain(path, **settings)


def named(*names: str, **settings: Any) -> Callable[[Path], Path]:
    return lambda path: random_folder(path, names=[*paths(*ALL_LEAVES), *names], **settings)


def unequal(path: Path) -> Path:
    """Ranks 8 and 24, as a compact folder has them: 24 is padded to 32."""
    ranks = {name: 24 if "layers.1" in name else 8 for name in paths(*ALL_LEAVES)}
    pairs = {name: (torch.randn(rank, 16), torch.randn(16, rank)) for name, rank in ranks.items()}
    return write(path, pairs, {}, r=24, lora_alpha=24, rank_pattern={"model\\.layers\\.0\\.self_attn\\..*": 8})


def convolution(path: Path) -> Path:
    pairs = {"features.0": (torch.randn(8, 4, 3, 3), torch.randn(16, 8, 1, 1))}
    return write(path, pairs, {}, r=8, lora_alpha=8)


def only(*leaves: str, where: str = "self_attn") -> Callable[[Path], Path]:
    names = [f"model.layers.{number}.{where}.{leaf}" for number in range(2) for leaf in leaves]
    return lambda path: random_folder(path, names=names)


def first_layer_without_k(path: Path) -> Path:
    return random_folder(path, names=[*paths("q_proj", "v_proj"), paths("k_proj")[0]])


def packed_experts(path: Path) -> Path:
    """Four experts of rank 8 in each pair, as peft writes them."""
    names = [f"model.layers.0.mlp.experts{level}" for level in ("", ".base_layer")]
    pairs = {name: (torch.randn(32, 16), torch.randn(16, 32)) for name in names}
    pairs |= {name: (torch.randn(8, 16), torch.randn(16, 8)) for name in paths(*ALL_LEAVES)}
    named = {
        "target_modules": [*ALL_LEAVES],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    return write(path, pairs, {}, r=8, lora_alpha=8, **named)


def adalora(path: Path) -> Path:
    """As peft writes it: names without ``.weight``, and a third factor."""
    from safetensors.torch import save_file

    plain(path, peft_type="ADALORA", init_r=12, rank_pattern=None)
    tensors: dict[str, torch.Tensor] = {}
    for name in paths(*ALL_LEAVES):
        start = f"base_model.model.{name}"
        tensors |= {f"{start}.lora_A": torch.randn(3, 16), f"{start}.lora_B": torch.randn(16, 3)}
        tensors |= {f"{start}.lora_E": torch.randn(3, 1)}
    save_file(tensors, path / "adapter_model.safetensors")
    return path


# (engine, folder, severity, a few words of the rule, words of the key)
CASES: Mapping[str, tuple[str, Callable[[Path], Path], str, str, str]] = {
    "vllm, IA3": ("vllm", with_settings(peft_type="IA3"), "refused", "only LoRA is served", "peft_type='IA3'"),
    "vllm, AdaLoRA": ("vllm", adalora, "refused", "tensors must be named lora_A.weight", "peft_type='ADALORA'"),
    "vllm, rank": ("vllm", with_settings(rank=32), "refused", "must not exceed --max-lora-rank", "rank 32"),
    "vllm, DoRA": ("vllm", with_settings(use_dora=True), "refused", "DoRA is not supported", "use_dora=True"),
    "vllm, aLoRA": ("vllm", with_settings(alora_invocation_tokens=[1]), "refused", "variants of LoRA", "alora_invoc"),
    "vllm, PiSSA": ("vllm", with_settings(init_lora_weights="pissa_niter_4"), "refused", "PiSSA", "init_lora_weights"),
    "vllm, bias": ("vllm", with_settings(bias="lora_only"), "refused", "biases", "bias='lora_only'"),
    "vllm, head": ("vllm", with_settings(modules_to_save=["lm_head"]), "refused", "only classifier and score", "lm_h"),
    "vllm, Conv2d": ("vllm", convolution, "refused", "only linear layers and embeddings", "features.0"),
    "vllm, wte": ("vllm", with_tensors("wte.base_layer.weight"), "refused", "by name", "wte.base_layer.weight"),
    "vllm, experts": ("vllm", packed_experts, "wrong", "packed into one pair are dropped", "0.mlp.experts.base_layer"),
    "vllm, patterns": ("vllm", with_settings(alpha_pattern={"q_proj": 2}), "wrong", "up to 0.31", "times 1, not 0.25"),
    "vllm, table": ("vllm", with_tensors("m.embed_tokens.base_layer.weight"), "ignored", "is skipped", "embed_tokens"),
    "vllm, base": ("vllm", with_settings(base_model_name_or_path=None), "ignored", "VLLM_LORA_RES", "base_model_name"),
    "vllm, padding": ("vllm", with_settings(rank=12), "slow", "one of the allowed ranks", "rank 12 in buffers of 16"),
    "sglang, IA3": ("sglang", with_settings(peft_type="IA3"), "refused", "must be LORA", "peft_type='IA3'"),
    "sglang, AdaLoRA": ("sglang", adalora, "refused", "must be LORA", "peft_type='ADALORA'"),
    "sglang, DoRA": ("sglang", with_settings(use_dora=True), "refused", "DoRA", "use_dora=True"),
    "sglang, rank": ("sglang", with_settings(rank=128), "refused", "--max-lora-rank", "rank 128, the server allows 64"),
    "sglang, regex": ("sglang", with_settings(target_modules=".*proj"), "refused", "must be a list", "'.*proj'"),
    "sglang, ranks": ("sglang", unequal, "refused", "every tensor must have rank r", "(rank 8, r=24)"),
    "sglang, q": ("sglang", only("q_proj"), "refused", "q_proj needs v_proj", "(q_proj without v_proj)"),
    "sglang, v": ("sglang", only("v_proj"), "refused", "need q_proj", "(v_proj without q_proj)"),
    "sglang, up": ("sglang", only("up_proj", where="mlp"), "refused", "up_proj needs", "(up_proj without gate_proj)"),
    "sglang, experts": ("sglang", packed_experts, "refused", "and not as PEFT packs them", "0.mlp.experts, "),
    "sglang, c_attn": ("sglang", only("c_attn"), "refused", "only if the model's class", "self_attn.c_attn"),
    "sglang, rsLoRA": ("sglang", with_settings(use_rslora=True), "wrong", "lora_alpha / r", "times 1, not 2.82843"),
    "sglang, outside": ("sglang", named("h.0.q_proj", "h.0.v_proj"), "wrong", "outside layers.N", "h.0.q_proj"),
    "sglang, head": ("sglang", named("lm_head", target_modules=["q_proj"]), "wrong", "does not name them", "lm_head"),
    "sglang, bias": ("sglang", with_tensors("model.norm.bias"), "wrong", "place of a lora_B", "model.norm.bias"),
    "sglang, saved": ("sglang", with_settings(modules_to_save=["score"]), "wrong", "trained in full", "['score']"),
    "sglang, PiSSA": ("sglang", with_settings(init_lora_weights="olora"), "wrong", "unchanged base", "'olora'"),
    "sglang, aLoRA": ("sglang", with_settings(lora_bias=True), "wrong", "variants are not read", "lora_bias=True"),
    "llama.cpp, folder": ("llama.cpp", plain, "refused", "takes a GGUF file", "adapter"),
    "llama.cpp, IA3": ("llama.cpp", with_settings(peft_type="IA3"), "refused", "only LoRA can be converted", "'IA3'"),
    "llama.cpp, DoRA": ("llama.cpp", with_settings(use_dora=True), "refused", "converter stops", "use_dora=True"),
    "llama.cpp, rsLoRA": ("llama.cpp", with_settings(use_rslora=True), "wrong", "reads only lora_alpha", "times 1"),
    "llama.cpp, PiSSA": ("llama.cpp", with_settings(init_lora_weights="pissa"), "wrong", "unchanged base", "'pissa'"),
    "ollama, IA3": ("ollama", with_settings(peft_type="IA3"), "refused", "only LoRA is converted", "'IA3'"),
    "ollama, AdaLoRA": ("ollama", adalora, "refused", "AdaLoRA has lora_A, lora_B and lora_E", "'ADALORA'"),
    "ollama, alpha": ("ollama", with_settings(lora_alpha=8.0), "refused", "must be a whole number", "lora_alpha=8.0"),
    "ollama, names": ("ollama", named("lm_head"), "refused", "only the projections", "lm_head"),
    "ollama, bias": ("ollama", with_settings(bias="all"), "refused", "when the model starts", "bias='all'"),
    "ollama, q": ("ollama", plain, "wrong", "reordered", "q_proj"),
    "ollama, rsLoRA": ("ollama", with_settings(use_rslora=True), "wrong", "only lora_alpha is read", "times 1"),
    "ollama, PiSSA": ("ollama", with_settings(init_lora_weights="pissa"), "wrong", "unchanged base", "'pissa'"),
    "mlx": ("mlx", plain, "refused", "reads adapters.safetensors", "adapter"),
    "tgi, IA3": ("tgi", with_settings(peft_type="IA3"), "refused", "only LoRA is read", "'IA3'"),
    "tgi, AdaLoRA": ("tgi", adalora, "wrong", "nothing of AdaLoRA is left", "'ADALORA'"),
    "tgi, ranks": ("tgi", unequal, "refused", "need one rank", "q_proj (padded ranks 8 to 32)"),
    "tgi, layers": ("tgi", first_layer_without_k, "wrong", "if one layer lacks it", "k_proj (in 1 layers only)"),
    "tgi, head": ("tgi", named("lm_head"), "wrong", "others are dropped", "lm_head"),
    "tgi, padding": ("tgi", with_settings(rank=4), "wrong", "overwritten with the padded rank", "times 0.5, not 1"),
    "tgi, bias": ("tgi", with_settings(bias="all"), "wrong", "biases are not read", "bias='all'"),
    "tgi, saved": ("tgi", with_settings(modules_to_save=["score"]), "wrong", "trained in full", "['score']"),
    "tgi, DoRA": ("tgi", with_settings(use_dora=True), "wrong", "variants", "use_dora=True"),
    "tgi, large": ("tgi", with_settings(rank=256), "slow", "above 128", "rank 256"),
}


def found(engine: str, folder: Path, max_rank: int | None = None) -> list[Finding]:
    return list(check(read_folder(folder), [ENGINES[engine]], max_rank))


@pytest.mark.parametrize("name", CASES)
def test_a_rule_is_told_with_its_source_and_what_to_do(name: str, tmp_path: Path) -> None:
    """The finding names severity, rule, setting or tensor, source and version, and a command where there is one."""
    engine, made, severity, says, key = CASES[name]
    findings = found(engine, made(tmp_path / "adapter"), 64 if name == "sglang, rank" else None)
    told = [finding for finding in findings if says in finding.rule and key in finding.key]
    assert [finding.severity.value for finding in told] == [severity], findings
    assert told[0].source.count(", ") >= 1
    assert told[0].mend is None or told[0].mend.startswith(("tunerkit ", "python ", "vllm "))
    assert (told[0].mend is None) == (severity in ("ignored", "slow"))


def test_every_rule_has_a_case() -> None:
    """No rule for folders is there that no folder of the cases above meets."""
    told = set()
    for engine, _, _, says, _ in CASES.values():
        told |= {(engine, rule.says) for rule in ENGINES[engine].folder_rules if says in rule.says}
    assert told == {(name, rule.says) for name, engine in ENGINES.items() for rule in engine.folder_rules}


@pytest.mark.parametrize("rank", [8, 16, 32, 64])
def test_the_uniform_form_is_fit(rank: int, tmp_path: Path) -> None:
    """vLLM, SGLang and TGI have nothing against it, and the command that serves it names the rank."""
    folder = random_folder(tmp_path / "adapter", "q_proj", "k_proj", "v_proj", "o_proj", rank=rank)
    findings = check(read_folder(folder), chosen("vllm,sglang,tgi"), max_rank=rank)
    assert [finding.severity for finding in findings] == [Severity.FINE] * 3
    assert f"--max-lora-rank {rank} " in str(findings[0].mend)
    assert f"rank {rank}" in findings[0].key


def test_the_worst_comes_first_and_fine_only_where_nothing_is_bad(tmp_path: Path) -> None:
    """A folder that is refused, wrong and slow is not fine."""
    findings = found("vllm", plain(tmp_path, rank=12, bias="all", alpha_pattern={"q_proj": 2}))
    assert [finding.severity.value for finding in findings] == ["refused", "wrong", "slow"]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_packed_experts_are_written_for_each_expert(engine: str, tmp_path: Path) -> None:
    """Law: that is the one finding, and its command writes the form that both engines read."""
    (finding,) = found(engine, packed_experts(tmp_path / "a"))
    assert str(finding.mend).endswith("--set form=experts")


def test_many_modules_are_counted(tmp_path: Path) -> None:
    """A finding names three of them, and how many there are besides."""
    findings = found("sglang", plain(tmp_path, use_rslora=True))
    assert findings[0].key.endswith("and 3 more")


@pytest.mark.parametrize(("rank", "size"), [(1, 1), (7, 8), (16, 16), (300, 320), (512, 512), (513, None)])
def test_vllm_allows_some_ranks(rank: int, size: int | None) -> None:
    """The least allowed rank that is large enough, if there is one."""
    assert vllm.allowed(rank) == size


def test_a_rank_that_vllm_does_not_allow_at_all_is_merged(tmp_path: Path) -> None:
    """Beyond 512 there is no option, so the command merges."""
    finding = found("vllm", plain(tmp_path / "a", rank=513))[0]
    assert str(finding.mend).startswith("tunerkit merge ")


def test_commands_quote_what_a_shell_would_split(tmp_path: Path) -> None:
    """Folders with blanks and quotes stay one word."""
    finding = found("sglang", plain(tmp_path / "a b'c", use_rslora=True))[0]
    assert """a b'"'"'c'""" in str(finding.mend)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_command_of_tunerkit_is_told_for_what_it_refuses(engine: str, tmp_path: Path) -> None:
    """DoRA is merged by PEFT, whatever the rule; patterns would call for another conversion."""
    made = plain(tmp_path / "a", rank=4, use_dora=True, alpha_pattern={"q_proj": 2})
    mends = [str(finding.mend) for finding in found(engine, made) if finding.severity.is_bad]
    assert mends
    assert all(mend.startswith("python -c ") and "merge_and_unload" in mend for mend in mends)


@pytest.mark.parametrize("engine", ["llama.cpp", "ollama"])
def test_a_trained_head_is_merged_and_not_written_as_gguf(engine: str, tmp_path: Path) -> None:
    """The file cannot hold it, and PEFT's class for language models would lose it."""
    made = plain(tmp_path / "a", modules_to_save=["score"])
    assert {str(finding.mend).split(" --")[0] for finding in found(engine, made)} == {f"tunerkit merge {made}"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "AutoPeftModelForCausalLM"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "AutoPeftModelForSeq2SeqLM"),
        ({"task_type": "TOKEN_CLS", "modules_to_save": ["classifier"]}, "AutoPeftModelForTokenClassification"),
        ({"modules_to_save": ["score"]}, "AutoPeftModelForSequenceClassification"),
    ],
)
def test_peft_merges_with_the_class_of_the_task(settings: Mapping[str, Any], words: str, tmp_path: Path) -> None:
    """Without a task the head decides, and its rows are the number of classes."""
    pairs = {name: (torch.randn(8, 16), torch.randn(16, 8)) for name in paths("q_proj")}
    heads = {f"{name}.weight": torch.zeros(5, 16) for name in settings.get("modules_to_save", ())}
    made = write(tmp_path / "a", pairs, heads, r=8, lora_alpha=8, use_dora=True, **settings)
    mend = str(found("vllm", made)[0].mend)
    assert f"{words} as Model" in mend
    assert ("num_labels=5" in mend) == bool(heads)


def test_the_first_pattern_that_matches_counts(tmp_path: Path) -> None:
    """As in peft, in the order of the file; a pattern may be the end of a path, and a dot matches any character."""
    patterns = {"layers.0.self_attn.q_proj": 1, "self_attn.(q|k)_proj": 2, "elf_attn.v_proj": 3, "_proj": 4}
    scale = peft_scale(read_folder(plain(tmp_path, alpha_pattern=patterns)))
    got = [scale(path) * 8 for path in paths(*ALL_LEAVES)]
    assert got == [1, 2, 8, 2, 2, 8]


def test_seven_hundred_exact_patterns_take_no_steps(tmp_path: Path) -> None:
    """A compact folder has a pattern for each module; they are matched outside the steps that patterns share."""
    names = [f"model.layers.{n}.self_attn.{leaf}" for n in range(100) for leaf in ("q", "k", "v", "o", "a", "b", "c")]
    patterns = {name.replace(".", "\\."): 4 for name in names}
    scale = peft_scale(read_folder(random_folder(tmp_path, names=names, rank=1, alpha_pattern=patterns)))
    assert {scale(name) for name in names} == {4.0}


def test_findings_are_plain_records(tmp_path: Path) -> None:
    """They hold text, so that JSON can have them."""
    finding = attrs.asdict(found("mlx", plain(tmp_path))[0])
    assert list(finding) == ["engine", "severity", "rule", "key", "source", "mend"]
