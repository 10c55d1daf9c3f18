"""The files of examples/methods as plugins of their own name that declare PEFT's names, and peft's configs for them."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import peft

import tunerkit
from tunerkit.plugin import Method, hookimpl

_FOLDER = Path(__file__).parents[3] / "examples" / "methods"
LORA_FIELDS = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False}
NAMES: dict[str, dict[str, Any]] = {
    "loha": {
        "type": "LOHA",
        "tensors": {"b1": "hada_w1_a", "a1": "hada_w1_b", "b2": "hada_w2_a", "a2": "hada_w2_b"},
        "settings": {"rank": ["r", "alpha"]},
        "constants": {"use_effective_conv2d": False, "rank_pattern": {}, "alpha_pattern": {}},
        "training": {"rank_dropout": 0.0, "module_dropout": 0.0},
        "ignored": ["init_weights"],
        "layers": ["Linear", "Conv1d", "Conv2d"],
    },
    "vera": {
        "type": "VERA",
        "tensors": {
            "b": {"name": "vera_lambda_b", "shape": ["out"]},
            "d": {"name": "vera_lambda_d", "shape": ["rank"]},
        },
        "shared": {"q": "vera_A", "p": "vera_B"},
        "settings": {"rank": "r"},
        "constants": {"save_projection": True},
        "training": {"vera_dropout": 0.0},
        "ignored": ["d_initial", "projection_prng_key", "init_weights"],
        "bias": "vera_only",
    },
    "ia3": {
        "type": "IA3",
        "tensors": {"l": {"name": "ia3_l", "shape": ["out", 1], "convolution": [1, "out", "1*"]}},
        "constants": {"feedforward_modules": []},
        "ignored": ["init_ia3_weights"],
        "layers": ["Linear", "Conv1D", "Conv2d", "Conv3d"],
    },
    "dora": {
        "type": "LORA",
        "tensors": {
            "a": {"name": "lora_A.weight", "shape": ["rank", "*in"], "embedding": "lora_embedding_A"},
            "b": {"name": "lora_B.weight", "shape": ["out", "rank", "1*"], "embedding": "lora_embedding_B"},
            "m": {"name": "lora_magnitude_vector", "shape": ["out"], "convolution": [1, "out", "1*"]},
        },
        "settings": {"rank": ["r", "lora_alpha"]},
        "constants": {"use_dora": True, **LORA_FIELDS},
        "training": {"lora_dropout": 0.0},
        "layers": ["Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding"],
        "bias": "lora_only",
    },
}


@attrs.frozen
class Example:
    """A method of the examples.

    Attributes:
        name: Its name here: another one than that of an installed method.
        config: Builds peft's config, from fields that every config has.
        cases: The models of `peft_models` that it is tried on, with the names of modules.
        settings: Our settings.
    """

    name: str
    config: Callable[..., Any]
    cases: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, Any] = attrs.field(factory=dict)


_LLAMA, _BERT = ("q_proj", "down_proj"), ("query", "dense")
EXAMPLES = {
    "loha": Example(
        "example-loha",
        lambda **fields: peft.LoHaConfig(r=3, alpha=3, **fields),
        {"llama": _LLAMA, "bert": _BERT, "convolutions": ("one", "two", "point")},
        {"rank": 3},
    ),
    "vera": Example(
        "example-vera",
        lambda **fields: peft.VeraConfig(r=5, **fields),
        {"llama": _LLAMA, "bert": _BERT, "gpt2": ("c_attn", "c_fc")},
        {"rank": 5},
    ),
    "ia3": Example(
        "example-ia3",
        lambda **fields: peft.IA3Config(feedforward_modules=[], **fields),
        {"llama": _LLAMA, "bert": _BERT, "gpt2": ("c_attn", "c_fc"), "convolutions": ("two", "three")},
    ),
    "dora": Example(
        "example-dora",
        lambda **fields: peft.LoraConfig(r=3, lora_alpha=3, use_dora=True, **fields),
        {"llama": _LLAMA, "bert": _BERT, "gpt2": ("c_attn", "c_fc"), "convolutions": ("two", "three")},
        {"rank": 3},
    ),
}


def plugin(name: str, names: Mapping[str, Any] | None = None) -> ModuleType:
    """An example's plugin with the declaration ``names``, or that of `NAMES`."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", _FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    examples = module.tunerkit_methods

    @hookimpl
    def tunerkit_methods() -> Iterator[Method]:
        for each in examples():
            foreign = {"peft": NAMES[name] if names is None else names}
            yield attrs.evolve(each, name=f"example-{each.name}", foreign=foreign)

    made = ModuleType(f"declared_{name}")
    vars(made).update({hook: value for hook, value in vars(module).items() if hook.startswith("tunerkit_")})
    vars(made)["tunerkit_methods"] = tunerkit_methods
    return made


def registered(name: str, names: Mapping[str, Any] | None = None) -> Callable[[], None]:
    """Register an example; the result takes it out again."""
    made = plugin(name, names)
    tunerkit.register(made)
    return lambda: tunerkit.unregister(made)
