"""The public names: where users and authors find them, that none is removed, and that no parameter changes."""

import importlib
import inspect
import json
import pydoc
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunerkit
from tests.support.model_checks import silent
from tests.support.toys import Toys
from tunerkit import extras, patterns, plugin

ROOT = Path(__file__).parents[2]
SNAPSHOT = ROOT / "tests" / "fixtures" / "public_api.json"
# What users call, by DESIGN.md, section 3: these stay where they are.
CONTRACT = {
    *("wrap", "attach", "tuner", "save", "load", "merge", "unmerge", "unwrap", "disabled", "methods", "structure"),
    *("unstructure", "register", "export", "calibrate", "activate", "reference", "param_groups", "grow_"),
    *("from_folder", "save_state", "TunerkitWarning"),
}
MODULES = ("tunerkit.errors", "tunerkit.patterns")
# The names of `tunerkit.plugin` that core brings itself.
AUTHORS = [name for name in vars(plugin)["__all__"] if f"plugin.{name}" not in extras.VERBS]
DOORS = ("tunerkit.plugin.engines", "tunerkit.plugin.trainers")


def parameters(function: object) -> Iterator[str]:
    """Each parameter as ``kind name = default``; annotations may be spelt otherwise."""
    if callable(function):
        for parameter in inspect.signature(function).parameters.values():
            default = "" if parameter.default is parameter.empty else f" = {_constant(parameter.default)}"
            yield f"{parameter.kind.name} {parameter.name}{default}"


def _constant(value: object) -> str:
    # The repr of an object names its address.
    return repr(value) if isinstance(value, str | int | float | tuple | None) else type(value).__name__


def described(name: str, found: object) -> Iterator[str]:
    """``name(parameters)`` for a function; for a class its constructor, methods, properties and fields as well."""
    if not inspect.isclass(found):
        yield f"{name}({', '.join(parameters(found))})"
        return
    if "__init__" in vars(found):
        yield f"{name}({', '.join(parameters(found))})"
    fields = [field.name for field in getattr(found, "__attrs_attrs__", ())]
    for attribute in sorted({*vars(found), *fields}):
        if not attribute.startswith("_"):
            member = inspect.getattr_static(found, attribute, None)
            member = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            arguments = f"({', '.join(parameters(member))})" if inspect.isfunction(member) else ""
            yield f"{name}.{attribute}{arguments}"


def users() -> list[str]:
    """The names of ``tunerkit``, with the verbs of other distributions that are installed."""
    return list(getattr(tunerkit, "__all__"))  # noqa: B009 - the stub has none


def names_of_users() -> dict[str, object]:
    return {name: getattr(tunerkit, name) for name in users() if name not in extras.VERBS}


def names_of_authors() -> dict[str, object]:
    """Those of ``tunerkit.plugin``, without the functions on patterns, which have a module of their own."""
    names = [name for name in AUTHORS if name not in vars(patterns)]
    return {name: getattr(plugin, name) for name in names}


def behind_doors() -> Iterator[str]:
    """The functions for engines and trainers with their parameters; classes by name, since core makes the objects."""
    for module in map(importlib.import_module, DOORS):
        for name in vars(module)["__all__"]:
            found = getattr(module, name)
            arguments = "" if inspect.isclass(found) else f"({', '.join(parameters(found))})"
            yield f"{module.__name__}.{name}{arguments}"


def public_api() -> list[str]:
    """All public functions and classes, one per line, wherever they are imported from."""
    named = [(f"tunerkit.{name}", found) for name, found in {**names_of_authors(), **names_of_users()}.items()]
    for module in map(importlib.import_module, MODULES):
        for name, found in vars(module).items():
            if not name.startswith("_") and getattr(found, "__module__", None) == module.__name__:
                named.append((f"{module.__name__}.{name}", found))
    lines = [*(line for name, found in named for line in described(name, found)), *behind_doors()]
    # A tuner is a handle that nobody builds, so its constructor is not public.
    return sorted(line for line in lines if not line.startswith("tunerkit.Tuner("))


def test_no_public_name_is_gone_and_no_parameter_changed() -> None:
    """What users and authors may rely on is listed in a file, which a new name or parameter changes too."""
    listed, found = json.loads(SNAPSHOT.read_text(encoding="utf-8")), public_api()
    assert sorted(set(listed) - set(found)) == []  # whoever uses these would be broken
    assert sorted(set(found) - set(listed)) == []  # to be added to the file, and from then on promised


def test_what_authors_import_stands_in_one_module() -> None:
    """``tunerkit.plugin`` has what a plugin needs, and the functions on patterns; a verb of users it does not have."""
    names = vars(plugin)["__all__"]
    found = {name: getattr(plugin, name) for name in AUTHORS}
    assert len(found) == len(AUTHORS)
    assert [name for name in dir(plugin) if not name.startswith("__")] == sorted(names)
    assert plugin.lookup({"q_proj": 1}, "layers.0.q_proj", default=2) == 1
    with pytest.raises(AttributeError, match=r"'tunerkit\.plugin' has no attribute 'wrap'"):
        getattr(plugin, "wrap")  # noqa: B009 - a type checker sees it


@pytest.mark.parametrize("door", DOORS)
def test_a_door_has_few_names_each_with_its_words(door: str) -> None:
    """At most 36, none of them in ``tunerkit.plugin`` or ``tunerkit`` too, and each has a docstring."""
    module = importlib.import_module(door)
    names = set(vars(module)["__all__"])
    assert len(names) <= 36
    assert names.isdisjoint({*vars(plugin)["__all__"], *users()})
    assert all(inspect.getdoc(getattr(module, name)) for name in names)


def test_users_find_few_names_and_authors_the_others() -> None:
    """``tunerkit`` has at most 35 names: all of the contract's; every other one is an author's. ``dir`` shows them."""
    names = users()
    assert len(names) == len(set(names)) <= 35
    assert {*names, *extras.VERBS} >= CONTRACT
    assert [name for name in dir(tunerkit) if not name.startswith("__")] == sorted([*names, "errors", "plugin"])
    listed = re.findall(r"(\w+) as \1\b", (ROOT / "tunerkit" / "__init__.pyi").read_text(encoding="utf-8"))
    assert set(listed) - {*names, "errors", "patterns"} <= set(vars(plugin)["__all__"])


def test_names_of_users_come_without_a_warning() -> None:
    """The verbs, the modules, and the marker, which authors of pluggy's world look for at the top."""
    with silent(Warning):
        assert names_of_users()["wrap"] is tunerkit.wrap
        assert tunerkit.hookimpl is plugin.hookimpl
        assert tunerkit.errors.TunerkitError is tunerkit.TunerkitError
        assert tunerkit.patterns is patterns


@pytest.mark.parametrize(("name", "home"), [("Adapter", "tunerkit.plugin"), ("ConfigError", "tunerkit.errors")])
def test_an_old_name_warns_once_at_each_use_and_names_the_new_import(name: str, home: str) -> None:
    """It is the same object; the warning is at the line that uses the old name, however it is written."""
    line = f"write: from {home} import {name}$"
    for use in (f"from tunerkit import {name}", f"import tunerkit; {name} = tunerkit.{name}"):
        found: dict[str, object] = {}
        with pytest.warns(DeprecationWarning, match=line) as told:
            exec(compile(use, "a_users_file.py", "exec"), found)
        assert [each.filename for each in told] == ["a_users_file.py"]
        assert found[name] is getattr(importlib.import_module(home), name)


def test_our_own_code_uses_no_old_name() -> None:
    """Core, plugins, tests, examples, benchmarks, templates and pages: none shows what will be removed."""
    old = set(vars(plugin)["__all__"]) - set(users()) - {"hookimpl"}
    files = [f for end in ("py", "md", "txt", "ipynb") for part in PARTS for f in (ROOT / part).rglob(f"*.{end}")]
    assert len(files) > 500
    found = {str(f.relative_to(ROOT)): old_names(f.read_text(encoding="utf-8"), old) for f in files}
    on_purpose = {"tests/api/test_public_api.py", "tests/repository/test_architecture.py"}  # names in samples
    assert {name for name, names in found.items() if names} == on_purpose


PARTS = ("tunerkit", "plugins", "tests", "docs", "examples", "benchmarks", "scripts")


def old_names(text: str, old: set[str]) -> set[str]:
    """The names in ``old`` that a text takes from ``tunerkit`` itself, as attributes or by an import."""
    names = set(re.findall(r"(?<![\w.])tunerkit\.(\w+)", text))
    for imported in re.findall(r"from tunerkit import \(?([\w, \n]+)", text):
        names.update(re.findall(r"\w+", imported))
    return names & old


def test_help_begins_with_five_verbs_and_an_example(tmp_path: Path) -> None:
    """The first lines of ``help(tunerkit)`` name what one calls, with an example; and all of it is under 800 lines."""
    lines = pydoc.plain(pydoc.render_doc(tunerkit)).splitlines()
    assert len(lines) < 800
    start = "\n".join(lines[:32])
    assert re.findall(r"^ {8}(\w+)\(.*\) {2,}\w", start, re.MULTILINE) == ["wrap", "attach", "save", "load", "merge"]
    pytest.importorskip("tunerkit_lora", reason="the example wraps a model with LoRA")
    example = re.search(r"^( {8}import torch.*?)^ {4}\S", start, re.MULTILINE | re.DOTALL)
    assert example is not None
    run = [sys.executable, "-W", "error::DeprecationWarning", "-c", textwrap.dedent(example[1])]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "step 10 of 10" in done.stdout
    assert (tmp_path / "out" / "adapter.safetensors").is_file()


def test_a_marker_is_imported_without_torch() -> None:
    """A module with commands is imported for ``tunerkit --help``; dynamo, which takes seconds, by no import."""
    code = "import sys; from tunerkit.plugin import hookimpl; assert 'torch' not in sys.modules\n"
    code += "from tunerkit import wrap; assert 'torch._dynamo' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_tuner_is_a_small_handle(toys: "Toys") -> None:
    """At most 23 public names. Its text is tested in tests/injection/test_printed.py."""
    assert len([name for name in dir(tunerkit.tuner(toys.trained())) if not name.startswith("_")]) <= 23
