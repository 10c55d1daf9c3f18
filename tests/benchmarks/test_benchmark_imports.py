"""The imports of the benchmarks, read from their sources."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = sorted(ROOT.glob("benchmarks/**/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))


def imported(text: str) -> set[str]:
    """Every module that is imported, and every name taken from one, with its module's name before it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(module), names=names):
                found |= {module, *(f"{module}.{alias.name}" for alias in names)}
    return found


def imports(package: str, text: str) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for name in imported(text))


def test_the_benchmarks_and_their_tests_do_not_use_the_command() -> None:
    """The command's training may change; committed rows stay reproducible as long as the benchmarks' does not."""
    texts = {file: file.read_text(encoding="utf-8") for file in (*BENCHMARKS, *TESTS)}
    ours = [file for file, text in texts.items() if file in BENCHMARKS or imports("benchmarks", text)]
    assert len(ours) > len(BENCHMARKS) > 0
    drawing = "tunerkit_cli.report"  # it draws what was measured, and trains nothing
    assert [file for file in ours if imports("tunerkit_cli", texts[file].replace(drawing, "drawing"))] == []
