"""Files that lost tensors are refused, and what peft itself saves is not, however its settings name the modules."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import tunerkit
from plugins.peft.tests import peft_adapters, peft_folders
from plugins.peft.tests.peft_folders import PREFIX
from plugins.peft.tests.peft_models import CASES
from tunerkit import patterns

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def saved(path: Path, name: str, config: peft.LoraConfig) -> Path:
    """An adapter of one of the models that peft saved."""
    made: Any = peft.get_peft_model(CASES[name].build(), config)  # type: ignore[arg-type]
    peft_adapters.randomize_(made)
    made.save_pretrained(str(path))
    return path


def without(folder: Path, part: str) -> None:
    """Take all tensors with a part in their names out of a folder."""
    kept = {PREFIX + name: each for name, each in peft_folders.held(folder).items() if part not in name}
    assert len(kept) < len(peft_folders.held(folder))
    peft_folders.folder(folder, peft_folders.settings(folder), kept)


LORA = peft.LoraConfig
# The model, the settings, the part of the names that is lost, and what the error names.
LOST: dict[str, tuple[str, Callable[[], peft.LoraConfig], str, str]] = {
    "a layer, by names": ("llama", lambda: LORA(target_modules=["q_proj"]), ".layers.1.", "'target_modules': 'model.l"),
    "a layer, by an expression": (
        "vit",
        lambda: LORA(target_modules=r".*\.(q|v)_proj"),
        ".1.",
        "'target_modules': 'vit.",
    ),
    "a name": ("llama", lambda: LORA(target_modules=["q_proj", "v_proj"]), "v_proj", "layers.0.self_attn.v_proj"),
    "a name, by an expression": ("llama", lambda: LORA(target_modules=".*(q|v)_proj"), "v_proj", "self_attn.v_proj"),
    "a path": ("bert", lambda: LORA(target_modules=["query", "bert.pooler.dense"]), "pooler", "'bert.pooler.dense'"),
    "one of the layers to transform": (
        "bert",
        lambda: LORA(target_modules=["query", "value"], layers_to_transform=[1]),
        "value",
        "'target_modules': 'bert.encoder.layer.1.attention.self.value'",
    ),
    "a head": ("bert", lambda: LORA(target_modules=["query"], modules_to_save=["classifier"]), "classifier", "'classi"),
    "a head of a task": (
        "gpt2",
        lambda: LORA(target_modules=["c_attn"], fan_in_fan_out=True, task_type="SEQ_CLS"),
        "score",
        "'modules_to_save': 'score'",
    ),
    "all biases": ("bert", lambda: LORA(target_modules=["query"], bias="all"), "bias", "'bias' 'all': 'bert.em"),
    "biases of targets": ("llama", lambda: LORA(target_modules=["q_proj"], bias="lora_only"), "bias", "q_proj'"),
    "some biases": (
        "bert",
        lambda: LORA(target_modules=["query"], bias="all"),
        "layer.1.output.dense.bias",
        "1.output",
    ),
    "a kind of biases": ("bert", lambda: LORA(target_modules=["query"], bias="all"), "LayerNorm.bias", "LayerNorm'"),
}


@pytest.mark.parametrize("lost", LOST)
def test_what_the_settings_name_must_be_there(tmp_path: Path, lost: str) -> None:
    """The error names the setting, the modules and the way out; the model is unchanged."""
    name, config, part, told = LOST[lost]
    saved(tmp_path, name, config())
    model = CASES[name].build()
    tunerkit.unwrap(tunerkit.load(model, tmp_path))
    without(tmp_path, part)
    with pytest.raises(tunerkit.errors.FileError, match=r"(?s)incomplete.*Save the adapter again") as caught:
        tunerkit.load(model, tmp_path)
    assert told in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert not any("tunerkit" in name for name, _ in model.named_modules())


WHOLE: dict[str, tuple[str, Callable[[], peft.LoraConfig]]] = {
    "all linear layers": ("bert", lambda: LORA(target_modules="all-linear")),
    "all linear layers of a task": ("bert", lambda: LORA(target_modules="all-linear", task_type="SEQ_CLS", bias="all")),
    "all but some": (
        "llama",
        lambda: LORA(target_modules=["q_proj", "v_proj"], exclude_modules=["0.self_attn.v_proj"]),
    ),
    "all but an expression": ("llama", lambda: LORA(target_modules=["q_proj"], exclude_modules=r".*\.0\..*")),
    "one layer": ("gpt2", lambda: LORA(target_modules=["c_attn"], layers_to_transform=1, fan_in_fan_out=True)),
    "named blocks": (
        "bert",
        lambda: LORA(target_modules=["query"], layers_to_transform=[0], layers_pattern=["layer"]),
    ),
    "targets in a copy": ("bert", lambda: LORA(target_modules=["dense", "query"], modules_to_save=["pooler"])),
    "a head that this model lacks": (
        "llama",
        lambda: LORA(target_modules=["q_proj"], modules_to_save=["lm_head", "score"]),
    ),
    "attention": ("attention", lambda: LORA(target_modules=["attention", "first"], bias="lora_only")),
    "pruned modules": (
        "t5",
        lambda: peft.AdaLoraConfig(target_modules=["q", "v", "wi"], init_r=2, target_r=1, total_step=5),
    ),
}


@pytest.mark.parametrize("whole", WHOLE)
def test_what_peft_leaves_out_is_not_missed(tmp_path: Path, whole: str) -> None:
    """Folders that peft saved are read without an error and without a warning."""
    name, config = WHOLE[whole]
    saved(tmp_path, name, config())
    with warnings.catch_warnings():
        warnings.simplefilter("error", tunerkit.TunerkitWarning)
        model = tunerkit.load(CASES[name].build(), tmp_path)
    assert tunerkit.tuner(model).ranks()


def test_modules_that_the_training_may_not_have_had_are_a_remark(tmp_path: Path) -> None:
    """A part of the model in which nothing is like the file's modules may be new, so its modules stay as they are."""
    model: Any = peft_folders.net()
    model.vision = peft_folders.Block()
    with pytest.warns(tunerkit.TunerkitWarning, match=r"'target_modules' also names 'vision\.query'"):
        tunerkit.load(model, peft_folders.folder(tmp_path))


@pytest.mark.parametrize("targets", ["(query", "(?R)"])
def test_an_expression_that_cannot_be_used_is_a_remark(tmp_path: Path, targets: str) -> None:
    """The tensors say where the adapter is."""
    with pytest.warns(tunerkit.TunerkitWarning, match="'target_modules' cannot be compared"):
        tunerkit.load(peft_folders.net(), peft_folders.folder(tmp_path, {"target_modules": targets}))


def test_an_expression_that_takes_too_long_is_a_remark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter is read without it."""
    monkeypatch.setattr(patterns, "_STEPS", 100)
    name = "a" * 30
    tensors = {f"{PREFIX}{name}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    folder = peft_folders.folder(tmp_path, {"target_modules": "(?:a|aa|a)+c"}, tensors)
    with pytest.warns(tunerkit.TunerkitWarning, match="'target_modules' cannot be compared.*too many steps"):
        tunerkit.load(nn.ModuleDict({name: nn.Linear(2, 2), "b": nn.Linear(2, 2), "a" * 29: nn.Linear(2, 2)}), folder)


def test_all_linear_as_a_word_is_compared_with_care(tmp_path: Path) -> None:
    """PEFT leaves out heads by rules of its own, so what is missing is a remark."""
    folder = peft_folders.folder(tmp_path, {"target_modules": "all-linear"})
    with pytest.warns(tunerkit.TunerkitWarning, match=r"also names 'layers\.0\.value', 'layers\.1\.value', 'head'"):
        tunerkit.load(peft_folders.net(), folder)


@pytest.mark.parametrize("bias", ["none", "adapters", "all"])
@pytest.mark.parametrize("form", ["uniform", "compact", "adalora"])
def test_what_tunerkit_writes_is_complete(tmp_path: Path, form: str, bias: str) -> None:
    """Its settings name what the file has, and nothing else."""
    given = {"rank": 2, "targets": ["re:.*0.query", "value"], "bias": bias, "train_modules": ["head"]}
    model = tunerkit.wrap(peft_folders.net(), "lora", given)
    peft_adapters.randomize_(model)
    folder = tunerkit.export(model, tmp_path / "out", form=form)
    with warnings.catch_warnings():
        warnings.simplefilter("error", tunerkit.TunerkitWarning)
        again = tunerkit.load(peft_folders.net(), folder)
    assert tunerkit.tuner(again).ranks().keys() == tunerkit.tuner(model).ranks().keys()


def test_biases_of_a_head_with_several_modules_are_ignored(tmp_path: Path) -> None:
    """With bias="all" PEFT saves them again, with the adapter's name between, whatever that is."""
    import transformers as hf

    def build() -> nn.Module:
        torch.manual_seed(0)
        config = hf.RobertaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
        return hf.RobertaForSequenceClassification(config).eval()

    config = LORA(r=2, target_modules=["query"], task_type="SEQ_CLS", bias="all")
    made: Any = peft.get_peft_model(build(), config, adapter_name="news")  # type: ignore[arg-type]
    peft_adapters.randomize_(made)
    made.eval().save_pretrained(str(tmp_path))
    assert "classifier.modules_to_save.news.dense.bias" in peft_folders.held(tmp_path / "news")
    ids = torch.tensor([[5, 3, 9, 1, 7]])
    expected = made(ids).logits
    assert torch.allclose(tunerkit.load(build(), tmp_path / "news")(ids).logits, expected, atol=1e-5)
