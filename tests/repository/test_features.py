"""The table of features is true: the methods in examples/methods do what they say, in as many lines as it says."""

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from scripts import structure
from tests.repository.test_readme import blocks
from tunerkit.errors import TargetError
from tunerkit.plugin import Tuner
from tunerkit_testing import check_method
from tunerkit_testing.known_cases import NETWORK, named

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/concepts/features.md"
FILES = sorted((ROOT / "examples/methods").glob("*.py"))
EMBEDDINGS = {"targets": ["embed_tokens"], "tokens": list(range(30))}
TARGETS = {"targets": ["0", "2"]}


@pytest.fixture
def method(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the method in the file that a test is called with, registered while it runs."""
    module = imported(request.param)
    tunerkit.register(module)
    (found,) = module.tunerkit_methods()
    yield found.name
    tunerkit.unregister(module)


def imported(file: Path) -> ModuleType:
    name = f"example_method_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))


def moved(method: str, config: Mapping[str, object]) -> tuple[nn.Sequential, Tuner]:
    """A network whose adapters were moved at random, and their tuner."""
    model: Any = tunerkit.wrap(network(), method, {**TARGETS, **config}, seed=0)
    tuner = tunerkit.tuner(model)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, tuner


def weights(method: str, config: Mapping[str, object]) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """The first layer's weight before and after the adapter was merged into it, and the adapter."""
    model, tuner = moved(method, config)
    adapter = tuner.adapters()["0"]
    after: Any = tunerkit.unwrap(model, keep_merged=True)
    return first_weight(network()), first_weight(after), adapter


def first_weight(model: Any) -> torch.Tensor:
    weight: torch.Tensor = model[0].weight.detach()
    return weight


@pytest.mark.parametrize("method", FILES, indirect=True, ids=lambda file: str(file.stem))
def test_an_example_method_passes_the_conformance_tests(method: str) -> None:
    """No check of the kit fails on a small network; trainable tokens are checked on the embedding of a small Llama."""
    of_tokens = method == "trainable-tokens"
    if of_tokens:
        pytest.importorskip("transformers")
    results = check_method(method, EMBEDDINGS if of_tokens else {}, named(["llama"]) if of_tokens else [NETWORK])
    assert [(each.check, each.reason) for each in results if each.status in ("failed", "error")] == []
    assert sum(each.status == "passed" for each in results) > 35


def test_the_page_names_each_example_method_with_its_lines() -> None:
    """Each file of examples/methods stands in the table with its lines of code, and no other does."""
    said = dict(re.findall(r"`examples/methods/(\w+)\.py`, (\d+) lines", PAGE.read_text(encoding="utf-8")))
    texts = {file.stem: file.read_text(encoding="utf-8") for file in FILES}
    counted = {
        name: structure.code_lines(structure.Source(name, ast.parse(text), text=text)) for name, text in texts.items()
    }
    assert {name: int(lines) for name, lines in said.items()} == counted


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


def of(stem: str) -> Path:
    return ROOT / "examples/methods" / f"{stem}.py"


@pytest.mark.parametrize("method", [of("dora")], indirect=True)
def test_dora_trains_the_length_of_each_row(method: str) -> None:
    """Each row of the merged weight has the length ``m``, and the direction of W + B A."""
    before, after, adapter = weights(method, {"rank": 2})
    summed = before + adapter.b @ adapter.a
    torch.testing.assert_close(after.norm(dim=1), adapter.m.detach().abs())
    torch.testing.assert_close(nn.functional.cosine_similarity(after, summed).abs(), torch.ones(len(after)))


@pytest.mark.parametrize("method", [of("oft")], indirect=True)
def test_oft_only_rotates(method: str) -> None:
    """R W has the angles and lengths between columns that W has: (R W)ᵀ R W = Wᵀ W, and another value."""
    before, after, _ = weights(method, {"blocks": 2})
    torch.testing.assert_close(after.T @ after, before.T @ before, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after, before, atol=1e-2)


@pytest.mark.parametrize("method", [of("pissa")], indirect=True)
def test_pissa_starts_at_the_best_approximation(method: str) -> None:
    """P₀ Q₀ leaves of W what the best matrix of that rank leaves: the smaller singular values."""
    model: Any = tunerkit.wrap(network(), method, {**TARGETS, "rank": 3})
    adapter: Any = tunerkit.tuner(model).adapters()["0"]
    weight = first_weight(network())
    rest = torch.linalg.matrix_norm(weight - adapter.p @ adapter.q)
    torch.testing.assert_close(rest.detach(), torch.linalg.svdvals(weight)[3:].norm())


@pytest.mark.parametrize("method", [of("lora_plus")], indirect=True)
def test_lora_plus_gives_b_its_own_rate(method: str) -> None:
    """B's learning rate is ``ratio`` times that of A."""
    model, tuner = moved(method, {"ratio": 4.0})
    rates = {id(p): group["lr"] for group in tunerkit.param_groups(model, lr=1e-3) for p in group["params"]}
    for adapter in tuner.adapters().values():
        assert [rates[id(p)] for p in (adapter.a, adapter.b)] == [1e-3, 4e-3]


@pytest.mark.parametrize("method", [of("trainable_tokens")], indirect=True)
def test_trainable_tokens_change_only_their_rows(method: str) -> None:
    """After merging, the embedding's other rows are the base's own, bit for bit."""
    model: Any = tunerkit.wrap(nn.Sequential(nn.Embedding(10, 4)), method, {"targets": ["0"], "tokens": [2, 7]})
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        next(iter(tunerkit.tuner(model).parameters())).add_(1.0)
    after = first_weight(tunerkit.unwrap(model, keep_merged=True))
    assert [i for i in range(10) if not torch.equal(before[i], after[i])] == [2, 7]
    with pytest.raises(TargetError, match="names row 10"):
        tunerkit.wrap(nn.Sequential(nn.Embedding(10, 4)), method, {"targets": ["0"], "tokens": [10]})


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
