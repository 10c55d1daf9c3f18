"""The table of features is true: what it says of lines, and of what is trained beside adapters."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import tunerkit
from scripts import structure
from tests.repository.test_readme import blocks
from tunerkit.errors import TargetError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/concepts/features.md"


def test_each_line_of_the_table_has_a_verdict() -> None:
    """The second cell is one of five; what a reader writes has its lines, a page that shows it, or is not written."""
    rows = [line.strip("|").split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    rows = [[cell.strip() for cell in row] for row in rows if row[1].strip() != "here"]
    verdicts = {"available", "write it yourself", "not possible", "not possible yet", "not tested"}
    assert [row for row in rows if len(row) != 3 or row[1] not in verdicts or not row[2]] == []
    to_write = [row for row in rows if row[1] == "write it yourself"]
    assert [row for row in to_write if not re.search(r"\d+ lines|not written|\]\(", row[2])] == []


@pytest.mark.parametrize(("name", "heading"), [("merged", "a-weighted-merge"), ("mixed", "a-mixed-batch")])
def test_a_function_on_the_page_has_as_many_lines_as_the_table_says(name: str, heading: str) -> None:
    """Without its docstring, as in the files."""
    page = PAGE.read_text(encoding="utf-8")
    code = "".join(block.text for block in blocks(page, "python"))
    functions = [each for each in ast.parse(code).body if isinstance(each, ast.FunctionDef) and each.name == name]
    (text,) = [ast.get_source_segment(code, each) or "" for each in functions]
    counted = structure.code_lines(structure.Source(name, ast.parse(text), text=text))
    assert f"[{counted} lines](#{heading})" in page


@pytest.mark.parametrize("settings", [{"train_modules": ["1"]}, {"bias": "all"}], ids=["norms in full", "biases alone"])
def test_lora_of_rank_0_trains_what_is_beside_it(settings: dict[str, object]) -> None:
    """``rank_pattern={"*": 0}`` adapts nothing, so that only modules in full or biases are trained."""
    pytest.importorskip("tunerkit_lora")
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    model = tunerkit.wrap(model, "lora", {"targets": ["0", "2"], "rank_pattern": {"*": 0}, **settings})
    assert tunerkit.trainable_parameters(model).trainable == (12 if "train_modules" in settings else 6 + 6 + 2)


def test_experts_are_left_out_with_a_warning_and_can_be_trained_in_full() -> None:
    """In a mixture of experts attention is adapted, a warning names the experts, and ``train_modules`` takes them."""
    pytest.importorskip("tunerkit_lora")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=2, **sizes)
    with pytest.warns(tunerkit.TunerkitWarning, match="experts"):
        model: Any = tunerkit.wrap(transformers.MixtralForCausalLM(config), "lora")
    assert all("self_attn" in path for path in tunerkit.tuner(model).ranks())
    full: Any = tunerkit.wrap(
        transformers.MixtralForCausalLM(config), "lora", {"targets": ["q_proj"], "train_modules": ["mlp.experts"]}
    )
    assert any("experts" in name for name, p in full.named_parameters() if p.requires_grad)
    with pytest.raises(TargetError, match="only modules can be named yet"):
        tunerkit.wrap(transformers.MixtralForCausalLM(config), "lora", {"targets": ["gate_up_proj"]})
