"""The limits of the core, and what measures them."""

import ast
from pathlib import Path

from scripts.structure import Source, above, called_once, check, measured


def test_the_core_is_within_its_limits_and_the_changelog_gives_their_reason() -> None:
    """Law: what `make check` compares is right in every commit."""
    assert check() == []


def test_one_more_than_a_limit_is_found() -> None:
    """And a measurement that has no limit; one below its limit is not."""
    assert above({"files": 3, "lines": 9, "rooms": 1}, {"files": 2, "lines": 10}) == [
        "files: 3, and the limit is 2",
        "rooms: 1, and the limit is missing",
    ]


def test_what_is_measured_is_what_stands_in_the_files(tmp_path: Path) -> None:
    """Rooms are packages and modules, arrows every import between them, lazy and typing-only ones too."""
    package = tmp_path / "small"
    (package / "low").mkdir(parents=True)
    (package / "__init__.py").write_text("from small.low import a\n")
    (package / "low" / "__init__.py").write_text('"""Low."""\n\na = 1\n')
    (package / "high.py").write_text("def f(x):\n    from small.low import a\n\n    return getattr(x, a)\n")
    found = measured(package)
    assert found["files"] == 3
    assert (found["lines"], found["lines of code"]) == (8, 5)
    assert (found["rooms"], found["arrows"], found["cycles"]) == (2, 1, 0)
    assert found["getattr and hasattr"] == 1
    (package / "low" / "back.py").write_text("import small.high\n")
    assert measured(package)["cycles"] == 1


def test_a_private_function_that_one_place_uses_is_found() -> None:
    """Not one that two use, nor a public one; its own definition is no use."""
    text = "def _one(): ...\ndef _two(): ...\ndef three(): ...\n_one(); _two(); _two(); three()"
    assert called_once(Source("m", ast.parse(text))) == ["m._one"]
