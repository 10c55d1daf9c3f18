"""What other libraries call our functions: their names answer with the line to write here."""

import importlib
import re
import sys
import tomllib
import types
from pathlib import Path

import pytest

import tunerkit
from tests.support.toys import Toys
from tunerkit.extras import hints, serving


@pytest.mark.parametrize("name", hints("calls"))
def test_a_name_of_another_library_answers_with_ours(name: str) -> None:
    """As an attribute and in ``from tunerkit import``, whose error would otherwise lose the text."""
    assert not hasattr(tunerkit, name)
    with pytest.raises(AttributeError, match=re.escape(f"'{name}': write {hints('calls')[name]}")):
        getattr(tunerkit, name)
    with pytest.raises(ImportError, match=re.escape(f"'{name}': write {hints('calls')[name]}")):
        exec(f"from tunerkit import {name}")


@pytest.mark.parametrize("name", hints("calls"))
def test_every_line_to_write_names_what_there_is(name: str) -> None:
    """Each ``tunerkit.name`` in it is public."""
    for ours in re.findall(r"tunerkit\.(\w+)", hints("calls")[name]):
        assert callable(getattr(tunerkit, ours))


@pytest.mark.parametrize("kind", ["calls", "settings", "methods"])
def test_each_name_leads_to_one_line_and_each_extra_in_it_exists(kind: str) -> None:
    """The file holds lines with their names, and "{quant}" for the command that installs an extra."""
    text = (Path(tunerkit.__file__).parent / "elsewhere.toml").read_text("utf-8")
    names = [name for listed in tomllib.loads(text)[kind].values() for name in listed]
    assert sorted(names) == sorted(hints(kind))
    assert set(re.findall(r"\{(\w+)\}", text)) == {"lora", "adalora", "methods", "quant"}
    assert not any("{" in line for line in hints(kind).values())


@pytest.mark.parametrize("name", ["prompt-tuning", "PREFIX_TUNING", "p_tuning", "adaption-prompt"])
def test_a_method_of_peft_that_is_none_here_says_why(name: str, toys: "Toys") -> None:
    """As PEFT's type or its enum's name, in any case; a mistyped name is still told the closest one."""
    with pytest.raises(tunerkit.errors.UnknownMethodError, match=r"it lengthens the sequence.*use PEFT.*prototypes"):
        tunerkit.wrap(toys.net(), name)
    with pytest.raises(tunerkit.errors.UnknownMethodError, match="did you mean 'toy-shift'"):
        tunerkit.wrap(toys.net(), "toy-shif")


def test_other_names_are_as_unknown_as_in_any_module() -> None:
    """Python's own words, since nothing is known of them."""
    with pytest.raises(AttributeError, match=r"^module 'tunerkit' has no attribute 'wrapp'$"):
        getattr(tunerkit, "wrapp")  # noqa: B009 - a type checker sees it
    with pytest.raises(ImportError, match="cannot import name 'wrapp'"):
        exec("from tunerkit import wrapp")


def test_a_tuner_answers_too(toys: "Toys") -> None:
    """People look for PEFT's methods on what holds the adapter. ``hasattr`` stays false, and copies work."""
    tuner = tunerkit.tuner(toys.trained(targets=["conv"]))
    assert not hasattr(tuner, "merge_and_unload")
    with pytest.raises(AttributeError, match=r"'Tuner' .* write tunerkit\.unwrap\(model, keep_merged=True\)"):
        getattr(tuner, "merge_and_unload")  # noqa: B009 - a type checker sees it
    with pytest.raises(AttributeError, match=r"^'Tuner' object has no attribute 'rankz'$"):
        getattr(tuner, "rankz")  # noqa: B009


def test_a_config_of_peft_is_served_by_the_plugin_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its classes derive from one of transformers', which is not meant."""
    library = type("PushToHubMixin", (), {"__module__": "transformers.utils.hub"})
    config = type("LoraConfig", (library,), {"__module__": "peft.tuners.lora.config"})
    assert serving(config()) == "peft"
    assert serving(library()) == "transformers"


def test_importing_a_submodule_still_works() -> None:
    """What Python asks of a module before it imports a part of it is answered as before."""
    sys.modules.pop("tunerkit.testing", None)
    assert isinstance(importlib.import_module("tunerkit.patterns"), types.ModuleType)
