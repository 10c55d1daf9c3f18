"""`tunerkit.from_folder` on a PEFT folder, or a name on the hub: base, adapter and tokenizer in one call."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tunerkit
from plugins.peft.tests.peft_models import CASES
from tunerkit import hooks
from tunerkit.errors import BaseMismatchError, FileError, TunerkitError

pytest.importorskip("tunerkit_transformers", reason="tunerkit-transformers is not installed")
hf = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
LLAMA = CASES["llama"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a base with a tokenizer, and one of an adapter of it."""
    import peft

    at = tmp_path_factory.mktemp("folders")
    save(LLAMA.build(), at / "base")
    tokenizer().save_pretrained(at / "base")
    base = hf.AutoModelForCausalLM.from_pretrained(at / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(str(at / "adapter"))
    return at


def save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def tokenizer() -> Any:
    words = tokenizers.models.WordLevel({f"w{number}": number for number in range(40)}, unk_token="w0")
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words))


def edited(folders: Path, at: Path, **changes: Any) -> Path:
    """The adapter with other settings."""
    shutil.copytree(folders / "adapter", at)
    found = json.loads((at / "adapter_config.json").read_text())
    (at / "adapter_config.json").write_text(json.dumps({**found, **changes}))
    return at


def same(model: Any, folders: Path) -> bool:
    expected = LLAMA.output(tunerkit.load(LLAMA.build(), folders / "adapter"))
    return torch.equal(LLAMA.output(model), expected)


def test_the_base_is_the_one_that_the_files_name(folders: Path) -> None:
    """With its adapter in eval mode, and its tokenizer."""
    model, words = tunerkit.from_folder(folders / "adapter")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert same(model, folders)
    assert len(words) == 40


def test_a_tilde_is_the_home_folder(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both paths."""
    monkeypatch.setenv("HOME", str(folders))
    monkeypatch.setenv("USERPROFILE", str(folders))
    assert same(tunerkit.from_folder("~/adapter", base="~/base")[0], folders)


def test_a_path_that_no_file_system_allows_is_one_error() -> None:
    """As every path with nothing there is."""
    with pytest.raises(TunerkitError, match=r"x{100}"):
        tunerkit.from_folder("x" * 5000)


def test_the_class_may_be_named_in_place_of_a_task(folders: Path, tmp_path: Path) -> None:
    """As PEFT writes it without a task. A module that the file names is never imported."""
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "no_module_of_this_name"}
    folder = edited(folders, tmp_path / "adapter", task_type=None, auto_mapping=mapping)
    model, _ = tunerkit.from_folder(folder)
    assert same(model, folders)


def test_a_tokenizer_beside_the_adapter_is_the_one(folders: Path, tmp_path: Path) -> None:
    """If it has more tokens than the base, the base gets rows for them, as the adapter's has."""
    import peft

    grown = tokenizer()
    grown.add_tokens(["new", "newer"])
    base = hf.AutoModelForCausalLM.from_pretrained(folders / "base")
    base.resize_token_embeddings(42)
    heads = ["embed_tokens", "lm_head"]
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=heads, task_type="CAUSAL_LM")
    ).eval()
    theirs.save_pretrained(str(tmp_path / "adapter"))
    grown.save_pretrained(tmp_path / "adapter")
    model, words = tunerkit.from_folder(tmp_path / "adapter")
    ids = torch.tensor([[1, 41]])
    assert len(words) == 42
    assert torch.equal(model(ids).logits, theirs(ids).logits)


def test_a_name_on_the_hub_is_read_from_the_cache(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a connection too; a name that is not there is one error."""
    from huggingface_hub import constants

    place = tmp_path / "cache" / "models--owner--adapter"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    shutil.copytree(folders / "adapter", place / "snapshots" / "abc")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(tunerkit.from_folder("owner/adapter")[0], folders)
    with pytest.raises(FileError, match="no folder 'owner/other', and the Hugging Face hub does not give"):
        tunerkit.from_folder("owner/other")


@pytest.mark.parametrize(
    ("changes", "base", "error", "words"),
    [
        ({"base_model_name_or_path": None}, None, TunerkitError, "does not say what its base model is"),
        ({"base_model_name_or_path": "/gone/away"}, None, TunerkitError, "the base model was in /gone/away"),
        ({"task_type": "SEQ_CLS"}, "other", BaseMismatchError, "no module named 'model.layers.0.self_attn.q_proj'"),
    ],
)
def test_a_base_that_cannot_be_had_is_said(
    folders: Path, tmp_path: Path, changes: dict[str, Any], base: str | None, error: type[Exception], words: str
) -> None:
    """With the argument that names another one."""
    folder = edited(folders, tmp_path / "adapter", **changes)
    if base is not None:
        save(CASES["bert"].build(), tmp_path / base)
    place = None if base is None else tmp_path / base
    with pytest.raises(error, match=rf"(?s){re.escape(words)}.*in Python, that is tunerkit\.from_folder\("):
        tunerkit.from_folder(folder, base=place)


def test_without_the_plugin_of_the_format_it_is_named(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it, as `tunerkit.load` says it."""
    monkeypatch.setattr(hooks, "gather_formats", dict)
    with pytest.raises(FileError, match=r"in the format of PEFT.*tunerkit-peft"):
        tunerkit.from_folder(folders / "adapter")


def test_a_base_without_a_tokenizer_gives_none(folders: Path, tmp_path: Path) -> None:
    """And a warning, since a pipeline would miss it."""
    save(LLAMA.build(), tmp_path / "bare")
    with pytest.warns(tunerkit.TunerkitWarning, match="no tokenizer or image processor"):
        model, words = tunerkit.from_folder(folders / "adapter", base=tmp_path / "bare")
    assert words is None
    assert same(model, folders)
