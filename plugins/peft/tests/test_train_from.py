"""``tunerkit train --from`` a PEFT folder, and back to PEFT, by the commands alone."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

# Imports after a statement: without the extra this file is skipped, not broken.
for _module in ("datasets", "peft", "pyarrow", "sklearn", "transformers", "trl", "typer", "yaml"):
    pytest.importorskip(_module, reason="the command needs the extras [cli] and [lm], and peft makes the adapters")

import peft  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
)

from tests.support.tiny_classifier import save_tiny_classifier  # noqa: E402
from tests.support.tiny_models import save_tiny_llama  # noqa: E402
from tests.support.train_command import check_resumed_after_ctrl_c, command, record_of, succeeded, write_rows  # noqa: E402

SHORT = ("--batch-size", "8", "--max-length", "8", "--lr", "0.01")
BATCH = {"input_ids": torch.tensor([[2, 7, 9, 8, 3], [2, 8, 10, 7, 3]])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny decoder and a tiny classifier, and rows for both."""
    path = tmp_path_factory.mktemp("peft")
    save_tiny_llama(path / "llama")
    save_tiny_classifier(path / "bert")
    write_rows(path / "reviews.csv")
    (path / "texts.jsonl").write_text('{"text": "good film the plot"}\n{"text": "a very bad film"}\n' * 10)
    return path


def saved(config: peft.PeftConfig, base: Any, place: Path, *, steps: int = 0) -> Path:
    """Make an adapter with peft, with random values, or trained for some steps, and save it."""
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(steps):
        model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(place)
    return place


def of_llama(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "llama")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**BATCH).logits
    return found


def test_a_lora_of_peft_goes_on_for_20_steps_and_back(folder: Path, tmp_path: Path) -> None:
    """At a learning rate near 0, real peft computes the same before and after; at another one it does not."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, task_type="CAUSAL_LM"
    )
    source = saved(config, of_llama(folder), tmp_path / "peft")
    before = logits(peft.PeftModel.from_pretrained(of_llama(folder), source))
    model = ("--model", folder / "llama", "--data", folder / "texts.jsonl")
    for rate in ("1e-12", "0.01"):
        out = tmp_path / rate
        call = ("train", "--from", source, *model, *SHORT, "--lr", rate, "--set", "training.max_steps=20")
        succeeded(*call, "--out", out)
        record = record_of(out)
        assert (record["method"], record["task"], record["steps"]) == ("lora", "causal-lm", 20)
        assert sorted(record["ranks"].values()) == [2, 2, 4, 4]
        succeeded("convert", out, "--to", "peft", "--out", out / "peft")
        after = logits(peft.PeftModel.from_pretrained(of_llama(folder), out / "peft"))
        error = float((after - before).abs().max() / before.abs().max())
        assert (error < 1e-5) == (rate == "1e-12"), error


def test_a_pruned_adalora_of_peft_goes_on_from_its_ranks(folder: Path, tmp_path: Path) -> None:
    """Its base is that of its config. The second schedule begins with these ranks, and ends at their sum or less."""
    config = peft.AdaLoraConfig(
        init_r=6,
        target_r=2,
        tinit=1,
        tfinal=1,
        total_step=6,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    source = saved(config, of_llama(folder), tmp_path / "peft", steps=6)
    ranks = sorted(
        tensor.shape[0]
        for name, tensor in load_file(source / "adapter_model.safetensors").items()
        if name.endswith("lora_E")
    )
    assert sum(ranks) <= 8
    assert len({*ranks}) > 1
    call = ("train", "--from", source, "--data", folder / "texts.jsonl", *SHORT)
    succeeded(*call, "--set", "training.max_steps=2", "--out", tmp_path / "short")
    assert sorted(record_of(tmp_path / "short")["ranks"].values()) == ranks  # too few steps to prune once more
    succeeded(*call, "--set", "training.max_steps=6", "--out", tmp_path / "more")
    record = record_of(tmp_path / "more")
    assert record["method"] == "adalora"
    assert record["model"]["source"] == str(folder / "llama")
    assert sorted(record["history"][0]["ranks"]) == ranks
    assert sum(record["ranks"].values()) <= sum(ranks)
    succeeded(
        "train", "--from", tmp_path / "more", *call[3:], "--set", "training.max_steps=6", "--out", tmp_path / "again"
    )
    assert record_of(tmp_path / "again")["history"][0]["ranks"] == list(record["ranks"].values())
    check_resumed_after_ctrl_c(
        [*call, "--set", "training.max_steps=6"], tmp_path / "more", tmp_path / "parts", at=(2, 5)
    )


def test_a_head_of_peft_is_trained_on(folder: Path, tmp_path: Path) -> None:
    """Its classes have no names: their order is said. Another number of them is refused."""
    base = AutoModelForSequenceClassification.from_pretrained(folder / "bert", num_labels=2)
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    source = saved(config, base, tmp_path / "peft")
    call = ("train", "--from", source, *SHORT, "--epochs", "1", "--out", tmp_path / "more")
    done = succeeded(*call, "--data", folder / "reviews.csv")
    assert "does not name the classes of its head; they are taken in this order: 'bad', 'good'" in done.output
    assert record_of(tmp_path / "more")["parameters"]["copies"] == 2 * 16 + 2
    (tmp_path / "three.csv").write_text("text,label\n" + "good film,a\nbad plot,b\nnot good,c\n" * 8)
    done = command(*call[:-1], tmp_path / "other", "--data", tmp_path / "three.csv")
    assert done.exit_code == 2
    assert "data with as many classes as its head has (here are 3: 'a', 'b', 'c')" in done.stderr
    assert not (tmp_path / "other" / "adapter.safetensors").exists()


def test_a_part_of_a_new_head_that_the_adapter_lacks_is_told(folder: Path, tmp_path: Path) -> None:
    """DistilBERT has two new modules. One that the adapter does not hold is random in each loading."""
    sizes = DistilBertConfig(dim=16, hidden_dim=32, n_layers=1, n_heads=2, vocab_size=12, max_position_embeddings=16)
    DistilBertModel(sizes).save_pretrained(tmp_path / "base")
    for file in (folder / "bert").glob("token*"):
        shutil.copy(file, tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    for kept, noted in ((["pre_classifier"], True), (["pre_classifier", "classifier"], False)):
        config = peft.LoraConfig(r=2, target_modules=["q_lin"], modules_to_save=kept)
        source = saved(config, copy.deepcopy(base), tmp_path / f"peft{len(kept)}")
        call = ("train", "--from", source, "--data", folder / "reviews.csv", *SHORT, "--dry-run")
        told = succeeded(*call, "--model", tmp_path / "base", "--out", tmp_path / "more").output
        assert ("note: classifier is new in this model and no part of the adapter" in told) == noted


def test_a_base_that_the_folder_names_and_that_is_gone_is_named(folder: Path, tmp_path: Path) -> None:
    """With the option that says where it is."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    source = saved(config, of_llama(folder), tmp_path / "peft")
    file = source / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(tmp_path / "gone")}))
    done = command("train", "--from", source, "--data", folder / "texts.jsonl", "--out", tmp_path / "more")
    assert done.exit_code == 2
    assert "which is gone; pass the folder where it is now with --model" in done.stderr
