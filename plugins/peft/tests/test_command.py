"""PEFT folders on the command line: converted, verified, compared, shown and merged."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Imports after a statement: without them this file is skipped, not broken.
for _module in ("datasets", "peft", "pyarrow", "sklearn", "transformers", "typer", "tunerkit_lora", "tunerkit_adalora"):
    pytest.importorskip(_module, reason="the command needs the extra [cli], and the adapters are made by peft")

import peft  # noqa: E402
import transformers  # noqa: E402

from tests.support.tiny_classifier import save_tiny_classifier  # noqa: E402
from tests.support.tiny_models import save_tiny_llama, save_tiny_t5  # noqa: E402
from tests.support.train_command import command, succeeded  # noqa: E402
from tunerkit_peft.reading import describe  # noqa: E402

Q0 = "model.layers.0.self_attn.q_proj"


def make(name: str, base: str, kind: str, config: Any, **settings: Any) -> None:
    """Save an adapter with random values, as peft does, into the folder ``name``."""
    torch.manual_seed(0)
    model = peft.get_peft_model(getattr(transformers, kind).from_pretrained(base, **settings), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2)
            if "lora_E" in key:
                parameter.normal_(0, 0.5)
    model.save_pretrained(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Base models and PEFT folders; the working folder."""
    path = tmp_path_factory.mktemp("peft")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("HF_HUB_OFFLINE", "1")
        save_tiny_llama(path / "llama")
        save_tiny_classifier(path / "bert")
        save_tiny_t5(path / "t5")
        lora = peft.LoraConfig(
            r=4,
            lora_alpha=16,
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"layers.0.self_attn.q_proj": 2},
            task_type="CAUSAL_LM",
        )
        make("lora", "llama", "AutoModelForCausalLM", lora)
        adalora = peft.AdaLoraConfig(
            init_r=6, target_r=3, total_step=100, target_modules=["q_proj"], task_type="CAUSAL_LM"
        )
        make("adalora", "llama", "AutoModelForCausalLM", adalora)
        heads = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
        make(
            "heads",
            "bert",
            "AutoModelForSequenceClassification",
            heads,
            num_labels=5,
            ignore_mismatched_sizes=True,
        )
        heads.task_type, heads.modules_to_save = None, ["classifier"]
        make(
            "plain-heads",
            "bert",
            "AutoModelForSequenceClassification",
            heads,
            num_labels=5,
            ignore_mismatched_sizes=True,
        )
        language_model = json.loads((path / "bert/config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
        shutil.copytree(path / "bert", path / "masked")
        (path / "masked/config.json").write_text(json.dumps(language_model))
        settings = json.loads((path / "plain-heads/adapter_config.json").read_text())
        settings |= {"base_model_name_or_path": "masked", "auto_mapping": None}
        (path / "plain-heads/adapter_config.json").write_text(json.dumps(settings))
        make("bare", "t5", "AutoModelForSeq2SeqLM", peft.LoraConfig(r=2, target_modules=["q"]))
        yield path


def told(*arguments: object) -> Any:
    """What a command prints as JSON."""
    return json.loads(succeeded(*arguments, "--json").stdout)


@pytest.mark.parametrize("name", ["lora", "adalora", "heads", "plain-heads", "bare"])
def test_an_adapter_of_peft_goes_to_tunerkit_and_back(name: str, folder: Path) -> None:
    """No option but the destination: base, class and labels follow from the files. The functions are equal."""
    base = told("show", name)["base"]
    own = told("convert", name, "--to", "tunerkit", "--out", f"{name}-own")
    assert own["method"] == ("adalora" if name == "adalora" else "lora")
    told("convert", f"{name}-own", "--to", "peft", "--out", f"{name}-back", "--base", base)
    assert told("verify", name, f"{name}-own")["relative"] <= 1e-5
    assert told("diff", name, f"{name}-back")["largest"] <= 1e-6


def test_the_uniform_form_loads_in_peft_itself(folder: Path) -> None:
    """Law: ``verify`` compares with peft's own merged model, and the options of the format are passed on."""
    found = told("convert", "lora", "--to", "peft", "--out", "uniform", "--set", "rank=16", "--set", "base=llama")
    assert set(found["files"]) >= {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(Path("uniform/adapter_config.json").read_text())["r"] == 16
    kept = ("convert", "lora", "--to", "peft", "--out", "kept", "--set", "form=compact")
    assert "14 in all at 4 targets\n" in succeeded(*kept).output
    model = transformers.AutoModelForCausalLM.from_pretrained("llama", dtype=torch.float32)
    merged: Any = peft.PeftModel.from_pretrained(model, "uniform").merge_and_unload()
    merged.save_pretrained("merged-by-peft")
    assert told("verify", "lora", "merged-by-peft")["relative"] <= 1e-5


def test_a_merged_folder_equals_the_adapter(folder: Path) -> None:
    """The head with other classes is in it too."""
    succeeded("merge", "heads", "--out", "heads-merged")
    found = told("verify", "heads", "heads-merged")
    assert found["is_equal"]
    assert found["outputs"] == 3 * 5
    assert Path("heads-merged/tokenizer.json").is_file()


def test_a_description_says_what_the_files_hold(folder: Path) -> None:
    """Ranks are those of the tensors, and the class is that of the task, or the one that was wrapped."""
    lora, heads, bare = (describe(Path(name)) for name in ("lora", "heads", "bare"))
    assert (lora.method, lora.base, lora.model_class) == ("lora", "llama", "AutoModelForCausalLM")
    assert lora.ranks[Q0] == 2
    assert set(lora.ranks.values()) == {2, 4}
    assert lora.settings["alpha"] == 16
    assert (heads.model_class, heads.labels) == ("AutoModelForSequenceClassification", 5)
    assert (lora.copies, heads.copies) == ((), ("classifier",))
    assert describe(Path("plain-heads")).copies == ("classifier",)
    assert (bare.model_class, bare.labels) == ("T5ForConditionalGeneration", 0)
    assert describe(Path("adalora")).settings["target_rank"] == 3
    shown = succeeded("show", "lora").output
    assert "14 in all at" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("convert", "lora", "--to", "peft", "--out", "new", "--set", "form=compct"), "did you mean 'compact'?"),
        (("convert", "lora", "--to", "peft", "--out", "new", "--base", "bert"), "no module named"),
        (("convert", "no-base", "--to", "tunerkit", "--out", "new"), "the base model was in /gone/base"),
        (("show", "broken"), "cannot be read as JSON"),
        (("merge", "broken", "--out", "new"), "cannot be read as JSON"),
        (("diff", "lora", "heads"), "different"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], words: str, folder: Path) -> None:
    """Wrong options, another base, a base that is gone, damaged settings; nothing is written."""
    for name, change in (("no-base", {"base_model_name_or_path": "/gone/base"}), ("broken", None)):
        Path(name).mkdir(exist_ok=True)
        (Path(name) / "adapter_model.safetensors").write_bytes(Path("lora/adapter_model.safetensors").read_bytes())
        settings = json.loads(Path("lora/adapter_config.json").read_text())
        text = "{" if change is None else json.dumps({**settings, **change})
        (Path(name) / "adapter_config.json").write_text(text)
    done = command(*arguments)
    assert done.exit_code == (1 if arguments[0] == "diff" else 2)
    assert words in done.output
    assert not Path("new").exists()
