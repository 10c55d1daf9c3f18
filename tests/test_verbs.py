"""Verbs that other distributions bring, by entry points of the group "tunerkit.verbs"."""

import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tunerkit
from tunerkit import extras, plugin
from tunerkit.errors import PluginError, TunerkitError, VerbError

Bring = Callable[..., None]
FACE = vars(tunerkit)


@pytest.fixture
def bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bring]:
    """A function that installs a distribution with entry points of the group, and a module with the given code."""
    brought: set[str] = set()

    def install(name: str, *, code: str = "", version: str = "1.0", **verbs: str) -> None:
        path = tmp_path / f"{name}-{version}"
        info = path / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (path / f"{name}.py").write_text(code, encoding="utf-8")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
        lines = [f"{verb} = {value}" for verb, value in verbs.items()]
        (info / "entry_points.txt").write_text("\n".join(["[tunerkit.verbs]", *lines]), encoding="utf-8")
        monkeypatch.syspath_prepend(path)
        brought.update(verbs)

    yield install
    for name in brought - {"wrap"}:
        FACE.pop(name, None)  # `tunerkit` keeps what it has found
    for name in [each for each in sys.modules if each.startswith("acme_")]:
        del sys.modules[name]
    FACE["_points"].cache_clear()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no distribution brought a verb."""
    monkeypatch.setitem(FACE, "_points", functools.cache(dict))
    for name in extras.VERBS:
        monkeypatch.delitem(FACE, name, raising=False)


def imported(name: str, module: str = "tunerkit") -> dict[str, Any]:
    found: dict[str, Any] = {}
    exec(f"from {module} import {name}", found)
    return found


def test_a_verb_of_any_distribution_is_found_wherever_one_looks(bring: Bring, tmp_path: Path) -> None:
    """As an attribute, in an import, in ``dir`` and in ``*``: the same object, from when it is installed on."""
    assert not hasattr(tunerkit, "greet_twice")
    bring("acme_verbs", code="def greet(): return 'hello'", greet_twice="acme_verbs:greet")
    unreadable = tmp_path / "acme_verbs-1.0" / "unreadable-1.0.dist-info"
    unreadable.mkdir()
    (unreadable / "entry_points.txt").write_bytes(b"[tunerkit.verbs]\n\xff = x:y")
    verb = getattr(tunerkit, "greet_twice")  # noqa: B009 - a type checker sees it
    assert verb() == "hello"
    assert imported("greet_twice")["greet_twice"] is verb
    assert imported("*")["greet_twice"] is verb
    assert "greet_twice" in dir(tunerkit)
    assert "greet_twice" not in dir(plugin)


def test_core_s_own_names_stay_core_s(bring: Bring) -> None:
    """A distribution cannot replace a verb of core."""
    wrap = tunerkit.wrap
    bring("acme_wrapping", code="def wrap(): ...", wrap="acme_wrapping:wrap")
    FACE["_points"].cache_clear()
    assert dir(tunerkit).count("wrap") == 1
    assert tunerkit.wrap is wrap is imported("wrap")["wrap"]


def test_of_two_versions_of_a_distribution_the_first_on_the_path_counts(bring: Bring) -> None:
    """As for Python's imports."""
    bring("acme_old", code="number = 1", version="1.0", number_of="acme_old:number")
    bring("acme_old", code="number = 2", version="2.0", number_of="acme_old:number")
    assert imported("number_of")["number_of"] == 2


@pytest.mark.parametrize(("entry", "extra"), extras.VERBS.items())
def test_a_verb_that_has_left_core_says_which_extra_brings_it(alone: None, entry: str, extra: str) -> None:
    """As an attribute one class of ours, in an import the same text. ``hasattr`` is false; ``*`` has the others."""
    module, _, name = f"tunerkit.{entry}".rpartition(".")
    words = f"tunerkit.{entry} comes with tunerkit-{extra}, which is not installed: {extras.install(extra)}"
    assert not hasattr(sys.modules[module], name)
    with pytest.raises(VerbError, match=f"^{re.escape(words)}$") as caught:
        getattr(sys.modules[module], name)
    assert isinstance(caught.value, TunerkitError)
    is_package = hasattr(sys.modules[module], "__path__")  # Python gives the text of a module's error to nobody
    with pytest.raises(ImportError, match=f"^{re.escape(words)}$" if is_package else name):
        imported(name, module)
    assert name not in imported("*")
    assert name not in dir(tunerkit)


BROKEN = {
    "raises": ("raise ValueError('no driver')", r"ValueError: no driver"),
    "exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "lacks it": ("", "AttributeError: module 'acme_broken' has no attribute 'verb'"),
    "needs another library": ("import acme_library", "ModuleNotFoundError: No module named 'acme_library'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_verb_that_cannot_be_loaded_names_its_distribution(bring: Bring, case: str) -> None:
    """With the version and the cause. Other verbs, and what looks at all names, work."""
    code, cause = BROKEN[case]
    bring("acme_broken", code=code, broken_verb="acme_broken:verb")
    words = rf"tunerkit\.broken_verb of acme_broken 1\.0 cannot be loaded: {cause}; install another version"
    assert not hasattr(tunerkit, "broken_verb")
    with pytest.raises(PluginError, match=words):
        getattr(tunerkit, "broken_verb")  # noqa: B009 - a type checker sees it
    with pytest.raises(ImportError, match=words):
        imported("broken_verb")
    assert "broken_verb" in dir(tunerkit)
    assert callable(tunerkit.wrap)


def test_a_verb_of_two_distributions_is_refused(bring: Bring) -> None:
    """Neither is chosen: both are named."""
    for name in ("acme_one", "acme_two"):
        bring(name, code="verb = 1", twice="acme_one:verb")
    with pytest.raises(VerbError, match=r"comes from both acme_(two|one) 1\.0 and acme_(one|two) 1\.0; keep one"):
        getattr(tunerkit, "twice")  # noqa: B009 - a type checker sees it


def test_looking_for_verbs_costs_nothing_until_one_is_asked_for() -> None:
    """``import tunerkit``, and imports of its parts, do not read what is installed."""
    code = (
        "import sys; known = {*sys.modules}; import tunerkit; from tunerkit import extras, errors\n"
        "assert not {'torch', 'importlib.metadata'} & (sys.modules.keys() - known)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
