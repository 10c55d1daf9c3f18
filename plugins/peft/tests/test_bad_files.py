"""Files that are damaged, contradictory, or hold what tunerkit cannot: one error each, and an unchanged model."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import tunerkit
from plugins.peft.tests import peft_folders
from plugins.peft.tests.peft_folders import PREFIX, refused
from tunerkit import patterns
from tunerkit_peft import settings as peft_settings

pytestmark = pytest.mark.usefixtures("no_other_types")
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
FIRST = f"{PREFIX}layers.0.query"
EMBEDDING = f"{PREFIX}embed_tokens"


# The setting, its value, and parts of the error beside the file and the name.
SETTINGS: list[tuple[str, Any, str]] = [
    ("r", "8", "expected an integer"),
    ("r", 0, "expected an integer from 1"),
    ("r", 2.0, "expected an integer"),
    ("r", True, "expected an integer"),
    ("r", 10**30, "expected an integer from 1 to 1000000"),
    ("lora_alpha", "16", "expected a number, at most"),
    ("lora_alpha", 1e300, "at most 1e+12"),
    ("lora_alpha", float("nan"), "expected a number"),
    ("lora_alpha", [1], "expected a number"),
    ("lora_dropout", 1.0, "below 1"),
    ("use_rslora", "yes", "true or false"),
    ("bias", "some", "'lora_only'"),
    ("modules_to_save", "head", "list of names"),
    ("modules_to_save", [1], "list of names"),
    ("rank_pattern", [["query", 4]], "maps patterns to numbers"),
    ("rank_pattern", {"query": "4"}, "rank_pattern.query"),
    ("rank_pattern", {"query": -1}, "rank_pattern.query"),
    ("alpha_pattern", {"query": None}, "alpha_pattern.query"),
    ("rank_pattern", {"(query": 2}, "cannot be used"),
    ("alpha_pattern", {"*query": 2}, "cannot be used"),
    ("base_model_name_or_path", 5, "expected a text"),
    ("peft_type", "PROMPT_TUNING", "LORA and ADALORA"),
    ("peft_type", "LORRA", "did you mean 'LORA'"),
    ("peft_type", None, "no 'peft_type'"),
    ("init_lora_weights", "pissa_niter_4", "changes the base weights by a random decomposition"),
    ("init_lora_weights", "corda", "changes the base weights"),
    ("init_lora_weights", "loftq", "changes the base weights"),
    ("init_lora_weights", "lora_ga", "changes the base weights"),
    ("use_dora", True, "merge it in PEFT"),
    ("lora_bias", True, "merge it in PEFT"),
    ("trainable_token_indices", [1, 2], "the embedding of the input has no rows in the file"),
    ("trainable_token_indices", {"embed_tokens": [-1]}, "a list of ids, or an object that maps names"),
    ("layer_replication", [[0, 1], [0, 2]], "merge it in PEFT"),
    ("target_parameters", "experts.gate_up_proj", "expected a list of names"),
    ("alora_invocation_tokens", [5], "plain LoRA"),
    ("use_qalora", True, "plain LoRA"),
    ("use_bdlora", {"nblocks": 2}, "block-diagonal"),
    ("arrow_config", {"top_k": 2}, "load each"),
    ("kasa_config", {"beta": 1}, "merge it in PEFT"),
    ("monteclora_config", {"num_samples": 8}, "merge it in PEFT"),
    ("megatron_config", {"tensor_model_parallel_size": 2}, "plain LoRA"),
    ("use_tora", True, "did you mean"),
    ("brand_new", 3, "PEFT 0.21 does not have"),
]


@pytest.mark.parametrize(("name", "value", "part"), SETTINGS)
def test_a_setting_that_cannot_be_used_is_named(tmp_path: Path, name: str, value: Any, part: str) -> None:
    """The error names the file and the setting, and says what is expected or what to do."""
    refused(peft_folders.folder(tmp_path, {name: value}), "adapter_config.json", name, part)


def test_a_pattern_that_takes_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The patterns of a file share a number of steps."""
    tensors = {f"{PREFIX}{'a' * 30}.lora_{side}.weight": torch.ones(1, 1) for side in "AB"}
    folder = peft_folders.folder(tmp_path, {"r": 1, "rank_pattern": {"(?:a|aa|a)+c": 2}}, tensors)
    monkeypatch.setattr(patterns, "_STEPS", 100)
    refused(folder, "rank_pattern", "too many steps", model=nn.ModuleDict({"a" * 30: nn.Linear(1, 1)}))


def without(name: str) -> Change:
    """Leave a tensor out."""
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def plus(name: str, value: Tensor) -> Change:
    """Add or replace a tensor."""
    return lambda tensors: {**tensors, name: value}


# What is wrong, the change, settings, and parts of the error.
TENSORS: dict[str, tuple[Change, dict[str, Any], tuple[str, ...]]] = {
    "a pair without B": (without(f"{FIRST}.lora_B.weight"), {}, ("lora_A.weight", "without its lora_B")),
    "a pair without A": (without(f"{FIRST}.lora_A.weight"), {}, ("lora_B.weight", "without its lora_A")),
    "NaN": (plus(f"{FIRST}.lora_A.weight", torch.full((2, 4), torch.nan)), {}, ("NaN", "layers.0.query")),
    "inf": (plus(f"{FIRST}.lora_B.weight", torch.full((4, 2), torch.inf)), {}, ("inf", "layers.0.query")),
    "integers": (plus(f"{FIRST}.lora_A.weight", torch.ones(2, 4, dtype=torch.int32)), {}, ("I32", "F32")),
    "unequal ranks": (plus(f"{FIRST}.lora_A.weight", torch.ones(3, 4)), {}, ("[3, 4]", "[4, 2]")),
    "a vector": (plus(f"{FIRST}.lora_A.weight", torch.ones(4)), {}, ("[4]", "[r, in]")),
    "a rank that r does not explain": (lambda t: t, {"r": 4}, ("rank 2", "'r' and 'rank_pattern' say 4")),
    "a rank that no pattern explains": (lambda t: t, {"rank_pattern": {"query": 8}}, ("rank 2", "say 8")),
    "an ambiguous alpha": (
        lambda t: t,
        {"alpha_pattern": {"query": 4, "0.query": 8}},
        ("alpha_pattern", "'layers.0.query'", "sorts the patterns", "by 'query'"),
    ),
    "λ in a LoRA": (plus(f"{FIRST}.lora_E", torch.ones(2, 1)), {}, ("lora_E", "peft_type")),
    "an AdaLoRA without λ": (lambda t: t, {"peft_type": "ADALORA", "init_r": 2}, ("without its lora_E",)),
    "DoRA's vector": (plus(f"{FIRST}.lora_magnitude_vector", torch.ones(4)), {}, ("lora_magnitude_vector", "nothing")),
    "a bias of lora_B": (plus(f"{FIRST}.lora_B.bias", torch.ones(4)), {}, ("lora_B.bias",)),
    "a bias that is not trained": (plus(f"{PREFIX}head.bias", torch.ones(3)), {}, ("head.bias", "'bias' must say so")),
    "a head that is not trained": (plus(f"{PREFIX}head.weight", torch.ones(3, 4)), {}, ("modules_to_save",)),
    "half a head": (
        plus(f"{PREFIX}head.weight", torch.ones(3, 4)),
        {"modules_to_save": ["head"]},
        ("missing", "head", "bias"),
    ),
    "a head of another size": (
        lambda t: {**t, f"{PREFIX}head.weight": torch.ones(5, 4), f"{PREFIX}head.bias": torch.ones(5)},
        {"modules_to_save": ["head"], "base_model_name_or_path": "org/base"},
        ("head",),
    ),
    "an unknown tensor": (plus("base_model.model.layers.0.query.extra", torch.ones(1)), {}, ("query.extra",)),
    "a tensor without the prefix": (plus("layers.0.value.lora_A.weight", torch.ones(2, 4)), {}, ("does not begin",)),
    "another model's paths": (
        lambda t: peft_folders.tensors(("layers.7.query",)),
        {"base_model_name_or_path": "org/deeper"},
        ("layers.7.query", "org/deeper"),
    ),
    "another model's shapes": (
        lambda t: {name: value.repeat(1, 2) if "lora_A" in name else value for name, value in t.items()},
        {"base_model_name_or_path": "org/wider"},
        ("(2, 8)", "org/wider"),
    ),
    "no adapter": (lambda t: {"weight": torch.ones(2)}, {}, ("no adapter", "lora_A")),
    "no tensors": (lambda t: {}, {}, ("no adapter",)),
    "another embedding": (
        plus(f"{EMBEDDING}.base_layer.weight", torch.ones(10, 4)),
        {},
        ("embed_tokens.base_layer.weight", "differs"),
    ),
    "a table of another size that is trained in full": (
        plus(f"{EMBEDDING}.weight", torch.ones(44, 4)),
        {"modules_to_save": ["embed_tokens"]},
        ("'embed_tokens'", "44 rows", "has 10", "model.resize_token_embeddings(44)"),
    ),
    "a head that the model lacks": (
        plus(f"{PREFIX}classifier.weight", torch.ones(3, 4)),
        {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
        ("'classifier'", "this Net does not have", "AutoModelForSequenceClassification"),
    ),
    "an adapted head that the model lacks": (
        lambda t: {**t, **peft_folders.tensors(("lm_head",))},
        {},
        ("'lm_head'", "this Net does not have"),
    ),
    "a trained bias that the settings deny": (
        plus(f"{FIRST}.base_layer.bias", torch.ones(4)),
        {},
        ("differs", "set 'bias' to 'lora_only' or 'all'"),
    ),
    "a linear adapter of an embedding": (
        lambda t: {**t, **peft_folders.tensors(("embed_tokens",))},
        {},
        ("embed_tokens.lora_A.weight", "Embedding", "lora_embedding_A"),
    ),
    "an embedding's adapter of a linear layer": (
        lambda t: {name.replace("lora_", "lora_embedding_").removesuffix(".weight"): each for name, each in t.items()},
        {},
        ("layers.0.query.lora_embedding_A", "Linear", "writes lora_A"),
    ),
    "a target that is trained in full too": (
        lambda t: {**t, f"{FIRST}.weight": torch.ones(4, 4), f"{FIRST}.bias": torch.ones(4)},
        {"modules_to_save": ["0.query"]},
        ("'layers.0.query' is adapted", "leave one out"),
    ),
    "a resized embedding": (
        plus(f"{EMBEDDING}.weight", torch.ones(12, 4)),
        {},
        ("[12, 4]", "[10, 4]", "resize_token_embeddings(12)"),
    ),
}


@pytest.mark.parametrize("wrong", TENSORS)
def test_tensors_that_cannot_be_used_are_named(tmp_path: Path, wrong: str) -> None:
    """The error names the file and the tensor or module, and what is wrong with it."""
    change, config, parts = TENSORS[wrong]
    refused(peft_folders.folder(tmp_path, config, change(peft_folders.tensors())), str(tmp_path), *parts)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "JSON"),
        ("[1]", "JSON object"),
        ('"LORA"', "JSON object"),
        ('{"peft_type": ', "JSON"),
        ("[" * 100_000, "JSON"),
        ('{"r": ' + "9" * 5000 + "}", "JSON"),
        ("\udcff", "JSON"),
    ],
)
def test_settings_that_are_no_object_are_refused(tmp_path: Path, text: str, part: str) -> None:
    """Text that is no JSON, or no object, is one error that names the file."""
    peft_folders.folder(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(tmp_path, "adapter_config.json", part)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    """A file that was cut anywhere is one error that names it."""
    file = peft_folders.folder(tmp_path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(tmp_path, "adapter_model.safetensors", "incomplete")


def test_all_wrong_values_are_named_at_once(tmp_path: Path) -> None:
    """One error lists every problem of the settings."""
    text = refused(peft_folders.folder(tmp_path, {"r": "x", "bias": 1, "use_dora": True}))
    assert all(f"'{name}'" in text for name in ("r", "bias", "use_dora"))


def test_every_field_of_pefts_configs_is_decided() -> None:
    """No field of the installed peft's LoRA and AdaLoRA is unknown to tunerkit."""
    import dataclasses

    import peft

    known = peft_settings.READ | peft_settings.HARMLESS | peft_settings.REFUSED.keys()
    names = {each.name for cls in (peft.LoraConfig, peft.AdaLoraConfig) for each in dataclasses.fields(cls)}
    assert names <= known


def test_default_settings_of_peft_are_accepted(tmp_path: Path) -> None:
    """All fields at their defaults, as peft writes them, are no obstacle."""
    import peft

    peft.LoraConfig(r=2, target_modules=["query"]).save_pretrained(str(tmp_path / "defaults"))
    defaults = json.loads((tmp_path / "defaults" / "adapter_config.json").read_text())
    model = tunerkit.load(peft_folders.net(), peft_folders.folder(tmp_path / "adapter", defaults))
    assert tunerkit.tuner(model).ranks() == {"layers.0.query": 2, "layers.1.query": 2}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def assert_loaded_or_unchanged(folder: Path) -> None:
    model = peft_folders.net()
    names = [*model.state_dict()]
    try:
        tunerkit.load(model, folder)
    except tunerkit.TunerkitError:
        assert [*model.state_dict()] == names
    else:
        assert set(tunerkit.tuner(model).ranks()) <= {"layers.0.query", "layers.1.query"}


@given(
    name=st.sampled_from(sorted(peft_settings.READ | peft_settings.HARMLESS | peft_settings.REFUSED.keys())),
    kind=st.sampled_from(("LORA", "ADALORA")),
    value=VALUES,
)
@settings(max_examples=60, deadline=None)
def test_any_value_of_any_setting_is_used_or_refused(name: str, kind: str, value: Any) -> None:
    """Whatever JSON holds, there is no error of another class, and the model has an adapter or is as it was."""
    with TemporaryDirectory() as path, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = peft_folders.tensors()
        if kind == "ADALORA":
            weights = {key.removesuffix(".weight"): each for key, each in weights.items()}
            weights |= {f"{PREFIX}layers.{layer}.query.lora_E": torch.ones(2, 1) for layer in (0, 1)}
        folder = peft_folders.folder(Path(path), {"peft_type": kind, "init_r": 2, name: value}, weights)
        assert_loaded_or_unchanged(folder)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_damage_of_the_tensors_is_read_or_refused(data: st.DataObject) -> None:
    """Whichever bytes of the file change, there is no error of another class, and no half of an adapter."""
    with TemporaryDirectory() as path, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = peft_folders.folder(Path(path)) / "adapter_model.safetensors"
        content = bytearray(file.read_bytes())
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
            content[place] = data.draw(st.integers(0, 255))
        file.write_bytes(content)
        assert_loaded_or_unchanged(Path(path))
