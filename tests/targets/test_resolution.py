"""Modules found by name or by path for a file or for training in full, and errors that name the closest."""

import itertools
import sys
from typing import Any

import pytest
from torch import nn

from tests.support.target_models import ALL, ANY, Attending, Net, scanned, tied_pair
from tunerkit import targets
from tunerkit.errors import TargetError, closest
from tunerkit.targets.trained_in_full import resolve_modules


def test_training_a_module_whose_parameter_lives_elsewhere_too_is_refused() -> None:
    """Law: a copy would break the tie, unless all modules of the tie are copied, in one or on their own."""
    model = nn.ModuleDict({"inner": tied_pair(), "other": nn.Linear(2, 2)})
    targets.refuse_tied(scanned(model), ["inner", "other"])
    with pytest.raises(TargetError, match=r"inner\.odd\.weight is tied to inner\.embed\.weight"):
        targets.refuse_tied(scanned(model), ["other", "inner.odd"])
    targets.refuse_tied(scanned(model), ["inner.odd", "inner.embed"])


def test_a_tie_is_left_out_unless_all_that_hold_it_are_named() -> None:
    """Law: a bias that a module around its layer holds too is one side; no such rule holds for a weight."""
    assert targets.left_out(["a.weight", "b.c.weight"], ["a"]) == ["b.c.weight"]
    assert targets.left_out(["a.weight", "b.c.weight"], ["a", "b"]) == []
    assert targets.left_out(["a.weight", "b.c.weight"], ["d"]) == []
    assert targets.left_out(["head.bias", "head.decoder.bias", "bias"], ["head.decoder"]) == []
    assert targets.left_out(["other.bias", "head.decoder.bias"], ["head.decoder"]) == ["other.bias"]
    assert targets.left_out(["head.weight", "head.decoder.weight"], ["head.decoder"]) == ["head.weight"]


def test_targets_from_elsewhere_may_share_a_weight_if_all_of_its_modules_are_among_them() -> None:
    """Law: a file may adapt every side of a tie, and no side alone."""
    model = tied_pair()
    targets.refuse_unfit(scanned(model), targets.from_paths(scanned(model), ["odd", "embed"]), method=ANY)
    with pytest.raises(TargetError, match=r'^embed: has a tied weight.*targets=\("odd", "embed"\)'):
        targets.refuse_unfit(scanned(model), targets.from_paths(scanned(model), ["embed", "body"]), method=ANY)


def test_refuse_unfit_names_every_target_that_must_not_be_adapted() -> None:
    """Law: a target that select rejects for its weight is rejected too if it comes from elsewhere."""
    model = nn.ModuleDict({"attending": Attending(), "pair": tied_pair()})
    targets.refuse_unfit(
        scanned(model), targets.from_paths(scanned(model), ["attending.body", "pair.body"]), method=ANY
    )
    unfit = targets.from_paths(scanned(model), ["attending.attention.out_proj", "pair.body", "pair.odd"])
    with pytest.raises(TargetError) as caught:
        targets.refuse_unfit(scanned(model), unfit, method=ANY)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [unfit[0].path, unfit[2].path]


def test_resolve_modules_gives_the_outermost_modules_in_model_order() -> None:
    """Law: a module inside another match is not listed again."""
    model = Net()
    assert resolve_modules(scanned(model), ["classifier", "embed"]) == (
        "embed",
        "classifier",
    )
    assert resolve_modules(scanned(model), ["0", "classifier.0", "mlp"]) == (
        *("layers.0", "layers.1.mlp", "layers.2.mlp", "classifier.0"),
    )
    assert resolve_modules(scanned(model), ["classifier*"]) == ("classifier",)
    assert resolve_modules(scanned(model), []) == ()


def test_resolve_modules_names_every_name_that_matches_nothing() -> None:
    """Law: the error says where the name was given, and lists the closest names."""
    with pytest.raises(TargetError) as caught:
        resolve_modules(scanned(Net()), ["clasifier", "nrom", "mlp"])
    first, second = str(caught.value).splitlines()
    assert first.startswith("train_modules: no module named 'clasifier'; did you mean 'classifier'")
    assert second.startswith("train_modules: no module named 'nrom'; did you mean 'norm'")


def test_from_paths_takes_exact_paths_only_and_names_all_that_are_missing() -> None:
    """Law: a file's paths are exact: no suffix, no pattern, and not the model itself."""
    model = Net()
    assert [target.path for target in targets.from_paths(scanned(model), ["layers.1.mlp", "embed"])] == [
        "layers.1.mlp",
        "embed",
    ]
    with pytest.raises(TargetError) as caught:
        targets.from_paths(scanned(model), ["mlp", "embed", "", "layers.*.mlp", "re:("])
    assert str(caught.value).count("no module named") == 4


def test_from_paths_names_the_first_of_many_missing_paths_and_counts_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Law: a file of another architecture is rejected quickly: finding the closest names of all paths would be slow."""
    found = scanned(nn.ModuleDict({"body": nn.ModuleList(Net() for _ in range(80))}))
    wanted = [f"model.layers.{layer}.{name}" for layer in range(80) for name in ALL[:7]]
    searched: list[str] = []

    def search(path: str, names: Any) -> str:
        searched.append(path)
        return closest(path, names)

    monkeypatch.setattr(sys.modules["tunerkit.targets.scan"], "closest", search)
    with pytest.raises(TargetError) as caught:
        targets.from_paths(found, wanted)
    *named, last = str(caught.value).splitlines()
    assert searched == wanted[: len(searched)]
    assert 4 <= len(searched) <= 10
    hints = [closest(path, found.by_path) for path in searched]
    plain = [f"no module named {path!r}" for path in wanted[: len(named)]]
    assert named == [line + hint for line, hint in itertools.zip_longest(plain, hints, fillvalue="")]
    assert "did you mean" in named[0]
    assert last == f"and {560 - len(named)} more problems"
    assert 4 <= len(named) <= 58
