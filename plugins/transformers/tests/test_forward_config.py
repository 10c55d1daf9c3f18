"""A base whose config says that it computes something else is another base, although its weights are the same."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from torch import nn

import tunerkit
from tunerkit.errors import BaseMismatchError
from tunerkit.serialization.header import digest
from tunerkit_transformers.forward_config import forward_config
from tunerkit_transformers.forward_fields import FORWARD_FIELDS

if TYPE_CHECKING:
    from tests.support.toys import Toys


def config(**fields: object) -> Any:
    """Something like a config of transformers."""
    return SimpleNamespace(**{"model_type": "toy", "rms_norm_eps": 1e-6, "num_attention_heads": 4, **fields})


def with_config(toys: "Toys", **fields: object) -> Any:
    model = toys.net()
    model.config = config(**fields)
    return model


CHANGES: dict[str, tuple[dict[str, object], dict[str, object], str]] = {
    "a norm's epsilon": ({}, {"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-06 -> 1e-05"),
    "heads": ({}, {"num_attention_heads": 2}, "num_attention_heads 4 -> 2"),
    "an activation": ({"hidden_act": "silu"}, {"hidden_act": "gelu"}, "hidden_act 'silu' -> 'gelu'"),
    "RoPE": (
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
        "rope_parameters.rope_type 'default' -> 'linear'",
    ),
    "RoPE of an older release": (
        {"rope_theta": 1e4},
        {"rope_parameters": {"rope_theta": 5e5}},
        "rope_parameters.rope_theta 10000.0 -> 500000.0",
    ),
    "a config in a config": (
        {"text_config": config()},
        {"text_config": config(rms_norm_eps=1e-5)},
        "text_config.rms_norm_eps 1e-06 -> 1e-05",
    ),
    "the architecture": ({}, {"model_type": "other"}, "model_type 'toy' -> 'other'"),
    "a list": ({"layer_types": ("full", "slide")}, {"layer_types": ["full", "full"]}, "layer_types"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_the_same_weights_under_another_forward_are_another_base(toys: "Toys", tmp_path: Path, case: str) -> None:
    """Refused, with both values and the override; with it, the adapter is loaded."""
    saved, here, words = CHANGES[case]
    path = tunerkit.save(tunerkit.wrap(with_config(toys, **saved), "toy-shift", {"targets": ["conv"]}), tmp_path)
    assert tunerkit.load(with_config(toys, **saved), path) is not None
    base = with_config(toys, **here)
    with pytest.raises(BaseMismatchError) as caught:
        tunerkit.load(base, path)
    assert words in str(caught.value)
    assert "check_config=False" in str(caught.value)
    assert tunerkit.adapters(base) == {}
    assert list(tunerkit.adapters(tunerkit.load(base, path, check_config=False))) == ["default"]


@pytest.mark.parametrize(
    ("saved", "here"),
    [
        ({}, {"dropout": 0.5, "use_cache": False, "num_labels": 7, "torch_dtype": "bfloat16", "pad_token_id": 3}),
        ({"hidden_act": "silu"}, {}),
        ({"sliding_window": None}, {"sliding_window": 4096}),
        ({"rope_theta": 1e4, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}),
        ({"rope_scaling": {"type": "yarn"}}, {"rope_parameters": {"rope_type": "yarn"}}),
        ({"time_step_limit": (0.0, float("inf"))}, {"time_step_limit": [0.0, float("inf")]}),
    ],
)
def test_what_does_not_change_the_forward_is_no_difference(
    toys: "Toys", tmp_path: Path, saved: dict[str, object], here: dict[str, object]
) -> None:
    """Other fields, fields that only one of the two has, and the same settings as another release names them."""
    path = tunerkit.save(tunerkit.wrap(with_config(toys, **saved), "toy-shift", {"targets": ["conv"]}), tmp_path)
    assert tunerkit.load(with_config(toys, **here), path) is not None


def test_a_config_of_a_part_is_found_with_its_path(toys: "Toys") -> None:
    """A user's own module around a model of transformers has no config itself; inner modules share the model's."""
    inner = with_config(toys, vision_config=config(patch_size=16))
    inner.layers[0].config = config(rms_norm_eps=3.0)  # below a module that has one already
    found = forward_config(nn.ModuleDict({"body": inner, "other": nn.Linear(1, 1)}))
    assert found["body.rms_norm_eps"] == 1e-6
    assert found["body.vision_config.patch_size"] == 16
    assert not any(name.startswith("body.layers") for name in found)
    assert forward_config(nn.Linear(1, 1)) == {}


def test_a_config_that_contains_itself_ends(toys: "Toys") -> None:
    """Only a few levels are read."""
    own = config()
    own.text_config = own
    model = toys.net()
    model.config = own
    assert json.loads(json.dumps(forward_config(model), allow_nan=False)) == forward_config(model)


def _older(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()["tunerkit"])
    change(fields)
    text = json.dumps(fields)
    safetensors.torch.save_file(tensors, path, {"tunerkit": text, "tunerkit.digest": digest(text, tensors)})
    return path


def test_an_older_file_has_no_settings_to_compare(toys: "Toys", tmp_path: Path) -> None:
    """It is loaded as before; and the fields of the header are those that older readers know."""
    path = tunerkit.save(tunerkit.wrap(with_config(toys), "toy-shift", {"targets": ["conv"]}), tmp_path)
    with safetensors.safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()["tunerkit"])
    assert set(fields) == {
        *("format", "kind", "method", "config", "targets", "copies", "biases", "steps", "total_steps", "versions"),
        *("base", "values", "history"),
    }
    _older(path, lambda fields: fields.update(values={}))
    assert tunerkit.load(with_config(toys, rms_norm_eps=1.0), path) is not None


def test_a_model_of_transformers_is_compared_by_its_config(tmp_path: Path) -> None:
    """Real configs: a Llama with another epsilon, RoPE or number of heads, and a model with a config inside."""
    transformers = pytest.importorskip("transformers")

    def llama(**changes: Any) -> Any:
        torch.manual_seed(0)
        sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
        settings = {**sizes, "num_attention_heads": 4, "num_key_value_heads": 4, **changes}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))

    path = tunerkit.save(tunerkit.wrap(llama(), "toy-shift", {"targets": ["q_proj"]}), tmp_path)
    assert tunerkit.load(llama(attention_dropout=0.1, use_cache=False), path) is not None
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    for changes, words in (
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps 1e-06 -> 0.001"),
        ({"hidden_act": "gelu"}, "hidden_act 'silu' -> 'gelu'"),
        ({"num_attention_heads": 2, "num_key_value_heads": 2}, "num_attention_heads 4 -> 2"),
        ({"rope_parameters": rope}, "rope_parameters.rope_theta 10000.0 -> 500000.0"),
    ):
        with pytest.raises(BaseMismatchError) as caught:
            tunerkit.load(llama(**changes), path)
        assert words in str(caught.value)
    clip = SimpleNamespace(config=transformers.CLIPConfig())
    holder: Any = nn.Module()
    holder.config = clip.config
    other = copy.deepcopy(holder)
    other.config.vision_config.hidden_act = "relu"
    found, changed = forward_config(holder), forward_config(other)
    assert [name for name in found if found[name] != changed[name]] == ["vision_config.hidden_act"]
    assert (found["vision_config.hidden_act"], changed["vision_config.hidden_act"]) == ("quick_gelu", "relu")


def test_the_fields_are_those_of_configs() -> None:
    """Plain names of attributes: no name is nested, and none is a size that the weights show anyway."""
    assert all(name.isidentifier() for name in FORWARD_FIELDS)
    assert not FORWARD_FIELDS & {"hidden_size", "vocab_size", "num_labels", "dropout", "max_position_embeddings"}
