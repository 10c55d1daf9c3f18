"""Tables of patterns: which values match, compared with PEFT's rule, and patterns of our own for exact paths."""

import re
from pathlib import Path

import pytest

from tunerkit import patterns
from tunerkit_diffusers.peft_patterns import PatternTable, own_patterns

PATHS = ("to_q", "a.to_q", "down_blocks.0.attn1.to_q", "down_blocks.10.attn1.to_q", "x0.attn1.to_q", "a.b-c")
KEYS = (
    "to_q",
    "^to_q",
    r"^a\.to_q",
    "0.attn1.to_q",
    r"blocks\.\d+\..*q",
    "attn1",
    ".*",
    "a.b-c",
    r"^a\.b\-c",
    "(to|b)_q",
)


@pytest.mark.parametrize("path", PATHS)
def test_the_values_are_those_of_all_keys_that_peft_would_match(path: str) -> None:
    """PEFT takes the first key in its order; JSON keeps no order, so all of them are needed."""
    table = {key: float(number) for number, key in enumerate(KEYS)}
    expected = {value for key, value in table.items() if re.match(rf"(.*\.)?({key})$", path)}
    assert PatternTable.of(table, Path("file")).all_at(path) == expected


def test_own_patterns_match_their_path_alone() -> None:
    """Also where a path is the end of another one, or looks like a pattern."""
    paths = dict.fromkeys((*PATHS, "b[0]", "re:x", "a.re:x"))
    for path, pattern in own_patterns(paths).items():
        assert [each for each in paths if patterns.matches(pattern, each)] == [path]
    assert own_patterns(paths)["a.b-c"] == "a.b-c"
