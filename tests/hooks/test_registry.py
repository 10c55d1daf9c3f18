"""The registry: plugins that load independently, collisions, ownership, and errors that name the faulty plugin."""

import importlib
import inspect
import itertools
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tunerkit.config import AdapterConfig
from tunerkit.errors import PluginError, StepError, UnknownMethodError
from tunerkit.hooks import registry, specs
from tunerkit.hooks.registry import Registry
from tunerkit.plugin import hookimpl
from tunerkit.records import Method
from tunerkit_testing.registering import registered

# Any: tests hand in plain values where a spec wants modules and configs.
SPECS: Any = specs

# A plugin that owns the methods listed and answers with its own name, so that a test sees who was asked.
GOOD = """
import attrs
from tunerkit.plugin import AdapterConfig, Method, hookimpl

@attrs.frozen
class Config(AdapterConfig):
    rank: int = 8

@hookimpl
def tunerkit_methods():
    return [Method(name, Config) for name in {methods!r}]

@hookimpl
def tunerkit_build_adapter(target):
    return ({module!r}, target)

@hookimpl
def tunerkit_base_layers():
    return [{module!r}]
"""
HEAD = "import attrs\nfrom tunerkit.plugin import AdapterConfig, Method, hookimpl\n"
CONFIG = "@attrs.frozen\nclass Config(AdapterConfig):\n    rank: int = 8\n"
YIELD = "@hookimpl\ndef tunerkit_methods():\n    return [Method('broken', Config)]\n"
BUILD = "@hookimpl\ndef tunerkit_build_adapter(target):\n    return target\n"

BROKEN = {
    "ImportError": "import a_module_that_nobody_has",
    "SyntaxError": "def (",
    "SystemExit": "raise SystemExit(3)",
    "ZeroDivisionError": "1 / 0",
    "GeneratorExit": "raise GeneratorExit",
    "CancelledError: stopped": "import asyncio\nraise asyncio.CancelledError('stopped')",
    "Skipped: not here": "import pytest\npytest.skip('not here', allow_module_level=True)",
    "Silent: (printing its message raised ZeroDivisionError)": "class Silent(Exception):\n"
    "    def __str__(self): return 1 / 0\nraise Silent",
    "Silent: (printing its message raised SystemExit)": "class Silent(BaseException):\n"
    "    def __str__(self): raise SystemExit\nraise Silent",
    "name of a Method is 3; expected a word": f"{HEAD}{CONFIG}{YIELD}{BUILD}".replace("'broken'", "3"),
    "name of a Method is None; expected a word": f"{HEAD}{CONFIG}{YIELD}{BUILD}".replace("'broken'", "None"),
    "needs_steps of method 'broken' is 'no'": f"{HEAD}{CONFIG}{YIELD}{BUILD}".replace("Config)]", "Config, 'no')]"),
    "...(": "raise ValueError('long' * 1000000)",
    "implements no hook": "x = 1",
    "is not marked @tunerkit.hookimpl": f"def tunerkit_methods():\n    return []\n{HEAD}{BUILD}",
    "did you mean 'tunerkit_delta'": f"{HEAD}{CONFIG}{YIELD}{BUILD}@hookimpl\ndef tunerkit_dleta(adapter): ...\n",
    "can not be found in the hookspec": HEAD + CONFIG + YIELD + BUILD.replace("(target)", "(targte)"),
    "KeyError": f"{HEAD}{BUILD}@hookimpl\ndef tunerkit_methods():\n    yield {{}}['method']\n",
    "expected a tunerkit.plugin.Method": f"{HEAD}{BUILD}@hookimpl\ndef tunerkit_methods():\n    return 'broken'\n",
    "object is not iterable": f"{HEAD}{CONFIG}{BUILD}{YIELD}".replace("[Method('broken', Config)]", "3"),
    "config of method 'broken' is 3; expected an attrs class": f"{HEAD}Config = 3\n{YIELD}{BUILD}",
    "expected an attrs class derived": f"{HEAD}class Config(AdapterConfig): ...\n{YIELD}{BUILD}",
    "derived from tunerkit.plugin.AdapterConfig": f"{HEAD}@attrs.frozen\nclass Config: ...\n{YIELD}{BUILD}",
    "expected a word": f"{HEAD}{CONFIG}{YIELD}{BUILD}".replace("'broken'", "'two words'"),
    "twice": f"{HEAD}{CONFIG}{YIELD}{BUILD}".replace("Config)]", "Config)] * 2"),
    "no tunerkit_build_adapter": f"{HEAD}{CONFIG}{YIELD}@hookimpl\ndef tunerkit_base_layers():\n    return ['its']\n",
    "is a hook wrapper": HEAD + "@hookimpl(wrapper=True)\ndef tunerkit_base_layers():\n    return (yield)\n",
    "make them one function": HEAD + "@hookimpl(specname='tunerkit_base_layers')\ndef layers():\n    return []\n"
    "@hookimpl\ndef tunerkit_base_layers():\n    return []\n",
    "pass an instance": f"{HEAD}class P:\n    @hookimpl\n    def tunerkit_base_layers(self): ...\n"
    "import sys; sys.modules[__name__] = P\n",
    "must be hashable": "import sys\nclass P:\n    __hash__ = None\nsys.modules[__name__] = P()\n",
    "must not use the registry at import": "from tests_current_registry import current\ncurrent.methods()\n",
}

_numbers = itertools.count()


class Site:
    """A folder on ``sys.path`` with temporary distributions; a module's text may name itself as ``{module}``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, distribution: str, entries: Mapping[str, str], *, version: str = "1.0") -> None:
        """Install a distribution: entry point name -> text of its module."""
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = ["[tunerkit]"]
        for entry, text in entries.items():
            module = f"throwaway_{next(_numbers)}"
            (self.folder / f"{module}.py").write_text(text.replace("{module!r}", repr(distribution)))
            lines.append(f"{entry} = {module}")
        (info / "entry_points.txt").write_text("\n".join(lines))

    def good(self, distribution: str, *methods: str, entry: str | None = None) -> None:
        """Install a working plugin that yields ``methods``."""
        self.add(distribution, {entry or distribution: GOOD.replace("{methods!r}", repr(methods))})

    def registry(self) -> Registry:
        """A registry that sees only the distributions of this folder."""
        importlib.invalidate_caches()
        return Registry(metadata.distributions(path=[str(self.folder)]))


@pytest.fixture(autouse=True)
def _no_limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The developer's environment has no influence, and no temporary module stays imported."""
    monkeypatch.delenv("TUNERKIT_PLUGINS", raising=False)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("throwaway_"):
            del sys.modules[name]


@pytest.fixture
def make_site(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Site]:
    def make() -> Site:
        folder = tmp_path_factory.mktemp("site")
        monkeypatch.syspath_prepend(str(folder))
        return Site(folder)

    return make


@pytest.fixture
def site(make_site: Callable[[], Site]) -> Site:
    return make_site()


def build(found: Registry, method: str, target: object) -> object:
    """What the plugin that owns ``method`` builds at ``target``."""
    return call(found, SPECS.tunerkit_build_adapter, method, target=target)


def call(found: Registry, hook: Any, method: str, **given: object) -> object:
    """What the plugin that owns ``method`` answers; None for arguments that a test does not name."""
    catalog = found.loaded()
    return catalog.call(
        catalog.owner_of(method, hook), hook, {**dict.fromkeys(inspect.signature(hook).parameters), **given}
    )


def answers(found: Registry) -> list[Any]:
    """What the plugins answer that are asked for base layers."""
    return [answer for _, answer in found.ask(SPECS.tunerkit_base_layers)]


@attrs.frozen
class Config(AdapterConfig):
    """The minimum config of a method."""


class InProcess:
    """A plugin as a notebook would define it."""

    def __init__(self, *names: str) -> None:
        self.names = names

    @hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method(name, Config) for name in self.names]

    @hookimpl
    def tunerkit_build_adapter(self, target: object) -> object:
        return ("in process", target)


def test_an_installed_method_is_found_with_its_distribution_and_version(site: Site) -> None:
    """`get` returns the record the plugin yields; `methods` and `owner_of` say where it comes from."""
    site.add("acme-tuning", {"acme": GOOD.replace("{methods!r}", repr(("first", "second")))}, version="2.5")
    found = site.registry()
    assert found.get("second").name == "second"
    assert sorted(found.methods()) == ["first", "second"]
    assert found.owner_of("first") == found.methods()["first"]
    assert (found.owner_of("first").distribution, found.owner_of("first").version) == ("acme-tuning", "2.5")
    assert found.owner_of("first").error is None


def test_an_unknown_method_is_answered_with_what_is_installed_and_the_closest_name(site: Site) -> None:
    """One error has the unknown name, the installed methods, and the closest match."""
    site.good("tunerkit-lora", "lora")
    site.good("tunerkit-adalora", "adalora")
    expected = "no method named 'adalor'; installed: adalora, lora; did you mean 'adalora'"
    for ask in (site.registry().get, site.registry().owner_of):
        with pytest.raises(UnknownMethodError, match=expected):
            ask("adalor")


def test_without_any_plugin_the_error_says_how_to_get_one(site: Site) -> None:
    """The core has no method: the error says so instead of listing nothing."""
    assert site.registry().methods() == {}
    with pytest.raises(UnknownMethodError, match=r"installed: none .*a separate distribution"):
        site.registry().get("lora")


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_plugin_is_named_and_the_others_work(site: Site, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """It is listed with distribution, version and reason, nothing of it stays registered, and the others work."""
    site.good("aaa", "first")
    site.add("mmm", {"broken": BROKEN[reason]}, version="0.3")
    site.good("zzz", "last")
    found = site.registry()
    current = types.ModuleType("tests_current_registry")
    monkeypatch.setattr(current, "current", found, raising=False)
    monkeypatch.setitem(sys.modules, "tests_current_registry", current)
    listed = found.methods()
    assert sorted(listed) == ["broken", "first", "last"]
    assert (listed["broken"].distribution, listed["broken"].version) == ("mmm", "0.3")
    assert listed["broken"].error is not None
    assert reason.strip() in listed["broken"].error.replace("ModuleNotFoundError", "ImportError")
    assert "\n" not in listed["broken"].error
    assert build(found, "last", 1) == ("zzz", 1)
    assert answers(found) == [["aaa"], ["zzz"]]
    with pytest.raises(UnknownMethodError, match=r"(?s)installed: first, last.*'broken' of mmm 0\.3: "):
        found.get("broken")


def test_why_a_distribution_is_absent_is_said_as_it_is(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, broken, not installed, or left out by the environment: what helps differs."""
    site.good("tunerkit-good", "good")
    site.add("tunerkit-broken", {"broken": "1 / 0"})
    found = site.registry()
    assert found.loaded().absence("tunerkit-good") is None
    absent = found.loaded().absence("tunerkit-broken") or ""
    assert absent.startswith("tunerkit-broken cannot be used: ZeroDivisionError: division by zero")
    assert absent.endswith("; another version may work")
    assert found.loaded().absence("tunerkit-gone") == "tunerkit-gone is not installed"
    monkeypatch.setenv("TUNERKIT_PLUGINS", "")
    assert "TUNERKIT_PLUGINS limits what is loaded" in str(site.registry().loaded().absence("tunerkit-good"))


def test_broken_metadata_of_one_distribution_does_not_affect_others(site: Site) -> None:
    """An entry point that is no module, and metadata that cannot be decoded, are named; the rest loads."""
    site.good("aaa", "first")
    site.add("mmm", {"broken": ""})
    (site.folder / "mmm-1.0.dist-info" / "entry_points.txt").write_text("[tunerkit]\nbroken = not a module!\n")
    site.add("nnn", {"unreadable": ""})
    (site.folder / "nnn-1.0.dist-info" / "entry_points.txt").write_bytes(b"[tunerkit]\n\xff = \xfe\n")
    listed = site.registry().methods()
    assert listed["first"].error is None
    assert "is not a module: 'not a module!'" in str(listed["broken"].error)
    assert "metadata cannot be read" in str(listed["nnn-1.0.dist-info"].error)


def test_of_two_copies_of_a_distribution_the_first_on_the_path_counts(make_site: Callable[[], Site]) -> None:
    """Python imports the first one too; the second is neither loaded nor counted as a collision."""
    hidden, seen = make_site(), make_site()
    hidden.good("acme", "old")
    seen.good("Acme", "new")
    path = [str(seen.folder), str(hidden.folder)]
    assert list(Registry(metadata.distributions(path=path)).methods()) == ["new"]


def test_the_distribution_named_after_a_method_keeps_it(site: Site) -> None:
    """`tunerkit-lora` owns "lora" even if another distribution sorts first; the other's remaining methods work."""
    site.good("acme", "lora", "other")
    site.good("tunerkit_LoRA", "lora")
    found = site.registry()
    assert found.owner_of("lora").distribution == "tunerkit-lora"
    assert build(found, "lora", 1) == ("tunerkit_LoRA", 1)
    assert build(found, "other", 1) == ("acme", 1)
    loser = found.methods()["lora (acme)"]
    assert loser.distribution == "acme"
    assert "tunerkit-lora" in str(loser.error)
    assert "acme" in str(loser.error)


def test_a_plugin_that_lost_every_method_is_not_asked_for_anything(site: Site) -> None:
    """It is only listed with its reason: a fork of a plugin doesn't answer a second time."""
    site.good("aaa", "lora")
    site.good("zzz", "lora")
    assert answers(site.registry()) == [["aaa"]]


def test_a_plugin_without_methods_is_asked_for_base_layers(site: Site) -> None:
    """A distribution may provide only base layers."""
    site.good("quantised")
    assert site.registry().methods() == {}
    assert answers(site.registry()) == [["quantised"]]


def test_two_distributions_may_use_one_entry_point_name(site: Site) -> None:
    """An entry point's name is no identity: both load, and if both fail, both are listed."""
    site.good("aaa", "first", entry="plugin")
    site.good("bbb", "second", entry="plugin")
    site.add("ccc", {"plugin": "1 / 0"})
    site.add("ddd", {"plugin": "1 / 0"})
    assert list(site.registry().methods()) == ["first", "plugin", "plugin (ddd)", "second"]


def test_a_failed_plugin_never_hides_a_method_of_its_name(site: Site) -> None:
    """A broken entry point "lora" does not affect the method "lora" of another distribution."""
    site.add("aaa", {"lora": "1 / 0"})
    site.good("bbb", "lora")
    listed = site.registry().methods()
    assert listed["lora"].error is None
    assert listed["lora (aaa)"].error == "ZeroDivisionError: division by zero"


_names = st.sampled_from(["tunerkit-a", "tunerkit-b", "acme", "zeta", "tunerkit-z"])
_installed = st.dictionaries(
    _names,
    st.one_of(st.none(), st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3, unique=True)),
    max_size=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(installed=_installed)
def test_every_method_has_the_owner_the_rule_names(
    make_site: Callable[[], Site], installed: dict[str, list[str] | None]
) -> None:
    """For any distributions, broken ones (None) too, a method has one owner: its namesake, else the first by name."""
    here = make_site()
    for distribution, methods in installed.items():
        if methods is None:
            here.add(distribution, {distribution: "1 / 0"})
        else:
            here.good(distribution, *methods)
    found = here.registry()
    claims = [(method, dist) for dist, methods in installed.items() for method in methods or ()]
    for method in {method for method, _ in claims}:
        claimants = sorted(dist for claimed, dist in claims if claimed == method)
        expected = f"tunerkit-{method}" if f"tunerkit-{method}" in claimants else claimants[0]
        assert found.owner_of(method).distribution == expected
        assert build(found, method, 0) == (expected, 0)
    listed = found.methods()
    assert len(listed) == len(claims) + sum(methods is None for methods in installed.values())
    assert sum(info.error is None for info in listed.values()) == len({method for method, _ in claims})


def test_a_careless_plugin_is_never_asked_for_another_plugins_method(site: Site) -> None:
    """It would build for every method, with priority; only the owner is asked, and `implements` agrees."""
    careless = HEAD + CONFIG + YIELD + BUILD.replace("@hookimpl", "@hookimpl(tryfirst=True)")
    careless += "@hookimpl(tryfirst=True)\ndef tunerkit_delta():\n    return 'taken over'\n"
    site.add("aaa", {"careless": careless})
    site.good("zzz", "lora")
    found = site.registry()
    assert build(found, "lora", 1) == ("zzz", 1)
    assert call(found, SPECS.tunerkit_delta, "lora") is None
    assert found.implements(SPECS.tunerkit_delta, "broken")
    assert not found.implements(SPECS.tunerkit_delta, "lora")
    assert not found.implements(SPECS.tunerkit_delta, "nowhere")


def test_an_optional_hook_of_a_newer_version_is_accepted(site: Site) -> None:
    """A plugin may mark a hook that only a later tunerkit has."""
    later = GOOD.replace("{methods!r}", "('lora',)") + "@hookimpl(optionalhook=True)\ndef tunerkit_later(): ...\n"
    site.add("zzz", {"lora": later})
    assert site.registry().methods()["lora"].error is None


@pytest.mark.parametrize(("error", "has_own"), [("ValueError('odd')", False), ("errors.StepError('do this')", True)])
def test_what_a_plugin_raises_in_a_call_of_the_user_names_it_and_the_way_out(
    site: Site, error: str, has_own: bool
) -> None:
    """The distribution too, and the variable that leaves it out, unless the message is of a class of ours."""
    body = f"@hookimpl\ndef tunerkit_wrapped(model):\n    raise {error}\n"
    site.add("acme-rude", {"rude": f"from tunerkit import errors\n{HEAD}{body}"})
    with pytest.raises(ValueError if not has_own else StepError) as caught:
        list(site.registry().ask(SPECS.tunerkit_wrapped, model=None))
    note = "raised by tunerkit_wrapped of plugin 'rude' (acme-rude)"
    way_out = "; to run without it, list the plugins that may load in the environment variable TUNERKIT_PLUGINS"
    assert caught.value.__notes__ == [note if has_own else note + way_out]


def test_the_environment_limits_which_plugins_load(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset loads all, names load only these, empty loads none; other plugins aren't even imported."""
    site.good("aaa", "first", entry="one")
    site.add("bbb", {"two": "1 / 0"})
    site.add("ccc", {"three": ""})
    (site.folder / "ccc-1.0.dist-info" / "entry_points.txt").write_bytes(b"\xff")
    assert list(site.registry().methods()) == ["ccc-1.0.dist-info", "first", "two"]
    monkeypatch.setenv("TUNERKIT_PLUGINS", " one ,")
    assert list(site.registry().methods()) == ["first"]
    monkeypatch.setenv("TUNERKIT_PLUGINS", "")
    assert site.registry().methods() == {}
    with pytest.raises(UnknownMethodError, match="TUNERKIT_PLUGINS limits loading to: none"):
        site.registry().get("first")


def test_a_limit_that_names_no_plugin_is_an_error(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo in the environment must not look like a missing method; every use reports it."""
    site.good("aaa", "first", entry="adalora")
    monkeypatch.setenv("TUNERKIT_PLUGINS", "adalor")
    found = site.registry()
    for _ in range(2):
        with pytest.raises(PluginError, match="no plugin named 'adalor'; did you mean 'adalora'"):
            found.methods()


def test_an_in_process_plugin_comes_and_goes() -> None:
    """`register` offers its methods, `unregister` removes them, and both can be repeated."""
    found, plugin = Registry([]), InProcess("mine", "yours")
    for _ in range(2):
        found.register(plugin)
        assert found.get("mine").config is Config
        assert build(found, "yours", 1) == ("in process", 1)
        assert found.methods()["mine"].distribution == "in-process"
        found.unregister(plugin)
        assert found.methods() == {}
    with pytest.raises(PluginError, match="is not registered"):
        found.unregister(plugin)


def test_a_module_and_a_class_of_static_hooks_can_be_registered() -> None:
    """Everything that pluggy accepts as a plugin is accepted here."""

    class Static:
        @staticmethod
        @hookimpl
        def tunerkit_base_layers() -> list[str]:
            return ["static"]

    module = types.ModuleType("throwaway")
    vars(module)["tunerkit_base_layers"] = hookimpl(lambda: ["module"])
    found = Registry([])
    found.register(Static)
    found.register(module)
    assert answers(found) == [["static"], ["module"]]


def test_calling_a_method_whose_plugin_is_gone_names_it() -> None:
    """A model may be used longer than its plugin is registered."""
    found, plugin = Registry([]), InProcess("mine")
    found.register(plugin)
    found.unregister(plugin)
    with pytest.raises(PluginError, match="tunerkit_delta needs the plugin of method 'mine'"):
        call(found, SPECS.tunerkit_delta, "mine")


def test_registering_a_name_that_is_taken_leaves_nothing_behind(site: Site) -> None:
    """The whole plugin is rejected, naming the owner's distribution; once it is fixed it can be registered."""
    site.good("zzz", "lora")
    found, plugin = site.registry(), InProcess("other", "lora")
    with pytest.raises(PluginError, match=r"'lora' is already provided by zzz 1\.0"):
        found.register(plugin)
    assert list(found.methods()) == ["lora"]
    assert build(found, "lora", 1) == ("zzz", 1)
    with pytest.raises(PluginError, match="is not registered"):
        found.unregister(plugin)
    plugin.names = ("two words",)
    with pytest.raises(PluginError, match="expected a word"):
        found.register(plugin)
    plugin.names = ("mine",)
    found.register(plugin)
    assert sorted(found.methods()) == ["lora", "mine"]


@pytest.mark.parametrize(
    "plugin", ["adalora", None, 3, InProcess, object()], ids=["a name", "None", "a number", "a class", "an object"]
)
def test_registering_what_is_no_plugin_is_refused(plugin: object) -> None:
    """A name, None, a number, or a class instead of an instance: the error says what to pass."""
    found = Registry([])
    with pytest.raises(PluginError, match=r"mark its functions|pass an instance"):
        found.register(plugin)
    assert found.methods() == {}


def test_registering_twice_is_refused_and_keeps_the_first() -> None:
    """The second call is an error; the first registration stays."""
    found, plugin = Registry([]), InProcess("mine")
    found.register(plugin)
    with pytest.raises(PluginError, match="already registered"):
        found.register(plugin)
    assert found.get("mine").name == "mine"


def test_a_plugin_that_registers_another_one_loses_neither() -> None:
    """It may do so when it is asked for its methods."""
    found, other = Registry([]), InProcess("theirs")

    class Helped(InProcess):
        @hookimpl
        def tunerkit_methods(self) -> list[Method]:
            found.register(other)
            return super().tunerkit_methods()

    found.register(Helped("mine"))
    assert sorted(found.methods()) == ["mine", "theirs"]


def test_a_module_with_two_entry_points_is_one_plugin(site: Site) -> None:
    """Its hooks are called once, and the second entry point is listed as a failure."""
    site.add("aaa", {"one": "import tunerkit\n@tunerkit.hookimpl\ndef tunerkit_base_layers():\n    return [1]\n"})
    points = site.folder / "aaa-1.0.dist-info" / "entry_points.txt"
    points.write_text(f"{points.read_text()}\ntwo = {points.read_text().rpartition(' ')[2]}")
    found = site.registry()
    assert answers(found) == [[1]]
    assert found.methods()["two"].error == "it is loaded already, as plugin 'one' (aaa)"


def test_a_plugin_that_comes_later_does_not_answer_for_others(site: Site) -> None:
    """An implementation may be kept, as `attach` does: it is that of the method's own plugin."""
    site.good("aaa", "first")
    found = site.registry()
    implementation = found.implementation(SPECS.tunerkit_build_adapter, "first")
    assert implementation is not None
    found.register(InProcess("late"))
    assert implementation.function(target=1) == ("aaa", 1)
    assert build(found, "first", 1) == ("aaa", 1)


def test_a_distribution_that_is_there_twice_is_named(site: Site) -> None:
    """The first one on the path is used; the other version is listed with what to do."""
    for version in ("1.0", "2.0"):
        site.add("aaa", {"aaa": GOOD.replace("{methods!r}", "('first',)")}, version=version)
    listed = site.registry().methods()
    (other,) = [info for info in listed.values() if info.error]
    assert listed["first"].version != other.version
    assert "installed twice" in (other.error or "")


def test_two_threads_load_the_plugins_once(site: Site) -> None:
    """The first call loads; concurrent calls wait and get the same records."""
    slow = "import time\ntime.sleep(0.1)\n" + GOOD.replace("{methods!r}", "('lora',)")
    site.add("aaa", {"slow": slow})
    found, seen = site.registry(), []
    threads = [threading.Thread(target=lambda: seen.append(found.get("lora"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len({id(method) for method in seen}) == 1


def test_an_interrupted_load_starts_afresh(site: Site) -> None:
    """Ctrl-C during a slow import is not a plugin's failure, and the next call loads everything."""
    flag = "throwaway_interrupted"
    interrupted = f"import signal, sys, types\nif {flag!r} not in sys.modules:\n"
    interrupted += f"    sys.modules[{flag!r}] = types.ModuleType('x')\n    signal.raise_signal(signal.SIGINT)\n"
    site.good("aaa", "first")
    site.add("mmm", {"slow": interrupted + GOOD.replace("{methods!r}", "('second',)")})
    found = site.registry()
    # A shell starts its background jobs with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            found.methods()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(found.methods()) == ["first", "second"]


def test_a_loaded_registry_is_read_without_its_lock(site: Site) -> None:
    """A call that is interrupted while it changes the registry keeps the lock, and must not stop other threads."""
    site.good("tunerkit-good", "good")
    found = site.registry()
    found.methods()
    seen: list[object] = []
    with found._lock:
        thread = threading.Thread(
            target=lambda: seen.append((found.implements(specs.tunerkit_shared, "good"), found.get("good").name)),
            daemon=True,
        )
        thread.start()
        thread.join(300)
    assert seen == [(False, "good")]


def test_the_default_registry_reads_what_is_installed_when_first_asked(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The functions of the module share one registry; `reset` makes it read environment and path again."""
    site.good("throwaway-dist", "throwaway", entry="throwaway-entry")
    monkeypatch.setenv("TUNERKIT_PLUGINS", "throwaway-entry")
    registry.reset()
    plugin = InProcess("mine")
    try:
        registry.register(plugin)
        assert list(registry.methods()) == ["mine", "throwaway"]
        assert registry.get("throwaway").name == "throwaway"
        assert registry.owner_of("throwaway").distribution == "throwaway-dist"
        assert registry.implements(SPECS.tunerkit_build_adapter, "throwaway")
        assert build(registry, "throwaway", 1) == ("throwaway-dist", 1)
        assert answers(registry) == [["throwaway-dist"]]
        registry.unregister(plugin)
        assert list(registry.methods()) == ["throwaway"]
        monkeypatch.setenv("TUNERKIT_PLUGINS", "")
        assert list(registry.methods()) == ["throwaway"]
        registry.reset()
        assert registry.methods() == {}
    finally:
        registry.reset()


def test_a_name_is_found_in_any_case_and_an_exact_one_first(site: Site) -> None:
    """A user may write LoRA. Where two methods differ in case alone, only an exact name is one of them."""
    site.good("tunerkit-lora", "lora")
    site.add("acme", {"acme": GOOD.replace("{methods!r}", repr(("Fast", "fast")))})
    found = site.registry()
    named = [found.named(name) for name in ("LoRA", "lora", "LORA", "Fast", "fast")]
    assert named == ["lora", "lora", "lora", "Fast", "fast"]
    for name in ("FAST", "lorra"):
        with pytest.raises(UnknownMethodError, match=f"no method named '{name}'"):
            found.named(name)
    for wrong in (["lora"], {"rank": 8}):
        with pytest.raises(UnknownMethodError, match=r"name comes before the config: tunerkit\.wrap\(model, 'lora'"):
            found.named(wrong)  # type: ignore[arg-type]


class Reading(types.SimpleNamespace):
    """A plugin object with one hook."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def reading(*, first: bool = False, last: bool = False) -> Reading:
    """A plugin whose only hook is marked with pluggy's tryfirst or trylast."""

    def tunerkit_weight_readers() -> list[object]:
        return []

    return Reading(tunerkit_weight_readers=hookimpl(tryfirst=first, trylast=last)(tunerkit_weight_readers))


def test_plugins_are_asked_in_the_order_in_which_they_came() -> None:
    """First those with tryfirst, last those with trylast; pluggy itself asks the latter in reverse."""
    made = [reading(), reading(last=True), reading(), reading(last=True), reading(first=True)]
    with registered(*made):
        asked = [id(each.plugin) for each in registry.loaded().asked(specs.tunerkit_weight_readers)]
    own = [id(each) for each in made]
    assert [own.index(each) for each in asked if each in own] == [4, 0, 2, 1, 3]
