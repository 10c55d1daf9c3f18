"""The hook specs: each hook says when it fires, stands in its group, and has an example."""

import inspect
import itertools
import re
from pathlib import Path

import pluggy
import pytest

from tunerkit.hooks import specs as hookspecs

AUTHORS = Path(__file__).parents[2] / "docs" / "authors"
_manager = pluggy.PluginManager("tunerkit")
_manager.add_hookspecs(hookspecs)
HOOKS = sorted(vars(_manager.hook))
ALL_ARE_ASKED = {"tunerkit_methods", "tunerkit_base_layers", "tunerkit_ranks_changed"}
ALL_ARE_ASKED |= {"tunerkit_weight_readers", "tunerkit_default_targets", "tunerkit_formats"}
ALL_ARE_ASKED |= {"tunerkit_attach", "tunerkit_open_run", "tunerkit_engine", "tunerkit_holdings"}
ALL_ARE_ASKED |= {
    "tunerkit_prepare",
    "tunerkit_wrapped",
    "tunerkit_adapted",
    "tunerkit_unwrapped",
    "tunerkit_restrictions",
}
ALL_ARE_ASKED |= {"tunerkit_model_libraries", "tunerkit_reference"}


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_says_when_it_fires_in_eight_lines_and_has_an_example(name: str) -> None:
    """The docstring states the moment, and the pages for authors implement the hook with some of its arguments."""
    text = inspect.getdoc(getattr(hookspecs, name)) or ""
    assert re.search(r"^Fires ", text, flags=re.MULTILINE)
    assert len(text.splitlines()) <= 8
    pages = "".join(page.read_text(encoding="utf-8") for page in AUTHORS.glob("*.md"))
    assert re.search(rf"@(tunerkit\.)?hookimpl.*\n *def {name}\(", pages)
    given = {argument.strip() for found in re.findall(rf"def {name}\((.*?)\)", pages) for argument in found.split(",")}
    assert given <= {"", "self", *inspect.signature(getattr(hookspecs, name)).parameters}


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
        *(
            "tunerkit_prepare",
            "tunerkit_wrapped",
            "tunerkit_unwrapped",
            "tunerkit_adapted",
            "tunerkit_holdings",
            "tunerkit_restrictions",
        ),
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
