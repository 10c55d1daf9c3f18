"""The notebooks are their pages, without outputs, and they run."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from scripts.notebooks import PAGES, written
from tests.repository.test_readme import commands_on_results, run_in

NEEDED = ("nbclient", "nbformat", "ipykernel", "matplotlib", "transformers", "accelerate", "gguf", "trl", "timm")
OURS = ("tunerkit_adalora", "tunerkit_lora", "tunerkit_cli", "tunerkit_peft", "tunerkit_gguf", "tunerkit_serving")


def tiny_model(folder: Path) -> Path:
    """A folder for `from_pretrained`: a random Llama of two blocks, which reads bytes."""
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    sizes: Any = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=384, pad_token_id=0, eos_token_id=1, **sizes)).save_pretrained(folder)
    tokenizer: Any = ByT5Tokenizer()
    tokenizer.chat_template = "{% for each in messages %}{{ each.role }}: {{ each.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def executed(page: Path, folder: Path) -> tuple[Any, dict[str, str]]:
    """Run a page's notebook in ``folder``, on a tiny model, for few steps; what each cell printed."""
    import nbclient
    import nbformat

    read = nbformat.reads(page.with_suffix(".ipynb").read_text(encoding="utf-8"), as_version=4)
    nbclient.NotebookClient(read, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    printed = {
        cell.source: "".join(output.get("text", "") for output in cell.outputs if output.get("name") != "stderr")
        for cell in read.cells
        if cell.cell_type == "code"
    }
    return read, printed


@pytest.fixture
def few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The variables that the pages document, for a tiny model and few steps; the model's folder."""
    absent = [name for name in (*NEEDED, *OURS) if find_spec(name) is None]
    if absent:
        pytest.skip(f"the notebooks need {', '.join(absent)}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # for the kernel
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TUNERKIT_TUTORIAL_MODEL", str(tiny_model(tmp_path / "tiny-model")))
    monkeypatch.setenv("TUNERKIT_TUTORIAL_STEPS", "20")
    said = [json.dumps({"text": f"a {label} film", "label": label}) + "\n" for label in ("positive", "negative")]
    (tmp_path / "rows.jsonl").write_text("".join(said) * 30, encoding="utf-8")
    monkeypatch.setenv("TUNERKIT_TUTORIAL_ROWS", str(tmp_path / "rows.jsonl"))
    return tmp_path / "tiny-model"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.stem))
def test_a_notebook_is_its_page(page: Path) -> None:
    """``python -m scripts.notebooks`` writes the notebooks, which have no outputs; neither can change alone."""
    found = page.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert found == written(page), "run python -m scripts.notebooks"


def test_the_tutorial_runs_and_its_files_are_served(few_steps: Path, tmp_path: Path) -> None:
    """The tutorial as a notebook, on a tiny model; llama.cpp computes what torch does with its file."""
    import torch
    from transformers import AutoModelForCausalLM

    _, printed = executed(PAGES[0], tmp_path)
    assert "step 20: loss" in "".join(printed.values())
    assert not any("Warning" in text for text in printed.values())
    assert {path.name for path in tmp_path.iterdir()} >= {"orders", "orders-peft", "orders.gguf", "merged"}
    commands = commands_on_results(PAGES[0], tmp_path)
    assert [name for name, *_ in commands] == ["check-serving", "check-serving"]
    for arguments in commands:
        done = run_in(tmp_path, "-m", "tunerkit_cli", *arguments)
        assert done.returncode == 0, done.stdout
    pytest.importorskip("llama_cpp_py_sync", reason="llama.cpp's libraries come with llama-cpp-py-sync")
    from plugins.gguf.tests.base_files import write_base
    from plugins.gguf.tests.engine import opened

    base = AutoModelForCausalLM.from_pretrained(few_steps)
    write_base(base, tmp_path / "base.gguf")
    tokens = list(range(3, 40))
    with torch.no_grad():
        plain = base(torch.tensor([tokens])).logits[0]
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(torch.tensor([tokens])).logits[0]
    with opened(tmp_path / "base.gguf") as engine:
        assert (engine.logits(tokens) - plain).abs().max() < 1e-4 * plain.abs().max()
        assert engine.apply(tmp_path / "orders.gguf")
        assert (engine.logits(tokens) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (wanted - plain).abs().max() > 1e-2 * plain.abs().max()


def test_the_rank_map_runs_and_finds_the_planted_ranks(few_steps: Path, tmp_path: Path) -> None:
    """The second notebook draws its two pictures, and the network with a known answer gets its ranks."""
    read, printed = executed(PAGES[1], tmp_path)
    lines = next(text for text in printed.values() if text.startswith("planted:")).splitlines()
    assert lines[1].split(":", 1)[1].strip() == lines[0].split(":", 1)[1].strip()
    shown = [output.get("data", {}) for cell in read.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in data for data in shown) == 2


@pytest.mark.parametrize(
    ("page", "said"),
    [(PAGES[2], "accuracy: "), (PAGES[3], "trained: "), (PAGES[4], "accuracy: ")],
    ids=lambda p: Path(p).stem,
)
def test_a_notebook_of_a_task_runs(few_steps: Path, tmp_path: Path, page: Path, said: str) -> None:
    """Classes, chats and images: each trains, says what it reached, and leaves its adapter."""
    _, printed = executed(page, tmp_path)
    assert said in "".join(printed.values())
    assert any((tmp_path / name).exists() for name in ("films", "films.safetensors", "images.safetensors"))
