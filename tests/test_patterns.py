"""Patterns for module paths: what each kind matches, compared with slow oracles, and how long they may take."""

import contextlib
import fnmatch
import re
import time

import pytest
from hypothesis import given, strategies as st

from tests.support.target_models import Net, chosen
from tunerkit import patterns
from tunerkit.errors import TargetError
from tunerkit.patterns import file_matchers, matches

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


@pytest.mark.parametrize(
    "pattern",
    ["re:(", "re:" + "(?:" * 450 + ")" * 450, "re:a{9999999999999999999999}", "re:(?L)(?u)"],
    ids=lambda pattern: pattern[:12],
)
def test_whatever_is_wrong_with_a_pattern_is_one_short_error(pattern: str) -> None:
    """With the parser's message; also what Python raises as RecursionError or OverflowError."""
    with pytest.raises(TargetError) as caught:
        chosen(Net(), pattern)
    assert repr(pattern[:9])[:-1] in str(caught.value)
    assert pattern != "re:(" or "'re:(' is not a regular expression: missing )" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_expressions_of_users_are_those_of_python() -> None:
    """Also what files may not have: references, flags and atomic groups."""
    assert matches(r"re:(a)\.\1", "a.a")
    assert matches("re:(?i)A", "a")
    assert matches("re:(?>a+)b", "aab")


@given(st.text("ab.*?[]!-^\\&|~", max_size=12), paths)
def test_globs_match_as_the_standard_library_does(pattern: str, path: str) -> None:
    """Law: whatever brackets it has."""
    assert matches(pattern + "*", path) == fnmatch.fnmatchcase(path, pattern + "*")


def test_exact_patterns_match_their_path_alone_and_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter of another program may have a rank of its own at each of hundreds of targets."""
    monkeypatch.setattr(re, "compile", lambda *args: pytest.fail("an exact pattern was compiled"))
    paths = [f"layers.{number}.q-proj [x]" for number in range(300)]
    table = {pattern: path for path, pattern in patterns.exact_patterns(paths).items()}
    assert [patterns.lookup(table, path, "") for path in paths] == paths
    others = ("a.layers.0.q-proj [x]", "layers", "layersX0.q-proj [x]")
    assert [patterns.lookup(table, path, "") for path in others] == ["", "", ""]


# --- Expressions in files ---------------------------------------------------------------------------------------------

atoms = st.sampled_from(
    ["a", "b", ".", r"\.", "0", "[ab]", "[^a.]", r"[\d.b-z]", r"\d", r"\W", r"\b", "^", "$", "(?=a)"]
)
repeats = st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{2,}", "{0}"])
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda both: f"({both[0]}|{both[1]})"),
        st.tuples(inner, repeats).map(lambda both: f"(?:{both[0]}){both[1]}"),
    ),
    max_leaves=8,
)


@given(expressions, st.text("ab0.", max_size=6))
def test_an_expression_in_a_file_matches_as_python_s_would(expression: str, path: str) -> None:
    """Law: without compiling it as a whole, every part that is supported gives the result of `re`."""
    assert file_matchers([expression])[expression](path) == (re.fullmatch(expression, path) is not None)


@pytest.mark.parametrize(
    "expression", [r"(a)\1", "(?i)a", "(?i:a)", "(?>a)", "a++", "(?<=a)b", "(", "a" * 1001, "(?:" * 450]
)
def test_what_an_expression_in_a_file_may_not_have_is_refused(expression: str) -> None:
    """Law: before anything is matched, whether the part would be reached or not."""
    with pytest.raises(TargetError):
        file_matchers([f"b{expression}"])


@pytest.mark.parametrize(
    "expression", ["(a|aa|a)+c", "(((((((((a*)*)*)*)*)*)*)*)*)*c", "a{9}" + "{9}" * 9, "(?:" * 25 + "a" + "+)" * 25]
)
def test_an_expression_in_a_file_takes_bounded_time(expression: str) -> None:
    """Law: it gives a result, or an error, and does not go back and forth for hours."""
    start = time.process_time()
    with contextlib.suppress(TargetError):
        assert not file_matchers([expression])[expression]("a" * 60 + "b")
    assert time.process_time() - start < 20


def test_the_expressions_of_a_table_share_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a file with many expressions takes no longer than one with a slow one."""
    monkeypatch.setattr(patterns, "_STEPS", 2000)
    with pytest.raises(TargetError, match="too many steps"):
        file_matchers([f"(a|aa)*{number}" for number in range(100)])
    monkeypatch.setattr(patterns, "_STEPS", 14000)
    matchers = file_matchers([f"(a|aa)*{number}" for number in range(100)])
    with pytest.raises(TargetError, match="too many steps"):
        assert not any([matches("a" * 20) for matches in matchers.values()])


def test_the_tables_of_a_file_share_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: neither many tables, nor many patterns for many paths, take longer than one slow expression."""
    paths = [f"layers.{number}" for number in range(50)]
    slow = {"re:(.|..)*x": 1}
    monkeypatch.setattr(patterns, "_STEPS", 40_000)
    assert patterns.at_paths({"a": slow}, paths, of_file=True) == {"a": {}}
    many = {f"table {number}": slow for number in range(20)}
    wide = {"re:x.": 1, **{f"name {number}": 1 for number in range(200)}}
    for config in (many, {"a": wide}):
        with pytest.raises(TargetError, match="too many steps"):
            patterns.at_paths(config, paths, of_file=True)
        patterns.at_paths(config, paths)  # a user's own may take as long as they take


def test_many_sets_beyond_latin_1_take_bounded_time_too() -> None:
    """Law: compiling one takes much longer than matching it, and counts."""
    sets = "".join(f"[{chr(0x100 + number)}-{chr(0x3000 + number)}a]" for number in range(160))
    start = time.process_time()
    with pytest.raises(TargetError, match="too many steps"):
        file_matchers([f"{number:03}{sets}" for number in range(1000)])
    assert time.process_time() - start < 20
    assert file_matchers(["[a-\u3000]+"])["[a-\u3000]+"]("a\u00e9\u2030")


@pytest.mark.parametrize("expression", ["q(?=(?i:_))_proj", "q(?=_(?<!x)p)_proj"])
def test_what_is_not_supported_inside_a_lookahead_is_refused_before_anything_is_matched(expression: str) -> None:
    """It is visited even where no path leads to it."""
    with pytest.raises(TargetError, match="not supported in files"):
        file_matchers([expression])
