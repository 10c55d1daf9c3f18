"""Patterns for module paths: what each kind matches, compared with slow oracles, and how long they may take."""

import fnmatch
import itertools
import re
import time
import types

import pytest
from hypothesis import given, strategies as st
from torch import nn

import tunerkit
from tests.support.target_models import Net, chosen
from tunerkit import patterns
from tunerkit.errors import TargetError
from tunerkit.patterns import matches
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_adapters import Shift
from tunerkit_testing.toy_methods import ShiftConfig

# Few and similar names, so generated names do match the ends of generated paths, at dots and elsewhere.
components = st.sampled_from(["a", "aa", "ba", "0"])

paths = st.lists(components, min_size=1, max_size=4).map(".".join)


@given(paths, paths)
def test_a_plain_name_matches_the_whole_end_of_a_path_and_nothing_else(name: str, path: str) -> None:
    """Law: a name matches if its components are the last components of the path."""
    wanted, there = name.split("."), path.split(".")
    assert matches(name, path) == (there[-len(wanted) :] == wanted)


@given(st.lists(st.one_of(components, st.sampled_from(["*", "?", "[ab]", "[!a]"])), min_size=1, max_size=4), paths)
def test_a_glob_matches_the_full_path_as_its_translation_does(parts: list[str], path: str) -> None:
    """Law: * is any text, ? one character, [..] a class, [!..] its complement; every other character is literal."""
    pattern = ".".join([*parts, "*"])
    words = {"*": ".*", "?": ".", "[ab]": "[ab]", "[!a]": "[^a]"}
    translated = r"\.".join(words.get(part, re.escape(part)) for part in [*parts, "*"])
    assert matches(pattern, path) == bool(re.fullmatch(translated, path))


@given(paths, paths)
def test_a_regular_expression_matches_the_full_path_or_not_at_all(name: str, path: str) -> None:
    """Law: re: is a full match, so an expression of plain text matches one path."""
    assert matches("re:" + re.escape(name), path) == (name == path)
    assert matches(r"re:.*\." + re.escape(name), path) == path.endswith("." + name)


def test_case_counts() -> None:
    """Law: patterns are case-sensitive on every system."""
    assert not matches("Q_proj", "a.q_proj")
    assert not matches("*.Q_proj", "a.q_proj")


def test_a_slow_regular_expression_is_stopped_after_a_second() -> None:
    """Law: a pattern that would take hours raises a clear error."""
    model = nn.ModuleDict({"a" * 60 + "b": nn.Linear(1, 1)})
    start = time.process_time()  # a busy machine takes time, but not this process's
    with pytest.raises(TargetError, match=r"'re:\(a\|aa\|a\)\+c' took longer than 1 s"):
        chosen(model, "re:(a|aa|a)+c")
    assert time.process_time() - start < 5


def test_the_second_of_a_regular_expression_is_for_all_paths_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: with a clock where each match takes 0.3 s, three paths are within the limit and thirty are not."""
    ticks = itertools.count(step=0.3)
    monkeypatch.setattr(patterns, "time", types.SimpleNamespace(thread_time=lambda: next(ticks)))
    assert chosen(nn.ModuleDict({f"a{number}": nn.Linear(1, 1) for number in range(3)}), "re:a.") == ["a0", "a1", "a2"]
    with pytest.raises(TargetError, match="took longer than 1 s"):
        chosen(nn.ModuleDict({f"a{number}": nn.Linear(1, 1) for number in range(30)}), "re:a.*")


def test_a_malformed_regular_expression_is_named() -> None:
    """Law: a bad pattern is a TargetError with the parser's message."""
    with pytest.raises(TargetError, match=r"'re:\(' is not a regular expression: missing \)"):
        chosen(Net(), "re:(")


class LookingPlugin:
    """A method that looks up a per-target setting at each target, as LoRA does; ``seen`` are the targets."""

    def __init__(self, table: dict[str, int]) -> None:
        self.table = table
        self.seen: list[str] = []

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[tunerkit.Method]:
        return [tunerkit.Method("toy-looking", config=ShiftConfig)]

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, target: tunerkit.Target, base: tunerkit.BaseLayer) -> Shift:
        self.seen.append(target.path)
        patterns.lookup(self.table, target.path, 0)
        return Shift(base)


@pytest.mark.parametrize("pattern", ["re:a[0-9]+", "*a*a*a*a*a*"])
def test_the_second_is_for_all_look_ups_of_one_call(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """Law: with a clock where each match takes 0.05 s, ten targets are within the limit of one `wrap` and sixty not."""
    ticks = itertools.count(step=0.05)
    monkeypatch.setattr(patterns, "time", types.SimpleNamespace(thread_time=lambda: next(ticks)))
    plugin = LookingPlugin({pattern: 1})
    models = [nn.ModuleDict({f"a{number}": nn.Linear(1, 1) for number in range(size)}) for size in (5, 60)]
    with registered(plugin):
        tunerkit.wrap(models[0], "toy-looking", {"targets": "all-linear"})
        plugin.seen.clear()
        with pytest.raises(TargetError, match="took longer than 1 s"):
            tunerkit.wrap(models[1], "toy-looking", {"targets": "all-linear"})
    assert len(plugin.seen) < 15


def test_a_glob_for_each_of_many_targets_costs_nothing_of_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a large model may have a setting for each target, and a busy machine must not make a difference."""
    monkeypatch.setattr(patterns, "time", types.SimpleNamespace(thread_time=lambda: pytest.fail("asked for the time")))
    plugin = LookingPlugin({f"*.a{number}": number for number in range(300)})
    model = nn.ModuleDict({"block": nn.ModuleDict({f"a{number}": nn.Linear(1, 1) for number in range(300)})})
    with registered(plugin):
        tunerkit.wrap(model, "toy-looking", {"targets": "all-linear"})
    assert len(plugin.seen) == 300


def test_a_slow_pattern_at_sixty_targets_is_stopped_after_a_second_in_all() -> None:
    """Law: each target alone is within a second; together they would take 15 s."""
    plugin = LookingPlugin({"re:(?:a|aa|a)+c": 1})
    model = nn.ModuleDict({f"{'a' * 17}b{number}": nn.Linear(1, 1) for number in range(60)})
    start = time.process_time()
    with registered(plugin), pytest.raises(TargetError, match="took longer than 1 s"):
        tunerkit.wrap(model, "toy-looking", {"targets": "all-linear"})
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "pattern",
    [
        *("re:(?R)", "re:a(?R)?", "re:(?P<x>a)(?P>x)", "re:(a)(?1)", "re:(?&x)(?P<x>a)"),  # recursion fills the memory
        *("re:(?L)(?u)", "re:" + "()" * 2000, "re:" + "(?:" * 450 + ")" * 450, "*" * 2000, "[" * 1001, "re:("),
        *("re:" + "(?:" * 25 + "a" + "+)" * 25, "re:" + "(?:" * 8 + "a" + "{9})" * 8),  # written out by the compiler
        *("re:" + "(?#(()" * 9 + "(?:" * 25 + "a" + "+)" * 25, "re:(?x)a", "re:a{9999999999999999999999}"),
        *("re:" + "[[:alpha:](]" + "(?:" * 25 + "a" + "+)" * 25, "re:a" + "{9}" * 9),
    ],
    ids=lambda pattern: pattern[:12],
)
def test_a_pattern_that_cannot_be_bounded_is_refused(pattern: str) -> None:
    """Law: whatever a pattern is, there is one short `TargetError`, after little time and memory."""
    with pytest.raises(TargetError) as caught:
        chosen(Net(), pattern)
    assert repr(pattern[:9])[:-1] in str(caught.value)
    assert len(str(caught.value)) < 400


@given(st.text("ab.*?[]!-^\\&|~", max_size=12), paths)
def test_globs_match_as_the_standard_library_does(pattern: str, path: str) -> None:
    """Law: the limit on time changes no result."""
    assert matches(pattern + "*", path) == fnmatch.fnmatchcase(path, pattern + "*")


def test_exact_patterns_match_their_path_alone_and_use_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter of another program may have a rank of its own at each of hundreds of targets."""
    monkeypatch.setattr(patterns._Allowance, "spend", lambda *args: pytest.fail("the time was used"))
    paths = [f"layers.{number}.q-proj [x]" for number in range(300)]
    table = {pattern: path for path, pattern in patterns.exact_patterns(paths).items()}
    assert [patterns.lookup(table, path, "") for path in paths] == paths
    assert [
        patterns.lookup(table, path, "") for path in ("a.layers.0.q-proj [x]", "layers", "layersX0.q-proj [x]")
    ] == [
        "",
        "",
        "",
    ]
