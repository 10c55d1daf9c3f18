"""The hook specs: each hook is documented by an example that runs and matches its signature."""

import doctest
import inspect
import itertools
import re
import types

import pluggy
import pytest
import torch

import tunerkit
from tunerkit.hooks import specs as hookspecs

_manager = pluggy.PluginManager("tunerkit")
_manager.add_hookspecs(hookspecs)
HOOKS = sorted(vars(_manager.hook))
ALL_ARE_ASKED = {"tunerkit_methods", "tunerkit_base_layers", "tunerkit_ranks_changed"}
ALL_ARE_ASKED |= {"tunerkit_weight_readers", "tunerkit_default_targets", "tunerkit_formats"}
ALL_ARE_ASKED |= {"tunerkit_attach", "tunerkit_open_run", "tunerkit_engine", "tunerkit_holdings"}
ALL_ARE_ASKED |= {"tunerkit_wrapped", "tunerkit_adapted", "tunerkit_unwrapped", "tunerkit_restrictions"}
ALL_ARE_ASKED |= {"tunerkit_model_libraries", "tunerkit_reference"}


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_says_when_it_fires_and_shows_an_example_that_runs(name: str) -> None:
    """The docstring states the moment; its example implements the hook, runs, and pluggy accepts it."""
    spec = getattr(hookspecs, name)
    assert re.search(r"^Fires ", inspect.getdoc(spec) or "", flags=re.MULTILINE)
    given = {"torch": torch, "tunerkit": tunerkit, "SimpleNamespace": types.SimpleNamespace}  # the module says so
    example = doctest.DocTestParser().get_doctest(spec.__doc__, given, name, "hookspecs.py", 0)
    results = doctest.DocTestRunner().run(example, clear_globs=False)
    assert results.attempted > 0
    assert results.failed == 0
    plugin = types.SimpleNamespace(**{name: example.globs[name]})
    manager = pluggy.PluginManager("tunerkit")
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, name="example")
    assert [found.plugin for found in getattr(manager.hook, name).get_hookimpls()] == [plugin]


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_of_the_owner_alone_gives_one_result(name: str) -> None:
    """Only hooks that ask every plugin return a list."""
    spec = getattr(_manager.hook, name).spec
    assert bool(spec.opts["firstresult"]) == (name not in ALL_ARE_ASKED)


def test_the_hooks_stand_under_their_groups_in_the_order_of_the_data() -> None:
    """A reader finds Discovery, Layer injection, Step callbacks, Serialization, and each hook under its group."""
    source = inspect.getsource(hookspecs)
    groups = re.split(r"^# --- (.+?) -+$", source, flags=re.MULTILINE)[1:]
    found = {
        title: re.findall(r"^def (\w+)", text, re.MULTILINE) for title, text in zip(*[iter(groups)] * 2, strict=True)
    }
    assert list(found) == ["Discovery", "Layer injection", "Step callbacks", "Serialization"]
    assert found["Discovery"] == ["tunerkit_methods"]
    assert found["Layer injection"] == [
        *("tunerkit_base_layers", "tunerkit_weight_readers", "tunerkit_default_targets"),
        *("tunerkit_model_libraries", "tunerkit_shared", "tunerkit_build_adapter"),
        *("tunerkit_wrapped", "tunerkit_unwrapped", "tunerkit_adapted", "tunerkit_holdings", "tunerkit_restrictions"),
    ]
    assert found["Serialization"] == [
        *("tunerkit_delta", "tunerkit_factors", "tunerkit_from_factors", "tunerkit_open_run", "tunerkit_formats"),
        *("tunerkit_state", "tunerkit_restore"),
    ]
    assert sorted(itertools.chain(*found.values())) == HOOKS


def test_the_training_loop_names_every_hook_at_its_moment() -> None:
    """The pseudo-code of the module says when each hook fires: before the optimizer's update or after it."""
    assert hookspecs.__doc__ is not None
    loop = hookspecs.__doc__.split("::", 1)[1].split("A plain ``@hookspec``", 1)[0]
    # A budget is asked for at any time: no line of a loop could name it.
    assert set(re.findall(r"tunerkit_\w+", loop)) == set(HOOKS) - {"tunerkit_budget"}
    moments = ["tunerkit_start", ".backward()", "tunerkit_before_step", "updates the weights", "tunerkit_after_step",
               "tunerkit_ranks_changed", ".zero_grad()", "tunerkit_finish"]  # fmt: skip
    places = [loop.index(moment) for moment in moments]
    assert places == sorted(places)
