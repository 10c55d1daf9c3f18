"""How many small mistakes the tests find: ``python -m benchmarks.mutations CLONE COVERAGE``, in an hour or two.

Draws mutations of core and AdaLoRA by a seed: another comparison, another constant, a statement dropped. Each is
written into a clean clone, and the tests that run its line, the most specific ones first, have 60 seconds of CPU to
fail. What runs a line is read from a coverage file, which pytest-cov (not among tunerkit's requirements) writes::

    python -m pytest tests plugins/adalora plugins/lora --cov=tunerkit --cov=tunerkit_adalora --cov-context=test

Lines that run only while a module is imported are tried with the tests that run any other line of their file.
``--folder`` draws from other sources, such as ``plugins/cli/tunerkit_cli``.
"""

import argparse
import ast
import contextlib
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

SEED, COUNT, SECONDS, MOST_TESTS = 58, 120, 60, 400
FOLDERS = ("tunerkit", "plugins/adalora/tunerkit_adalora")
_OTHER: Mapping[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
_DROPPED = (ast.Expr, ast.Assign, ast.AugAssign, ast.Raise, ast.Delete)


@attrs.frozen
class Mutation:
    """A part of a file, by its lines and columns in bytes, and what replaces it."""

    kind: str
    file: str
    line: int
    column: int
    end_line: int
    end_column: int
    text: str

    def applied(self, source: str) -> str:
        """Return the file's text with the mutation."""
        lines = source.encode().splitlines(keepends=True)
        before, after = lines[self.line - 1][: self.column], lines[self.end_line - 1][self.end_column :]
        middle = before + self.text.encode() + after
        return b"".join([*lines[: self.line - 1], middle, *lines[self.end_line :]]).decode()


def mutations(file: str, source: str) -> Iterator[Mutation]:
    """Yield the mutations of a file. Annotations, docstrings and other texts stay."""
    tree = ast.parse(source)
    fixed: set[ast.AST] = set()
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if (found := getattr(node, name, None)) is not None:
                fixed.update(ast.walk(found))
    for node in ast.walk(tree):
        if node in fixed:
            continue
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = node.left, node.comparators[0]
            text = f"({ast.unparse(left)}) {_OTHER[type(node.ops[0])]} ({ast.unparse(right)})"
            yield _mutation("comparison", file, node, text)
        elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
            other = not node.value if isinstance(node.value, bool) else node.value + 1
            yield _mutation("constant", file, node, repr(other))
        elif isinstance(node, _DROPPED) and not isinstance(getattr(node, "value", None), ast.Constant):
            yield _mutation("statement", file, node, "pass")


def _mutation(kind: str, file: str, node: Any, text: str) -> Mutation:
    return Mutation(kind, file, node.lineno, node.col_offset, node.end_lineno, node.end_col_offset, text)


def drawn(root: Path, folders: Sequence[str]) -> list[Mutation]:
    """Draw as many mutations of each kind from all files."""
    files = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    found = [each for path in files for each in mutations(path.relative_to(root).as_posix(), path.read_text("utf-8"))]
    generator, kinds = random.Random(SEED), ("comparison", "constant", "statement")
    return [
        each
        for kind in kinds
        for each in generator.sample([one for one in found if one.kind == kind], COUNT // len(kinds))
    ]


class Tests:
    """Which tests run which lines."""

    def __init__(self, root: Path, coverage_file: Path) -> None:
        import coverage  # here: no requirement of the project

        self.root, self.data = root, coverage.CoverageData(str(coverage_file))
        self.data.read()
        self.lines = {file: self.data.contexts_by_lineno(file) for file in self.data.measured_files()}
        # What a test runs in all: the more, the less it says about one line, and the longer it takes.
        self.sizes = Counter(
            context for by_line in self.lines.values() for contexts in by_line.values() for context in contexts
        )

    def of(self, mutation: Mutation) -> list[str]:
        """Return the node ids of the tests for a mutation, the most specific first."""
        by_line = self.lines.get(str(self.root / mutation.file), {})
        found = {each for line in range(mutation.line, mutation.end_line + 1) for each in by_line.get(line, [])}
        if not any(found):
            found = set(itertools.chain.from_iterable(by_line.values()))
        ordered = sorted(filter(None, found), key=lambda context: (self.sizes[context], context))
        return list(dict.fromkeys(context.rpartition("|")[0] for context in ordered))[:MOST_TESTS]


def outcome(root: Path, tests: Sequence[str]) -> str:
    """Run the tests until one fails: caught, survived, or undecided after `SECONDS` of CPU."""
    if not tests:
        return "survived"
    with tempfile.TemporaryDirectory() as folder:
        arguments = Path(folder) / "tests"
        arguments.write_text("\n".join(tests))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--basetemp", f"{folder}/temp"]
        path = os.pathsep.join(map(str, [root, *(root / "plugins").iterdir()]))
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        process = subprocess.Popen(
            [*command, f"@{arguments}"],
            cwd=root,
            env={**os.environ, **threads, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5)),
        )
        try:
            code = process.wait(SECONDS * 5)
        except subprocess.TimeoutExpired:  # it waits for another process
            code = -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return "survived" if code == 0 else "undecided" if code < 0 else "caught"


def main() -> None:
    """Print one line for each mutation, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="a clean clone, into whose files the mutations are written in turn")
    parser.add_argument("coverage", type=Path, help="the coverage file, written in that clone")
    parser.add_argument("--folder", action="append", help="sources to draw from; may be repeated")
    arguments = parser.parse_args()
    root = arguments.clone.resolve()
    tests, counts = Tests(root, arguments.coverage), Counter[str]()
    for number, mutation in enumerate(drawn(root, arguments.folder or FOLDERS), 1):
        path = root / mutation.file
        source = path.read_text("utf-8")
        of_line = tests.of(mutation)
        try:
            path.write_text(mutation.applied(source), "utf-8")
            found = outcome(root, of_line)
        finally:
            path.write_text(source, "utf-8")
        counts[found] += 1
        place = f"{mutation.file}:{mutation.line}:{mutation.column}"
        print(f"{number} {found} {mutation.kind} {place} -> {mutation.text!r}, {len(of_line)} tests", flush=True)
    print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())))


if __name__ == "__main__":
    main()
