"""What a library says of its models through `tunerkit_model_libraries`, and what core does with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import tunerkit
from tests.support.model_checks import silent
from tests.support.toys import Toys, answering
from tunerkit.errors import BaseMismatchError, TunerkitWarning
from tunerkit.hooks.loading import Catalog
from tunerkit.hooks.registry import Registry
from tunerkit.plugin import ModelLibrary, NewModules
from tunerkit_testing.registering import registered

LAYER = {"targets": ["layers.0"]}


@contextmanager
def library(**functions: Any) -> Iterator[None]:
    """A plugin that knows toys, while the block runs."""
    with registered(answering("tunerkit_model_libraries", [ModelLibrary(**functions)])):
        yield


def test_a_head_that_a_module_names_is_no_target(toys: "Toys") -> None:
    """Whatever its name is; every module is asked."""
    with library(heads=lambda module: [module.layers[1]] if hasattr(module, "layers") else []):
        model = tunerkit.wrap(nn.ModuleDict({"body": toys.net()}), "toy-low-rank", {"targets": "all-linear"})
    assert list(tunerkit.tuner(model).adapters()) == ["body.layers.0"]


def test_a_library_is_asked_only_about_models_to_which_it_applies(toys: "Toys", tmp_path: Path) -> None:
    """Whether it applies to a model is all that it is asked about others."""
    others = {name: lambda *given: pytest.fail("it was asked") for name in ("heads", "new", "settings", "tied_flags")}
    with library(applies=lambda model: False, **others):
        tunerkit.save(tunerkit.wrap(toys.net(), "toy-low-rank", LAYER), tmp_path)


def test_new_modules_are_trained_in_full_with_a_warning(toys: "Toys") -> None:
    """The library is given the paths in numbered blocks, and those of heads."""
    given: list[Any] = []

    def new(model: nn.Module, blocks: Any, heads: Any) -> NewModules:
        given.extend([model, set(blocks), set(heads)])
        return NewModules("toys.load", whole=("head",), partly=("norm",), heads=("batch_norm",))

    model = toys.net()
    with library(new=new), pytest.warns(TunerkitWarning) as caught:
        tunerkit.wrap(model, "toy-low-rank", LAYER)
    assert given == [model, {"layers.0", "layers.1"}, {"head", "head.0", "head.1", "head.2"}]
    assert [place.path for place in tunerkit.tuner(model).copies] == ["head.0", "head.2"]
    texts = [str(each.message) for each in caught]
    assert [text.split(":")[0] for text in texts] == [
        "trained in full, as copies, because toys.load did not load their values",
        "some values were not loaded by toys.load and stay frozen",
        "batch_norm may be newly initialized, which cannot be determined",
    ]
    assert all(each.filename == __file__ for each in caught)


def test_settings_are_recorded_and_compared(toys: "Toys", tmp_path: Path) -> None:
    """One that only one of the two bases has is no difference; long values are cut."""
    told = {"epsilon": 1.0, "only here": 1, "x" * 10**6: "y" * 10**6}
    with library(settings=lambda model: told):
        path = tunerkit.save(tunerkit.wrap(toys.net(), "toy-shift", LAYER), tmp_path)
    with library(settings=lambda model: {"epsilon": 1.0, "only there": 2}):
        assert tunerkit.load(toys.net(), path) is not None
    changed = {"epsilon": 2.0, "x" * 10**6: "z"}
    with library(settings=lambda model: changed), pytest.raises(BaseMismatchError, match=r"epsilon 1\.0 -> 2\.0") as e:
        tunerkit.load(toys.net(), path)
    assert len(str(e.value)) < 2000


def test_settings_that_no_plugin_compares_are_named(
    toys: "Toys", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with settings is loaded without the plugin that compares them, and a warning says which ones."""
    with library(settings=lambda model: {"epsilon": 1.0}):
        path = tunerkit.save(tunerkit.wrap(toys.net(), "toy-shift", LAYER), tmp_path)
    monkeypatch.setattr(Catalog, "absence", lambda self, name: f"{name} is not installed")
    with pytest.warns(TunerkitWarning, match=r"compared here: epsilon\. tunerkit-transformers compares them.*not inst"):
        tunerkit.load(toys.net(), path)
    with silent(Warning):
        tunerkit.load(toys.net(), path, check_config=False)
        monkeypatch.setattr(Catalog, "absence", lambda self, name: None)
        tunerkit.load(toys.net(), path)


def test_settings_survive_a_save_where_no_plugin_knows_them(toys: "Toys", tmp_path: Path) -> None:
    """They are those of the file that was loaded. A file that never had any says so where a plugin knows them."""
    with library(settings=lambda model: {"epsilon": 1.0}):
        path = tunerkit.save(tunerkit.wrap(toys.net(), "toy-shift", LAYER), tmp_path / "first")
    again = tunerkit.save(tunerkit.load(toys.net(), path), tmp_path / "again")
    bare = tunerkit.save(tunerkit.wrap(toys.net(), "toy-shift", LAYER), tmp_path / "bare")
    with library(settings=lambda model: {"epsilon": 2.0}):
        with pytest.raises(BaseMismatchError, match=r"epsilon 1\.0 -> 2\.0"):
            tunerkit.load(toys.net(), again)
        with pytest.warns(TunerkitWarning, match="records no settings of its base, such as epsilon"):
            tunerkit.load(toys.net(), bare)


def test_a_library_says_how_to_load_a_base_of_another_size(toys: "Toys", tmp_path: Path) -> None:
    """Its hint gets the shapes that the adapter needs and that this base has."""

    def base(classes: int) -> Any:
        model = toys.net()
        model.head[2] = nn.Linear(6, classes)
        return model

    model = tunerkit.wrap(base(5), "toy-shift", {"targets": ["conv"], "train_modules": ["head.2"]})
    path = tunerkit.save(model, tmp_path)
    hint = lambda model, resized: f"; pass {resized[0][0][0]} instead of {resized[0][1][0]}"  # noqa: E731
    with library(resize_hint=hint), pytest.raises(BaseMismatchError, match="; pass 5 instead of 2"):
        tunerkit.load(base(2), path)


def test_none_is_no_answer(toys: "Toys") -> None:
    """Wrapping goes on. Answers of another form are tested in test_knowledge.py."""
    with registered(answering("tunerkit_model_libraries", None)), silent(Warning):
        model = tunerkit.wrap(toys.net(), "toy-shift", LAYER)
    assert tunerkit.adapters(model)["default"].targets


WRONG: dict[str, tuple[str, Any, str]] = {
    "no list of modules": ("heads", lambda module: module, r"Sequence\[torch\.nn\.Module\]"),
    "another record": ("new", lambda model, blocks, heads: ["head"], r"tunerkit\.plugin\.NewModules \| None"),
    "no module": (
        "new",
        lambda model, blocks, heads: NewModules("load", ("no.where",)),
        "that the model lacks: no.where",
    ),
    "values that are no JSON": ("settings", lambda model: {"epsilon": object()}, "a dict that JSON can hold"),
    "one name": ("tied_flags", lambda module: "config.tied", r"Sequence\[str\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_of_a_function_names_the_plugin(toys: "Toys", tmp_path: Path, case: str) -> None:
    """It is an error of the call that asked, which says what was returned and what is expected."""
    name, function, words = WRONG[case]
    model = toys.net()

    def run() -> None:
        tunerkit.wrap(tied(model), "toy-low-rank", {"targets": ["layers.1", "other"]})
        tunerkit.save(tunerkit.merge(model), tmp_path)

    with library(**{name: function}), pytest.raises(tunerkit.errors.PluginError, match=words) as caught:
        run()
    assert "no.where" in words or f"{name} of a ModelLibrary of plugin 'answering'" in str(caught.value)
    assert tunerkit.adapters(model) == {} or name in ("settings", "tied_flags")


def tied(model: Any) -> Any:
    """The model with a second layer that shares its weight with one of its layers."""
    model.other = nn.Linear(8, 8)
    model.other.weight = model.layers[1].weight
    return model


def test_what_a_function_raises_names_the_plugin(toys: "Toys") -> None:
    """It keeps its class, and nothing is put in."""
    model = toys.net()
    with library(heads=lambda module: 1 / 0), pytest.raises(ZeroDivisionError) as caught:
        tunerkit.wrap(model, "toy-low-rank", LAYER)
    assert any("heads of a ModelLibrary of plugin 'answering'" in note for note in caught.value.__notes__)
    assert tunerkit.adapters(model) == {}


def test_a_reference_is_what_a_plugin_makes(toys: "Toys", monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a plugin that makes one, the error says which does."""
    model, twin = tunerkit.wrap(toys.net(), "toy-low-rank", LAYER), nn.Linear(1, 1)
    with registered(answering("tunerkit_reference", twin)):
        assert tunerkit.reference(model) is twin
    monkeypatch.setattr(Registry, "ask", lambda *_, **__: iter(()))
    monkeypatch.setattr(Catalog, "absence", lambda self, name: f"{name} is not installed")
    with pytest.raises(tunerkit.errors.AdapterError, match=r"tunerkit-transformers makes references.*\[transformers\]"):
        tunerkit.reference(model)
