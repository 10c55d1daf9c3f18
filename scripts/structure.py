"""Measure the structure of a Python package from its source: imports, size, attribute look-ups, mutable state.

    python scripts/structure.py              # measure this repository's core
    python scripts/structure.py --edges      # also list every import between packages
    python scripts/structure.py --check      # compare the core with scripts/limits.toml
    python scripts/structure.py path/to/tunerkit

Every import counts, including those inside functions and those for type checkers only. No code is imported or run.

A *room* is a package or a module directly under the measured package, and an *arrow* an import from one to another.
"""

import argparse
import ast
import graphlib
import io
import re
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

Graph = Mapping[str, frozenset[str]]

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "tunerkit"
LIMITS = ROOT / "scripts" / "limits.toml"
SHORT = 40  # lines: a file below this is most often a part of another one
# Packages that build on the core. Their lines are counted separately.
OUTER = ("integrations",)
LOOK_UPS = ("getattr", "hasattr")
_CONTAINERS = ("dict", "list", "set", "bytearray", "defaultdict", "deque", "local")
_CHANGING = ("Lock", "RLock", "Condition", "Semaphore", "Event", "ContextVar")
# What a call of these makes never changes, or is no instance: a marker, a type, a view that nobody can write to.
_IMMUTABLE = ("Marker", "TypeVar", "ParamSpec", "NewType", "NamedTuple", "MappingProxyType", "Path", "Fraction")


@dataclass(frozen=True, eq=False)
class Source:
    """One module: its dotted name, its syntax tree, whether it is a package's ``__init__``, and its text."""

    name: str
    tree: ast.Module
    is_package: bool = False
    text: str = ""

    @property
    def package(self) -> str:
        """The package that relative imports start from."""
        return self.name if self.is_package else self.name.rpartition(".")[0]


Sources = Mapping[str, Source]


def read(package: str, folder: Path) -> Iterator[Source]:
    """Read every module below ``folder``, which is imported as ``package``.

    Imports in a stub beside a module are the module's own: a package that imports its names when they are used lists
    them there.
    """
    for file in sorted(folder.rglob("*.py")):
        parts = [package, *file.relative_to(folder).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        stub = file.with_suffix(".pyi")
        text = "\n".join(part.read_text(encoding="utf-8") for part in (file, stub) if part.exists())
        yield Source(".".join(parts[:-1] if is_package else parts), ast.parse(text), is_package, text)


# --- Imports ----------------------------------------------------------------------------------------------------------


def import_statements(tree: ast.Module, *, deep: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that run when the module is imported; with ``deep``, all of them."""
    for statement in ast.walk(tree) if deep else _run_at_import(tree.body):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield statement


def _run_at_import(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run at import: not those in functions or only for type checkers."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and ast.unparse(statement.test).endswith("TYPE_CHECKING"):
            yield from _run_at_import(statement.orelse)
            continue
        for block in ("body", "orelse", "finalbody"):
            yield from _run_at_import(getattr(statement, block, ()))
        for handler in getattr(statement, "handlers", ()):
            yield from _run_at_import(handler.body)


def imported_names(source: Source, *, deep: bool) -> Iterator[tuple[str, str]]:
    """Yield (module, name) for each import, ``("a.b", "")`` for ``import a.b``. Relative names become absolute."""
    for statement in import_statements(source.tree, deep=deep):
        if isinstance(statement, ast.Import):
            yield from ((alias.name, "") for alias in statement.names)
        else:
            yield from ((absolute(statement, source), alias.name) for alias in statement.names)


def absolute(statement: ast.ImportFrom, source: Source) -> str:
    """Return the absolute name of the module that a ``from … import`` imports from."""
    if not statement.level:
        return statement.module or ""
    parts = source.package.split(".")
    parts = parts[: len(parts) - statement.level + 1]
    return ".".join([*parts, statement.module] if statement.module else parts)


def imported(source: Source, sources: Sources, *, deep: bool = False) -> frozenset[str]:
    """Return the modules that ``source`` imports, as they are written: a package, or a file in it.

    If a package's ``__init__`` exports a name, the import counts as one of the package, even if a file has that name.
    """
    return frozenset(
        f"{module}.{name}" if f"{module}.{name}" in sources and not _offers(sources.get(module), name) else module
        for module, name in imported_names(source, deep=deep)
    )


def _offers(package: Source | None, name: str) -> bool:
    statements = () if package is None else import_statements(package.tree, deep=False)
    return any(
        name == (alias.asname or alias.name)
        for statement in statements
        if ast.unparse(statement).partition(" import ")[0] != "from ."  # its own modules, under their own names
        for alias in statement.names
    )


def defining(module: str, name: str, sources: Sources) -> str:
    """Return the module that defines ``name``, followed through the ``__init__`` of packages and through ``*``."""
    if f"{module}.{name}" in sources:
        return f"{module}.{name}"
    package = sources.get(module)
    if package is not None and package.is_package:
        for statement in package.tree.body:
            if isinstance(statement, ast.ImportFrom) and name in {a.asname or a.name for a in statement.names}:
                original = next(a.name for a in statement.names if (a.asname or a.name) == name)
                return defining(absolute(statement, package), original, sources)
    for star in [] if package is None else _stars(package):
        found = defining(star, name, sources)
        if found != star or name in {getattr(statement, "name", "") for statement in sources[star].tree.body}:
            return found
    return module


def _stars(source: Source) -> list[str]:
    """List the modules from which a module takes all names, as the stub of one that imports them lazily does."""
    statements = [statement for statement in source.tree.body if isinstance(statement, ast.ImportFrom)]
    return [absolute(statement, source) for statement in statements if statement.names[0].name == "*"]


def defining_imports(source: Source, sources: Sources, *, deep: bool = False) -> frozenset[str]:
    """Return the modules that ``source`` imports. A name from one of our packages counts as its defining file."""
    return frozenset(defining(module, name, sources) for module, name in imported_names(source, deep=deep))


def by_file(sources: Sources, *, deep: bool = True) -> Graph:
    """Return the import graph with files as nodes, followed through the packages' ``__init__``."""
    return {
        name: frozenset(m for m in defining_imports(source, sources, deep=deep) if m in sources and m != name)
        for name, source in sources.items()
        if not source.is_package or "." not in name
    }


def by_package(sources: Sources) -> Graph:
    """Return the import graph whose nodes are the packages and the root's files; ``__init__`` is the root's own."""
    graph: dict[str, set[str]] = {}
    for name, source in sources.items():
        node = node_of(name)
        edges = graph.setdefault(node, set())
        edges.update(node_of(module) for module in imported(source, sources, deep=True) if module in sources)
    return {node: frozenset(edges - {node}) for node, edges in graph.items()}


def node_of(module: str) -> str:
    """Return the package of the core that contains a module: ``steps`` for ``tunerkit.steps.driver``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def cycle(graph: Graph) -> list[str]:
    """Return the nodes of one import cycle, or an empty list."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def levels(graph: Graph) -> int:
    """Return the length of the longest chain of imports, in nodes. Edges that close a cycle are ignored."""
    done: dict[str, int] = {}
    on_the_way: set[str] = set()

    def depth(node: str) -> int:
        if node not in done:
            on_the_way.add(node)
            done[node] = 1 + max((depth(n) for n in graph.get(node, ()) if n not in on_the_way), default=0)
            on_the_way.discard(node)
        return done[node]

    return max(map(depth, graph), default=0)


# --- Size and habits --------------------------------------------------------------------------------------------------


def code_lines(source: Source) -> int:
    """Count lines of code, without blank lines, comments and docstrings."""
    shown = _docstring_lines(source.tree)
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - shown)


def _docstring_lines(tree: ast.Module) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return found


def functions(source: Source) -> Iterator[tuple[int, str]]:
    """Yield (lines, name) for every function; docstrings count."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1, f"{source.name}.{node.name}"


def look_ups(source: Source) -> list[str]:
    """List the calls of ``getattr`` and ``hasattr``: ``"tunerkit.x:12"``."""
    calls = (node for node in ast.walk(source.tree) if isinstance(node, ast.Call))
    return [f"{source.name}:{call.lineno}" for call in calls if ast.unparse(call.func) in LOOK_UPS]


def mutable_state(source: Source) -> list[str]:
    """List module-level names whose value can change: containers, instances, locks, and ``global`` names.

    ``Final`` and upper-case names are constants, unless what is bound can do nothing but change: a weak container, a
    lock, a context variable. Markers, type variables and what ``Final`` names are constants too.
    """
    changed = {name for node in ast.walk(source.tree) if isinstance(node, ast.Global) for name in node.names}
    found = []
    for statement in source.tree.body:
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
            continue
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        constant = isinstance(statement, ast.AnnAssign) and "Final" in ast.unparse(statement.annotation)
        if any(name in changed or _may_change(name, statement.value, constant=constant) for name in names):
            found.append(f"{source.name}.{', '.join(names)}")
    return found


def _may_change(name: str, value: ast.expr, *, constant: bool) -> bool:
    constant = constant or name.isupper() or name.startswith("__")
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return not constant
    if not isinstance(value, ast.Call):
        return False
    # ``weakref.WeakSet[Tuner]()`` is a call of a WeakSet.
    called = ast.unparse(value.func).partition("[")[0].rpartition(".")[2]
    if called.startswith("Weak") or called in _CHANGING:
        return True
    makes_instance = called in _CONTAINERS or called.lstrip("_")[:1].isupper()
    return makes_instance and not constant and not called.endswith(_IMMUTABLE)


# --- Private names ----------------------------------------------------------------------------------------------------


def private_names(source: Source, library: str) -> list[str]:
    """Private names of ``library`` that a module imports or looks up below one that it imports."""
    bound = {}
    for statement in import_statements(source.tree, deep=True):
        for alias in statement.names:
            origin = f"{statement.module}.{alias.name}" if isinstance(statement, ast.ImportFrom) else alias.name
            name = alias.asname or (alias.name if isinstance(statement, ast.ImportFrom) else alias.name.split(".")[0])
            bound[name] = origin if alias.asname or isinstance(statement, ast.ImportFrom) else name
    origins = [f"{m}.{n}" if n else m for m, n in imported_names(source, deep=True)]
    found = [origin for origin in origins if belongs(origin, [library]) and is_private(origin)]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if belongs(bound.get(root, ""), [library]) and is_private(rest):
                found.append(f"{bound[root]}.{rest}")
    return found


def private_attributes(source: Source) -> list[str]:
    """Names with an underscore that a module looks up on anything, overrides in a class, or writes as a string."""
    found: dict[str, None] = {}
    for node in ast.walk(source.tree):
        match node:
            case ast.Attribute(attr=name) if is_private(name):
                found[name] = None
            case ast.Constant(value=str(name)) if re.fullmatch(r"[\w.]+", name) and is_private(name):
                found[name] = None
            case ast.ClassDef(body=body):
                methods = (part.name for part in body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef))
                found.update(dict.fromkeys(filter(is_private, methods)))
    return list(found)


def is_private(path: str) -> bool:
    """Whether a part of a dotted path has one leading underscore."""
    return any(part.startswith("_") and not part.startswith("__") for part in path.split("."))


def belongs(module: str, packages: Iterable[str]) -> bool:
    """Whether a module is one of ``packages``, or lies in one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


# --- The report -------------------------------------------------------------------------------------------------------


def figures(graph: Graph) -> str:
    """``18 nodes, 12 levels, 69 edges, no cycle``."""
    found = cycle(graph)
    edges = sum(map(len, graph.values()))
    ends = f"a cycle: {' -> '.join(found)}" if found else "no cycle"
    return f"{len(graph)} nodes, {levels(graph)} levels, {edges} edges, {ends}"


def report(folder: Path, *, edges: bool) -> Iterator[str]:
    """Yield the lines that the command prints."""
    sources = {source.name: source for source in read(folder.name, folder)}
    packages = by_package(sources)
    yield f"imports by package: {figures(packages)}"
    yield f"imports by file:    {figures(by_file(sources))}"
    sizes = {name: code_lines(source) for name, source in sources.items()}
    core = sum(size for name, size in sizes.items() if node_of(name) not in OUTER)
    yield f"lines of code:      {core} in the core, {sum(sizes.values())} with {', '.join(OUTER)}"
    longest = sorted((f for s in sources.values() for f in functions(s)), reverse=True)[:3]
    yield f"longest functions:  {', '.join(f'{name} ({lines})' for lines, name in longest)}"
    found = [place for source in sources.values() for place in look_ups(source)]
    yield f"getattr, hasattr:   {len(found)}"
    state = [place for source in sources.values() for place in mutable_state(source)]
    yield f"mutable state:      {len(state)}: {', '.join(state)}"
    if edges:
        yield from (f"  {node} -> {', '.join(sorted(others)) or '-'}" for node, others in sorted(packages.items()))
        yield from (f"  {place}" for place in found)


# --- The limits -------------------------------------------------------------------------------------------------------


def called_once(source: Source) -> list[str]:
    """List the private functions of a module that one place in it uses, and no other."""
    own = [node.name for node in source.tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("_")]
    used = Counter(node.id for node in ast.walk(source.tree) if isinstance(node, ast.Name))
    return [f"{source.name}.{name}" for name in own if used[name] == 1]


def measured(folder: Path) -> dict[str, int]:
    """What `LIMITS` limits, by its names there."""
    sources = {source.name: source for source in read(folder.name, folder)}
    rooms = {node: others - {"__init__"} for node, others in by_package(sources).items() if node != "__init__"}
    lengths = [len(file.read_text(encoding="utf-8").splitlines()) for file in sorted(folder.rglob("*.py"))]
    return {
        "lines": sum(lengths),
        "lines of code": sum(map(code_lines, sources.values())),
        "files": len(lengths),
        f"files under {SHORT} lines": sum(length < SHORT for length in lengths),
        "rooms": len(rooms),
        "arrows": sum(map(len, rooms.values())),
        "cycles": int(bool(cycle(rooms))),
        "getattr and hasattr": sum(len(look_ups(source)) for source in sources.values()),
        "functions with one caller": sum(len(called_once(source)) for source in sources.values()),
    }


def above(found: Mapping[str, int], limits: Mapping[str, int]) -> list[str]:
    """Say which measurements are above their limit, or have none."""
    return [
        f"{name}: {count}, and the limit is {limits.get(name, 'missing')}"
        for name, count in found.items()
        if name not in limits or count > limits[name]
    ]


def check() -> list[str]:
    """Say what is wrong with the core's size; and with its limits, which change only with a reason in the CHANGELOG."""
    text = LIMITS.read_text(encoding="utf-8")
    limits: dict[str, int] = tomllib.loads(text)["core"]
    stated = f"Limits of the core: {', '.join(f'{count} {name}' for name, count in limits.items())}."
    told = " ".join((ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split())
    missing = [] if stated in told else [f"the CHANGELOG gives no reason for these limits; it must contain: {stated}"]
    return [*above(measured(CORE), limits), *missing]


def main() -> None:
    """Print the measurements of a folder, by default the core."""
    parser = argparse.ArgumentParser(description="Measure the structure of a package from its source.")
    parser.add_argument("folder", type=Path, nargs="?", default=CORE, help="the package's folder (default: the core)")
    parser.add_argument("--edges", action="store_true", help="also list the imports between packages")
    parser.add_argument("--check", action="store_true", help="compare the core with its limits")
    arguments = parser.parse_args()
    if arguments.check:
        found = check()
        print("\n".join([*(f"{name}: {count}" for name, count in measured(CORE).items()), *found]))
        sys.exit(int(bool(found)))
    print("\n".join(report(arguments.folder.resolve(), edges=arguments.edges)))


if __name__ == "__main__":
    main()
