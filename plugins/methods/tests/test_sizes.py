"""Sizes that are given and do not fit a layer are refused in one line that says what does."""

from collections.abc import Callable
from typing import Any

import attrs
import pytest
from torch import nn

import tunerkit
from tunerkit.errors import ConfigError, TargetError, TunerkitWarning
from tunerkit.hooks import registry


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        (
            "c3a",
            {"block_size": 5},
            "block_size is 5, which does not divide 16 (both sides of the layer); 1, 2, 4, 8 do",
        ),
        ("oft", {"block_size": 7}, "which does not divide 32 (the inputs of the layer); 2, 4, 8, 16 do"),
        ("road", {"group_size": 6}, "which does not divide 16 (the outputs); 2, 4, 8, 16 do"),
        ("fourierft", {"count": 513}, "count is 513, and at most 512 fits here"),
        ("miss", {"rank": 33}, "rank is 33, and at most 32 fits here"),
        ("randlora", {"rank": 17}, "rank is 17, and at most 16 fits here"),
        ("randlora", {"rank": 10**9}, "rank is 1000000000, and at most 1024 fits here"),
        ("vblora", {"length": 32}, "length is 32, which does not divide 16"),
        ("vblora", {"vectors": 2, "top": 4}, "top is 4, and at most 2 fits here"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(method: str, settings: dict[str, object], said: str) -> None:
    """The model stays as it was."""
    model = nn.Sequential(nn.Linear(32, 16))
    with pytest.raises(TargetError) as error:
        tunerkit.wrap(model, method, {"targets": "re:0", **settings})
    assert said in str(error.value).splitlines()[0]
    assert not list(model[0].children())


@pytest.mark.parametrize(("settings", "path"), [({"top": 3}, "$.top"), ({"vectors": 7}, "$.vectors")])
def test_vblora_says_which_numbers_cannot_start_at_zero(settings: dict[str, object], path: str) -> None:
    """Vectors begin in pairs that cancel, so their numbers are even; the paper's start takes any."""
    model = nn.Sequential(nn.Linear(32, 16))
    with pytest.raises(ConfigError, match="even number") as error:
        tunerkit.wrap(model, "vblora", {"targets": "re:0", **settings})
    assert path in str(error.value)
    tunerkit.wrap(model, "vblora", {"targets": "re:0", "start": "random", **settings})


@pytest.mark.parametrize(("method", "name"), [("c3a", "block_size"), ("vblora", "length")])
def test_sides_without_a_common_divisor_are_said(method: str, name: str) -> None:
    """A block of one number gains nothing, and one odd layer would make many parameters of a few."""
    model = nn.Sequential(nn.Linear(32, 17))
    with pytest.warns(TunerkitWarning, match=f"{name} is 1, because nothing above 1 divides both sides"):
        tunerkit.wrap(model, method, {"targets": "re:0"})


def test_core_knows_these_names_where_the_distribution_is_not_installed() -> None:
    """So that the error about a method says how to install it."""
    from tunerkit import extras, hooks

    named = {name for name, line in extras.hints("methods").items() if line.startswith("tunerkit-methods")}
    assert named == {name for name, info in hooks.methods().items() if info.distribution == "tunerkit-methods"}


@pytest.mark.parametrize("layer", [nn.Linear(1, 8), nn.Linear(8, 1)])
def test_randlora_needs_a_target_with_two_sides(layer: nn.Linear) -> None:
    """One number has no spread to normalise by. Beside a larger target, such a layer is no problem."""
    settings = {"targets": "re:0|1"}
    with pytest.raises(TargetError, match="all targets have a single input, or a single output"):
        tunerkit.wrap(nn.Sequential(layer), "randlora", settings)
    model = tunerkit.wrap(nn.Sequential(layer, nn.Linear(layer.out_features, 8)), "randlora", settings)
    assert all(each.isfinite().all() for each in model.state_dict().values())


@pytest.mark.parametrize(("method", "name"), [("vera", "start"), ("fourierft", "scale")])
def test_zero_that_stops_all_gradients_is_refused(method: str, name: str) -> None:
    """One line says why; a negative number is fine."""
    for number in (-1.0, 1.0):
        tunerkit.wrap(nn.Sequential(nn.Linear(32, 16)), method, {"targets": "re:0", name: number})
    with pytest.raises(ConfigError, match=rf"expected a number other than 0.* @ \$.{name}"):
        tunerkit.wrap(nn.Sequential(nn.Linear(32, 16)), method, {"targets": "re:0", name: 0.0})


@pytest.mark.parametrize(
    ("method", "setting", "usual", "other", "size"),
    [
        ("loha", "rank", 2, 3, lambda each: each.b1.shape[1]),
        ("lokr", "alpha", 8.0, 2.0, lambda each: each.scale * 8),
        ("dora", "rank", 2, 3, lambda each: each.rank),
        ("dora", "alpha", 8.0, 4.0, lambda each: each.scale * 8),
        ("delora", "rank", 2, 3, lambda each: each.rank),
        ("c3a", "block_size", 2, 4, lambda each: each.kernel.shape[2]),
        ("fourierft", "count", 5, 6, lambda each: len(each.spectrum)),
    ],
)
def test_a_pattern_gives_some_targets_another_value(
    method: str, setting: str, usual: float, other: float, size: Callable[[Any], float]
) -> None:
    """A file restores them, and a pattern that matches no target is an error, as it is for targets."""
    pattern = {"targets": "re:0|1", setting: usual, f"{setting}_pattern": {"1": other}}
    model = tunerkit.wrap(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), method, pattern)
    assert [size(each) for each in tunerkit.tuner(model).adapters().values()] == [usual, other]
    with pytest.raises(ConfigError, match=rf"'2'.*{setting}_pattern"):
        tunerkit.wrap(nn.Sequential(nn.Linear(8, 16)), method, {**pattern, f"{setting}_pattern": {"2": other}})


@pytest.mark.parametrize("method", ["dora", "loha", "lokr"])
def test_a_rank_above_the_layer_is_allowed_and_said(method: str) -> None:
    """As LoRA's is; the setting's text says so."""
    tunerkit.wrap(nn.Sequential(nn.Linear(4, 6)), method, {"targets": "re:0", "rank": 9})
    assert "may exceed the layer's sides" in attrs.fields(registry.get(method).config).rank.metadata["doc"]


@pytest.mark.parametrize("method", ["delora", "dora", "hra", "loha", "lora-fa", "lora-xs", "miss"])
def test_tensors_of_another_rank_are_refused(method: str) -> None:
    """These ranks never change, and some are divided by: a file whose settings say another one would be another ΔW."""
    few, more = (
        tunerkit.tuner(tunerkit.wrap(nn.Sequential(nn.Linear(32, 16)), method, {"targets": "re:0", "rank": rank}))
        for rank in (2, 4)
    )
    with pytest.raises(RuntimeError, match="size mismatch"):
        more.adapters()["0"].load_state_dict(few.adapters()["0"].state_dict())
