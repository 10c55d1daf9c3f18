"""LoRA's config: ranks and scales by target, the JSON round trip, and the errors for bad input."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from torch import nn

import tunerkit
from tests.support.config_checks import check_one_mistake, check_survives_json, check_unmatched_pattern
from tunerkit import patterns
from tunerkit_lora import LoraConfig
from tunerkit_testing.strategies import configs_of


@given(config=configs_of(LoraConfig))
@settings(max_examples=100, deadline=None)
def test_every_field_survives_json(config: LoraConfig) -> None:
    """For any valid config: unstructure, JSON, structure give an equal one."""
    check_survives_json("lora", config)


@given(rank=st.integers(1, 256), alpha=st.floats(0.5, 512), rslora=st.booleans())
def test_the_scale_is_alpha_over_rank_or_over_its_root(rank: int, alpha: float, rslora: bool) -> None:
    """LoRA's alpha/r, rsLoRA's alpha/√r."""
    found = LoraConfig(rank=rank, alpha=alpha, rslora=rslora).scale_at("any.path")
    assert found == pytest.approx(alpha / math.sqrt(rank) if rslora else alpha / rank)


@given(rank=st.integers(1, 64), other=st.integers(1, 64), alpha=st.none() | st.floats(1, 64))
def test_patterns_give_targets_their_own_rank_and_alpha(rank: int, other: int, alpha: float | None) -> None:
    """The first matching pattern counts; without alpha it is twice the target's own rank."""
    config = LoraConfig(
        rank=rank, alpha=alpha, rank_pattern={"query": other, "*.query": 1, "re:.*key": 7}, alpha_pattern={"key": 21.0}
    )
    assert [config.rank_at(path) for path in ("a.query", "a.b.key", "a.value", "a.xquery")] == [other, 7, rank, rank]
    assert config.scale_at("a.key") == 3.0
    assert config.scale_at("a.query") == pytest.approx(2.0 if alpha is None else alpha / other)


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"rank": 0}, ["expected >= 1, got 0", "@ $.rank"]),
        ({"rank": "8"}, ["expected int, got str '8'", "@ $.rank"]),
        ({"rank": 8.0}, ["expected int", "@ $.rank"]),
        ({"rank": True}, ["expected int", "@ $.rank"]),
        ({"alpha": 0.0}, ["expected > 0", "@ $.alpha"]),
        ({"alpha": math.inf}, ["finite", "@ $.alpha"]),
        ({"dropout": 1.0}, ["expected < 1", "@ $.dropout"]),
        ({"dropout": -0.1}, ["expected >= 0", "@ $.dropout"]),
        ({"rslora": 1}, ["expected bool", "@ $.rslora"]),
        ({"start": "pisa"}, ["'kaiming' or 'gaussian'", "did you mean 'pissa'", "@ $.start"]),
        ({"rho": 2.0}, ["start 'kaiming' uses none", "@ $.rho"]),
        ({"start": "eva", "rho": 0.5}, ["expected >= 1", "@ $.rho"]),
        ({"lr_ratio": 0.0}, ["expected > 0", "@ $.lr_ratio"]),
        ({"rank_pattern": {"query": -1}}, ["expected >= 0, got -1", "$.rank_pattern", "query"]),
        ({"rank_pattern": ["query"]}, ["expected mapping of str to int", "@ $.rank_pattern"]),
        ({"alpha_pattern": {"query": -1.0}}, ["expected > 0", "$.alpha_pattern", "query"]),
        ({"targets": 3}, ["@ $.targets"]),
        ({"rnak": 8}, ["unknown key 'rnak'", "rank", "@ $.rnak"]),
        ({"lora_alpha": 8}, ["unknown key 'lora_alpha'", "@ $.lora_alpha"]),
    ],
)
def test_a_mistake_gets_one_line_with_its_path(mapping: dict[str, Any], words: list[str]) -> None:
    """The line has the value, what is allowed, and the path; nothing else is reported."""
    check_one_mistake("lora", mapping, words)


@pytest.mark.parametrize(("field", "value"), [("rank_pattern", 4), ("alpha_pattern", 4.0)])
def test_a_pattern_for_no_target_is_refused_with_the_closest_name(field: str, value: float) -> None:
    """A mistyped pattern would be ignored silently; the model is unchanged."""
    check_unmatched_pattern("lora", field, value)


@pytest.mark.filterwarnings("ignore:.*was saved untrained")
def test_a_file_stores_paths_where_the_user_gave_expressions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a saved table names each target; an older file that has the expression gives the same, and compiles none."""
    base = nn.ModuleDict({"x": nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcd"})})
    table = {"re:.*\\.[ab]": 3, "c": 2}
    config = tunerkit.structure("lora", {"targets": ["a", "b", "c", "d"], "rank": 1, "rank_pattern": table})
    wrapped = tunerkit.wrap(copy.deepcopy(base), "lora", config)
    exact = {f"re:x\\.{name}": rank for name, rank in zip("abc", (3, 3, 2), strict=True)}
    loaded = tunerkit.load(copy.deepcopy(base), tunerkit.save(wrapped, tmp_path / "new"))
    with monkeypatch.context() as patched:
        patched.setattr(patterns, "at_paths", lambda config, paths: config)
        path = tunerkit.save(wrapped, tmp_path / "old")
    assert b"[ab]" in path.read_bytes()
    patterns.matcher.cache_clear()
    monkeypatch.setattr(re, "compile", lambda text, *args: pytest.fail(f"{text} was compiled"))
    for found in (loaded, tunerkit.load(copy.deepcopy(base), path)):
        assert tunerkit.unstructure(tunerkit.tuner(found).config)["rank_pattern"] == exact
        assert list(tunerkit.tuner(found).ranks().values()) == [3, 3, 2, 1]
