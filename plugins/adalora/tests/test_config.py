"""AdaLoRA's config: its meaning, the JSON round trip, and the errors for bad input."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import tunerkit
from tests.support.config_checks import check_one_mistake, check_survives_json, check_unmatched_pattern, mistakes
from tunerkit.errors import TunerkitWarning
from tunerkit_adalora import AdaLoraConfig
from tunerkit_testing.small import TARGETS, net as small_net, train, trainable
from tunerkit_testing.strategies import configs_of

CONFIGS = configs_of(
    AdaLoraConfig,
    init_rank=st.integers(8, 20),
    target_rank=st.integers(1, 8),
    budget=st.none(),
    budget_unit=st.just("rank"),
    t_init=st.integers(0, 50) | st.floats(0, 0.4),
    t_final=st.integers(0, 50) | st.floats(0, 0.4),
    min_rank=st.integers(0, 3) | st.dictionaries(st.text(min_size=1), st.integers(0, 3), max_size=3),
    max_rank=st.none() | st.integers(3, 20) | st.dictionaries(st.text(min_size=1), st.integers(3, 20), max_size=3),
)
BUDGETS = configs_of(
    AdaLoraConfig,
    init_rank=st.integers(8, 20),
    target_rank=st.none(),
    budget=st.integers(1, 500),
    t_init=st.integers(0, 50),
    t_final=st.integers(0, 50),
    min_rank=st.just(0),
    max_rank=st.none(),
)


@given(config=CONFIGS | BUDGETS)
@settings(max_examples=100, deadline=None)
def test_every_field_survives_json(config: AdaLoraConfig) -> None:
    """For any valid config: unstructure, JSON, structure give an equal one."""
    check_survives_json("adalora", config)


@given(config=CONFIGS | BUDGETS)
@settings(max_examples=100, deadline=None)
def test_settling_writes_out_what_a_config_resolves_to(config: AdaLoraConfig) -> None:
    """A settled config has no open default, resolves to the same settings, and is itself settled."""
    settled, resolved = config.settled(), config.resolved()
    assert settled.resolved() == resolved
    assert settled.settled() == settled
    assert (settled.init_rank, settled.alpha) == (resolved.init_rank, resolved.alpha)
    assert (settled.exact_svd, settled.train_lambda) == (resolved.exact_svd, resolved.train_lambda)
    assert settled.target_rank == (resolved.target_rank if config.budget is None else None)
    assert (config.initial_rank, config.in_svd_form) == (resolved.init_rank, resolved.exact_svd)
    assert config.scale == resolved.scale == resolved.alpha / resolved.init_rank


def test_a_file_that_leaves_settings_to_its_version_is_loaded_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the first files did: their scale is a default of that day, which no file says."""
    model = tunerkit.wrap(small_net(), "adalora", {"target_rank": 2, "targets": TARGETS}, seed=0)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    tunerkit.attach(model, optimizer, total_steps=12)
    train(model, optimizer, 12)
    with monkeypatch.context() as patch:
        patch.setattr(AdaLoraConfig, "settled", lambda config: config)
        old = tunerkit.save(model, tmp_path / "old")
    with pytest.warns(TunerkitWarning, match=r"takes .*init_rank = 8, alpha = 4.0.*: if that one took others"):
        tunerkit.load(small_net(), old)
    new = tunerkit.save(model, tmp_path / "new")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tunerkit.load(small_net(), new)


@given(target=st.integers(1, 64))
def test_the_initial_rank_defaults_to_one_and_a_half_times_the_target(target: int) -> None:
    """It is rounded up, so there is always something to prune. The scales add up to those of LoRA with the target."""
    config = AdaLoraConfig(target_rank=target, exact_svd=False)
    assert config.initial_rank == math.ceil(1.5 * target) > target
    assert config.resolved().alpha == 2.0 * max(target, config.initial_rank / 1.5)
    assert 4 / 3 <= config.scale <= 2.0


def test_the_defaults_work() -> None:
    """Without any setting: 12 triplets per target, pruned to 8 on average."""
    config = AdaLoraConfig()
    assert (config.resolved().init_rank, config.resolved().target_rank) == (12, 8)


@given(alpha=st.floats(0.1, 100), rank=st.integers(8, 64))
def test_the_scale_is_alpha_over_the_initial_rank(alpha: float, rank: int) -> None:
    """It does not depend on the target rank."""
    assert AdaLoraConfig(alpha=alpha, init_rank=rank, target_rank=3).scale == alpha / rank


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"target_rank": 8, "init_rank": 4}, ["target_rank 8 is above init_rank 4", "@ $.target_rank"]),
        ({"init_rank": 4}, ["target_rank 8 is above init_rank 4", "@ $.target_rank"]),
        ({"target_rank": 0}, ["expected >= 1, got 0", "@ $.target_rank"]),
        ({"init_rank": 8, "budget": 0}, ["expected >= 1, got 0", "@ $.budget"]),
        ({"budget": 8}, ["needs init_rank", "@ $.init_rank"]),
        ({"target_rank": 2, "init_rank": 4, "budget": 8}, ["target_rank and budget", "give only one", "@ $.budget"]),
        ({"t_init": 0.5, "t_final": 0.5}, ["no training to prune in", "@ $.t_init"]),
        ({"t_init": 1.0}, ["share of training", "got 1.0", "@ $.t_init"]),
        ({"t_final": 30.0}, ["share of training", "got 30.0", "@ $.t_final"]),
        ({"t_init": -1}, ["expected >= 0, got -1", "@ $.t_init"]),
        ({"t_final": -0.1}, ["expected >= 0", "@ $.t_final"]),
        ({"delta_t": 0}, ["expected >= 1, got 0", "@ $.delta_t"]),
        ({"beta1": 0.0}, ["expected > 0", "@ $.beta1"]),
        ({"beta1": 1.0}, ["expected < 1", "@ $.beta1"]),
        ({"beta2": 1.0}, ["expected < 1", "@ $.beta2"]),
        ({"beta2": -0.1}, ["expected >= 0", "@ $.beta2"]),
        ({"gamma": -0.1}, ["expected >= 0", "@ $.gamma"]),
        ({"gamma": math.nan}, ["finite", "@ $.gamma"]),
        ({"alpha": 0}, ["expected > 0", "@ $.alpha"]),
        ({"dropout": 1.0}, ["expected < 1", "@ $.dropout"]),
        ({"total_steps": 0}, ["expected >= 1", "@ $.total_steps"]),
        ({"min_rank": -1}, ["expected >= 0", "@ $.min_rank"]),
        ({"min_rank": 13}, ["min_rank 13 is above init_rank 12", "@ $.min_rank"]),
        ({"min_rank": 3, "max_rank": 2}, ["min_rank 3 is above max_rank 2", "@ $.min_rank"]),
        ({"min_rank": {"query": "3"}}, ["expected int, got str '3'", "$.min_rank", "query"]),
        ({"orthogonality": "papre"}, ["'reference' or 'paper'", "'papre'", "@ $.orthogonality"]),
        (
            {"start": "gaussian", "train_lambda": False},
            ["begins with Λ = 0", "train_lambda to True", "@ $.train_lambda"],
        ),
        ({"start": "pissa"}, ["'lora'", "'pissa'", "@ $.start"]),
        ({"target_rank": "8"}, ["expected int", "str '8'", "@ $.target_rank"]),
        ({"target_rank": 8.9}, ["expected int", "8.9", "@ $.target_rank"]),
        ({"target_rank": True}, ["expected int", "True", "@ $.target_rank"]),
        ({"gamma": "1e-3"}, ["expected float", "1.0e-3", "@ $.gamma"]),
        ({"trget_rank": 8}, ["unknown key 'trget_rank'", "target_rank", "@ $.trget_rank"]),
        ({"init_r": 8}, ["unknown key 'init_r'", "init_rank", "@ $.init_r"]),
    ],
)
def test_a_mistake_gets_one_line_with_its_path(mapping: dict[str, Any], words: list[str]) -> None:
    """The line has the value, what is allowed, and the path; nothing else is reported."""
    check_one_mistake("adalora", mapping, words)


def test_all_mistakes_are_reported_at_once() -> None:
    """Three wrong fields, three lines."""
    assert len(mistakes("adalora", {"target_rank": 0, "gamma": -1.0, "detla_t": 3})) == 3


def net() -> nn.Module:
    return nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)})


@pytest.mark.parametrize("field", ["min_rank", "max_rank"])
def test_a_bound_for_no_target_is_refused_with_the_closest_name(field: str) -> None:
    """A mistyped pattern would be ignored silently; the model is unchanged."""
    check_unmatched_pattern("adalora", field, 4)


@pytest.mark.parametrize(
    ("config", "total", "words"),
    [
        ({"t_init": 5, "t_final": 5}, 10, "no room"),
        ({"t_init": 50}, 10, "no room"),
        ({"t_init": 0.5, "t_final": 5}, 10, "no room"),
        ({"target_rank": None, "init_rank": 3, "budget": 7}, 10, r"budget 7 is above the initial budget 6"),
        (
            {"target_rank": None, "init_rank": 3, "budget": 55, "budget_unit": "parameters"},
            10,
            r"budget 55 is above the initial budget 54.*@ \$\.budget",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_when_attaching(config: dict[str, Any], total: int, words: str) -> None:
    """It depends on the model and the total; no step is taken."""
    model = tunerkit.wrap(net(), "adalora", {"target_rank": 2, "targets": ["query", "value"], **config})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(tunerkit.errors.ConfigError, match=words):
        tunerkit.attach(model, optimizer, total_steps=total)
    assert tunerkit.tuner(model).state is None


def test_a_config_is_never_written_to() -> None:
    """Wrapping and training leave it equal, and its fields reject assignment."""
    config = AdaLoraConfig(targets=("query", "value"))
    model = tunerkit.wrap(net(), "adalora", config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tunerkit.attach(model, optimizer, total_steps=10)
    optimizer.step()
    assert config == AdaLoraConfig(targets=("query", "value"))
    assert tunerkit.tuner(model).config is config
    with pytest.raises(AttributeError):
        config.gamma = 1.0  # type: ignore[misc]


def test_the_papers_setting_and_pefts_have_names() -> None:
    """Each is an ordinary config: arguments override it, and it survives JSON."""
    paper, peft = AdaLoraConfig.paper(target_rank=1, init_rank=3), AdaLoraConfig.peft(gamma=0.1)
    assert (paper.start, paper.gamma, paper.orthogonality, paper.scale) == ("gaussian", 0.1, "reference", 16 / 3)
    assert (peft.start, peft.gamma, peft.scale) == ("gaussian", 0.1, 8 / 12)
    for config in (paper, peft):
        assert tunerkit.structure("adalora", tunerkit.unstructure(config)) == config


@pytest.mark.parametrize("rank", [8, 4])
def test_pefts_setting_is_what_peft_has(rank: int) -> None:
    """Its values are PEFT's own defaults, read from PEFT, whatever the target rank."""
    peft = pytest.importorskip("peft", reason="peft is the peer that this test compares with")
    theirs = peft.AdaLoraConfig(total_step=100) if rank == 8 else peft.AdaLoraConfig(total_step=100, target_r=rank)
    ours = AdaLoraConfig.peft() if rank == 8 else AdaLoraConfig.peft(target_rank=rank)
    assert (theirs.init_r, theirs.target_r, theirs.lora_alpha) == (
        ours.resolved().init_rank,
        ours.resolved().target_rank,
        ours.alpha,
    )
    assert (theirs.tinit, theirs.tfinal, theirs.deltaT) == (ours.t_init, ours.t_final, ours.delta_t)
    assert (theirs.beta1, theirs.beta2, theirs.orth_reg_weight) == (ours.beta1, ours.beta2, ours.gamma)
