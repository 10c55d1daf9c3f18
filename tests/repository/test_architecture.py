"""The import graph and the separation of plugins, checked against DESIGN's rules by reading the source."""

import ast
import importlib.util
import re
import sys
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from scripts.structure import (
    Graph,
    Source,
    Sources,
    belongs,
    by_package,
    cycle,
    defining_imports,
    imported,
    imported_names,
    is_private,
    mutable_state,
    node_of,
    private_attributes,
    private_names,
    read,
)

ROOT = Path(__file__).parents[2]
CORE = "tunerkit"
PACKAGES = {CORE: ROOT / CORE, **{path.name: path for path in sorted(ROOT.glob("plugins/*/tunerkit_*"))}}
TEST_FILES = sorted([*ROOT.glob("tests/**/test_*.py"), *ROOT.glob("plugins/*/tests/**/test_*.py")])
PLUGGY = frozenset({"pluggy", "tunerkit.hooks.specs", "tunerkit.hooks.registry"})
MARKERS = frozenset({"hookimpl", "hookspec"})
# The only core files that may use a library's private names; the engines have one of their own.
PRIVATE = {"torch": f"{CORE}.layers.torch_private", "transformers": "tunerkit_transformers.transformers_private"}
# State that lives as long as the process, each entry with its reason.
_OF_GROUPS = "tunerkit_distributed"
PROCESS_STATE = {
    *(f"{CORE}.hooks.registry.registry", f"{CORE}.layers.weights.plugins"),
    # Of the process group.
    *(f"{_OF_GROUPS}.averaging._engines", f"{_OF_GROUPS}.group._written", f"{_OF_GROUPS}.writing._counts"),
    *(f"{_OF_GROUPS}.barrier._host_groups", f"{_OF_GROUPS}.barrier._opened", f"{_OF_GROUPS}.agreement._begun"),
}
FOR_PLUGINS = frozenset({"__init__", "errors", "plugin"})
# For plugins of engines and of trainers: names of the packages above, and no code.
DOORS = (f"{CORE}.plugin.engines", f"{CORE}.plugin.trainers")
# The plugins that take nothing else; the command and what extends it are built on more.
OUTSIDE = [
    f"tunerkit_{name}"
    for name in (
        "lora",
        "adalora",
        "peft",
        "gguf",
        "diffusers",
        "quant",
        "transformers",
        "distributed",
        "experts",
        "verbs",
    )
]
LIBRARIES = frozenset(
    {"transformers", "accelerate", "timm", "diffusers", "torchvision", "peft", "trl", "bitsandbytes", "deepspeed"}
    | {"lightning", "pytorch_lightning", "torchao", "torchaudio", "sentence_transformers", "huggingface_hub"}
)
NAMES_OF_LIBRARIES = ("extras",)  # the part of core where these may stand
# Distributions that bring no method and no kind of layer: the command, what extends it alone, and verbs.
TOOLS = ("tunerkit_cli", "tunerkit_serving", "tunerkit_testing", "tunerkit_verbs")
# Each file is a method, and a plugin: hooks and arithmetic in less than a page.
EACH = ("tunerkit_methods",)
# The command trains with transformers, so it is built on that plugin.
BUILT_ON = {"tunerkit_cli": "tunerkit_transformers"}
ARITHMETIC_MODULES = frozenset({"cmath", "math", "numpy", "operator", "statistics"})
ARITHMETIC_BUILTINS = frozenset({"abs", "divmod", "pow", "round", "sum"})

# The layout (DESIGN.md, section 6). Every import, lazy and typing-only ones included, goes to an earlier row, and
# packages in one row never import each other.
ROWS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("extras", "paths", "records"),
    ("patterns", "config"),
    ("layers",),
    ("hooks", "targets"),
    ("injection",),
    ("steps",),
    ("serialization",),
    ("api",),
    ("__init__",),
    ("plugin", "__main__", "testing"),  # for authors; what `python -m tunerkit` runs; the old name of a distribution
)


def sample(**texts: str) -> Sources:
    """Modules written in a test; ``a__b`` stands for ``a.b``, and a name without dots is a package."""
    named = {name.replace("__", "."): text for name, text in texts.items()}
    return {name: Source(name, ast.parse(text), is_package="." not in name) for name, text in named.items()}


def graph_of(sources: Sources) -> Graph:
    return {name: defining_imports(source, sources) for name, source in sources.items()}


def reached(graph: Graph, start: str) -> set[str]:
    """All modules that importing ``start`` imports, without ``start``."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph.get(waiting.pop(), frozenset()) - found
        found |= new
        waiting += new
    return found


def upward(sources: Sources, rows: tuple[tuple[str, ...], ...]) -> list[str]:
    """Imports that go to a later row or to another package of the same row, and packages without a row."""
    row_of = {name: number for number, row in enumerate(rows) for name in row}
    graph = by_package(sources)
    problems = [f"{node} stands in no row" for node in graph if node not in row_of]
    for node, others in graph.items():
        problems += [
            f"{node} imports {other}" for other in sorted(others) if row_of.get(other, len(rows)) >= row_of.get(node, 0)
        ]
    return problems


def past_packages(sources: Sources, package: str) -> list[str]:
    """Imports of a file inside one of the packages of ``package`` by code outside that package."""
    return [
        f"{name} imports {module}"
        for name, source in sources.items()
        for module in sorted(imported(source, sources, deep=True))
        if module.startswith(f"{package}.") and module.count(".") > 1 and not _shares_package(name, module)
        if module not in DOORS
    ]


def _shares_package(name: str, module: str) -> bool:
    return name.split(".")[:2] == module.split(".")[:2]


def library_names(source: Source) -> list[str]:
    """Strings without blanks that name a part of another library, as ``"line 3: 'transformers.trainer'"``."""
    shown = {id(text) for text in docstrings(source.tree)}
    texts = [n for n in ast.walk(source.tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [
        f"line {text.lineno}: {text.value!r}"
        for text in texts
        if id(text) not in shown and " " not in str(text.value) and LIBRARIES & {*re.split(r"\W+", str(text.value))}
    ]


def docstrings(tree: ast.Module) -> Iterator[ast.expr]:
    """The docstrings of modules, classes and functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from (first.value for first in node.body[:1] if isinstance(first, ast.Expr))


def foreign_imports(sources: Sources, package: str, others: Iterable[str]) -> list[str]:
    """Imports of ``others`` anywhere in ``package``, also in functions and for type checkers."""
    wanted = [other for other in others if other != package]
    return [
        f"{name} imports {module}"
        for name, source in sources.items()
        if belongs(name, [package])
        for module in sorted(defining_imports(source, sources, deep=True))
        if belongs(module, wanted)
    ]


def torch_attributes() -> frozenset[str]:
    """Every private name of torch's modules, tensors and optimizers, by which torch itself calls it."""
    modules = (
        nn.Conv1d(1, 1, 1),
        nn.InstanceNorm1d(1),
        nn.MultiheadAttention(2, 1),
        nn.parallel.DistributedDataParallel,
    )
    things = (*modules, torch.zeros(1), torch.optim.SGD([torch.zeros(1)]), torch, torch._C, nn.modules.module)
    return frozenset(name for thing in things for name in dir(thing) if is_private(name))


def private_of(library: str, source: Source, attributes: Collection[str]) -> list[str]:
    """The private names of ``library`` that a module uses: imported, below an import, or on any object."""
    own = [name for name in private_attributes(source) if name in attributes or belongs(name, [library])]
    return [*private_names(source, library), *own]


def adapter_modules(sources: Sources) -> list[str]:
    """The modules that define an adapter: a class derived from one named ``Adapter``, or that class itself."""
    classes = [(n, node) for n, s in sources.items() for node in ast.walk(s.tree) if isinstance(node, ast.ClassDef)]
    return sorted(
        {
            name
            for name, node in classes
            if node.name == "Adapter" or any(ast.unparse(base).rpartition(".")[2] == "Adapter" for base in node.bases)
        }
    )


def arithmetic(tree: ast.Module) -> list[str]:
    """Where a module computes: ``"line 3: a + b"``. Type unions and string formatting are no arithmetic."""
    spared = {id(part) for annotation in annotations(tree) for part in ast.walk(annotation)}
    nodes = [node for node in ast.walk(tree) if id(node) not in spared and computes(node)]
    return [f"line {getattr(node, 'lineno', 0)}: {ast.unparse(node)}" for node in nodes]


def annotations(tree: ast.Module) -> Iterator[ast.expr]:
    """Annotations, and what `isinstance` is asked about: ``|`` is a type union there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            yield node.returns
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.annotation
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            yield from node.args[1:]


def computes(node: ast.AST) -> bool:
    match node:
        case ast.BinOp(left=left, op=ast.Add() | ast.Mod(), right=right):
            return not (is_text(left) or is_text(right))
        case ast.BinOp() | ast.AugAssign():
            return True
        case ast.UnaryOp(op=ast.USub() | ast.Invert(), operand=operand):
            return not isinstance(operand, ast.Constant)
        case ast.Call(func=ast.Name(id=name)):
            return name in ARITHMETIC_BUILTINS
        case ast.Import(names=names):
            return any(belongs(alias.name, ARITHMETIC_MODULES) for alias in names)
        case ast.ImportFrom(module=str(module), level=0):
            return belongs(module, ARITHMETIC_MODULES)
    return False


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def requirement_names(requirements: Iterable[str]) -> frozenset[str]:
    names = (re.split(r"[^A-Za-z0-9_-]", requirement, maxsplit=1)[0] for requirement in requirements)
    return frozenset(name.replace("-", "_") for name in names)


def undeclared(sources: Sources, declared: frozenset[str]) -> list[str]:
    """Modules that core's plain part imports although its distribution doesn't declare them."""
    allowed = declared | sys.stdlib_module_names | {CORE}
    return [
        f"{name} imports {module}"
        for name, source in sources.items()
        if belongs(name, [CORE])
        for module in sorted(defining_imports(source, sources))
        if module.partition(".")[0] not in allowed
    ]


def without_docstring(tree: ast.Module) -> list[str]:
    """The tests without a docstring, also in classes."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [node.name for node in functions if node.name.startswith("test_") and not ast.get_docstring(node)]


@pytest.fixture(scope="module")
def sources() -> Sources:
    return {source.name: source for package, folder in PACKAGES.items() for source in read(package, folder)}


# --- The laws ---------------------------------------------------------------------------------------------------------


def test_the_modules_that_the_rules_are_about_exist(sources: Sources) -> None:
    """The laws below apply to core's modules and to each plugin's ``plugin`` module."""
    assert f"{CORE}.hooks.registry" in sources
    assert all(f"{package}.plugin" in sources for package in PACKAGES if package not in (CORE, *TOOLS, *EACH))
    assert {"tunerkit_lora.adapter", "tunerkit_adalora.svd_layer"} < set(adapter_modules(sources))


def test_no_import_leads_back_to_where_it_came_from(sources: Sources) -> None:
    """The import graph of core and all plugins has no cycle at module level."""
    assert cycle(graph_of(sources)) == []


def test_every_import_of_core_goes_to_an_earlier_row(sources: Sources) -> None:
    """The layout is a stack: lower modules never import higher ones, not even lazily or for types."""
    core = {name: source for name, source in sources.items() if belongs(name, [CORE])}
    assert upward(core, ROWS) == []


def test_files_inside_a_package_import_each_other_without_cycles(sources: Sources) -> None:
    """Lazy and typing-only imports count here too."""
    graph = {name: defining_imports(source, sources, deep=True) for name, source in sources.items()}
    packages = {node_of(name) for name in sources if belongs(name, [CORE])}
    for package in packages:
        inside = {name for name in sources if belongs(name, [f"{CORE}.{package}"])}
        files = {name: graph[name] & inside - {name} for name in inside if not sources[name].is_package}
        assert cycle(files) == []


def test_code_outside_a_package_imports_from_the_package(sources: Sources) -> None:
    """A package's ``__init__`` is its interface: its files can be split and renamed freely."""
    # It swaps a part of the fused product for another, to compare them.
    measured = {"benchmarks.speed.alternatives"}
    benchmarks = {s.name: s for s in read("benchmarks", ROOT / "benchmarks") if s.name not in measured}
    assert past_packages({**sources, **benchmarks}, CORE) == []


def test_core_imports_no_plugin(sources: Sources) -> None:
    """No core module imports a plugin's package, not even inside a function."""
    assert foreign_imports(sources, CORE, PACKAGES) == []


@pytest.mark.parametrize("package", [package for package in PACKAGES if package != CORE])
def test_plugins_do_not_import_each_other(sources: Sources, package: str) -> None:
    """A plugin imports the core and its own modules; one that extends the command also what that offers for it."""
    found = foreign_imports(sources, package, [each for each in PACKAGES if each not in (CORE, BUILT_ON.get(package))])
    assert [line for line in found if not line.endswith(".commands imports tunerkit_cli.plugin")] == []


@pytest.mark.parametrize("folder", ["benchmarks", "tests/benchmarks"])
def test_the_benchmarks_and_their_tests_do_not_use_the_command(sources: Sources, folder: str) -> None:
    """The command's training may change; committed rows stay reproducible as long as the benchmarks' does not."""
    name = folder.replace("/", ".")
    own = {source.name: source for source in read(name, ROOT / folder)}
    assert own
    found = foreign_imports({**sources, **own}, name, ["tunerkit_cli"])
    # Their subjects; and what draws or reckons, and trains nothing.
    subjects = ("benchmarks.whole imports ", "benchmarks.verdicts imports ")
    spared = (*subjects, " imports tunerkit_cli.report", " imports tunerkit_cli.sweeping.statistics")
    assert [line for line in found if not any(each in line for each in spared)] == []


@pytest.mark.parametrize("package", OUTSIDE)
def test_plugins_need_what_is_meant_for_them_alone(sources: Sources, package: str) -> None:
    """Nothing deeper than `tunerkit`, `tunerkit.errors` and `tunerkit.plugin`: all else may change between releases."""
    own = [source for name, source in sources.items() if belongs(name, [package])]
    found = {node_of(m) for source in own for m in imported(source, sources, deep=True) if belongs(m, [CORE])}
    assert found <= FOR_PLUGINS


@pytest.mark.parametrize("door", DOORS)
def test_a_door_for_plugins_only_names_what_core_has(sources: Sources, door: str) -> None:
    """Imports from packages of core, and the list of all these names: what a plugin uses is tested where it is."""
    _, *statements = sources[door].tree.body  # the docstring is the first
    imports = [each for each in statements if isinstance(each, ast.ImportFrom)]
    lists = [each for each in statements if not isinstance(each, ast.ImportFrom)]
    assert all(ast.unparse(each).startswith("__all__ ") for each in lists)
    named = [str(each.value) for part in lists for each in ast.walk(part) if isinstance(each, ast.Constant)]
    assert sorted(named) == sorted(alias.name for each in imports for alias in each.names)


def test_core_imports_at_module_level_only_what_its_distribution_asks_for(sources: Sources) -> None:
    """``import tunerkit`` works with the plain dependencies installed: only optional parts need extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert undeclared(sources, requirement_names(project["dependencies"])) == []


def test_plugin_modules_hold_no_arithmetic(sources: Sources) -> None:
    """A ``plugin`` module only maps hooks to functions, and computes nothing itself."""
    found = {name: arithmetic(source.tree) for name, source in sources.items() if name.endswith(".plugin")}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_only_plugin_modules_of_a_plugin_know_pluggy(sources: Sources) -> None:
    """The arithmetic of a method can be read, tested and used without the plugin machinery."""
    plugins = [n for n in sources if not belongs(n, [CORE, *TOOLS, *EACH]) and not n.endswith((".plugin", ".commands"))]
    offenders = {name: defining_imports(sources[name], sources, deep=True) & PLUGGY for name in plugins}
    assert {name: found for name, found in offenders.items() if found} == {}
    marking = {n: {name for _, name in imported_names(sources[n], deep=True)} & MARKERS for n in plugins}
    assert {name: found for name, found in marking.items() if found} == {}


def test_only_the_registry_and_what_it_is_made_of_import_pluggy(sources: Sources) -> None:
    """All other core modules call plugins through the registry."""
    users = {n for n, s in sources.items() if belongs(n, [CORE]) and "pluggy" in imported(s, sources, deep=True)}
    within_hooks = {f"{CORE}.hooks.{name}" for name in ("loading", "registry", "specs")}
    assert users == {CORE, *within_hooks}


def test_adapters_never_import_the_registry(sources: Sources) -> None:
    """Importing an adapter's module never imports the registry, directly or indirectly, unless it is a plugin too."""
    graph = graph_of(sources)
    adapters = [name for name in adapter_modules(sources) if not belongs(name, [*EACH, "tunerkit_verbs"])]
    assert [name for name in adapters if f"{CORE}.hooks.registry" in reached(graph, name)] == []


def test_private_names_of_torch_stand_in_one_file(sources: Sources) -> None:
    """A new release of torch then affects one file; the testing kit and the command are checked too."""
    ours = [CORE, *TOOLS, "tunerkit_distributed"]
    allowed = (PRIVATE["torch"], *(f"tunerkit_{name}.torch_private" for name in ("distributed", "verbs")))
    core = {name: source for name, source in sources.items() if belongs(name, ours) and name not in allowed}
    attributes = torch_attributes() | set(private_attributes(sources[PRIVATE["torch"]]))
    found = {name: private_of("torch", source, attributes) for name, source in core.items()}
    assert {name: touched for name, touched in found.items() if touched} == {}


def test_private_names_of_transformers_stand_in_one_file(sources: Sources) -> None:
    """Names of its Trainer and its models; without transformers installed, the names that the file itself lists."""
    attributes = set(private_attributes(sources[PRIVATE["transformers"]]))
    if importlib.util.find_spec("transformers") is not None:
        import transformers

        kinds = (transformers.Trainer, transformers.PreTrainedModel, transformers.PreTrainedConfig)
        attributes |= {name for kind in kinds for name in dir(kind) if is_private(name)} - torch_attributes()
    ours, allowed = [CORE, *TOOLS, "tunerkit_transformers"], (*PRIVATE.values(), "tunerkit_verbs.torch_private")
    core = {name: s for name, s in sources.items() if belongs(name, ours) and name not in allowed}
    found = {name: private_of("transformers", source, attributes) for name, source in core.items()}
    assert {name: touched for name, touched in found.items() if touched} == {}
    assert "transformers" not in imported(sources[PRIVATE["transformers"]], sources, deep=True)


def test_what_lives_as_long_as_the_process_is_listed(sources: Sources) -> None:
    """All other state belongs to a model, an optimizer or a call, so two of them never interfere."""
    core = [source for name, source in sources.items() if belongs(name, [CORE, _OF_GROUPS, "tunerkit_transformers"])]
    assert {name for source in core for name in mutable_state(source)} == PROCESS_STATE


def test_names_of_other_libraries_stand_in_one_table(sources: Sources) -> None:
    """Facts about another library come from the plugin that knows it; messages without it, from one table."""
    parts = [f"{CORE}.{part}" for part in NAMES_OF_LIBRARIES]
    found = {n: library_names(s) for n, s in sources.items() if belongs(n, [CORE]) and not belongs(n, parts)}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert any(library_names(source) for name, source in sources.items() if belongs(name, parts[:1]))


@pytest.mark.parametrize("file", TEST_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_test_states_its_law(file: Path) -> None:
    """A test without a docstring doesn't say what it requires of the code."""
    assert without_docstring(ast.parse(file.read_text(encoding="utf-8"))) == []


# --- The checkers bite ------------------------------------------------------------------------------------------------

ROWS_OF_A_SAMPLE = (("low", "beside"), ("high",), ("__init__",))
SAMPLE = {
    "tunerkit": "from tunerkit.high import thing",
    "tunerkit.beside": "",
    "tunerkit.high": "from tunerkit.high.file import thing",
    "tunerkit.high.file": "from tunerkit.low import thing",
    "tunerkit.low": "",
    "tunerkit.low.file": "",
}
REGISTERED = {
    "tunerkit": "from tunerkit.adapter import Adapter\nfrom .registry import register\nfrom . import wrap",
    "tunerkit__adapter": "class Adapter: ...",
    "tunerkit__registry": "def register(): ...",
    "tunerkit__wrap": "from tunerkit import registry",
}


def planted(file: str, text: str) -> Sources:
    """A small core with a text in one of its files."""
    texts = {**SAMPLE, "tunerkit.plugin": "", "tunerkit.plugin.engines": "", file: text}
    return {name: Source(name, ast.parse(text), is_package=name.count(".") < 2) for name, text in texts.items()}


def upward_in(text: str) -> list[str]:
    sources = planted("tunerkit.low.file", text)
    return upward({name: source for name, source in sources.items() if ".plugin" not in name}, ROWS_OF_A_SAMPLE)


def registry_behind(text: str) -> list[str]:
    """The adapters of a sample that come to import the registry."""
    found = sample(**REGISTERED, p="", p__adapter=text + "\nclass Mine(Adapter): ...")
    return [name for name in adapter_modules(found) if "tunerkit.registry" in reached(graph_of(found), name)]


# What each checker finds in a text.
CHECKERS: dict[str, Callable[[str], Collection[str]]] = {
    "cycle": lambda text: cycle(graph_of(sample(a="", a__b="import a.c", a__c=text))),
    "upward": upward_in,
    "past packages": lambda text: past_packages(planted("tunerkit.high", text), CORE),
    "another package": lambda text: foreign_imports(sample(a="", a__b=text), "a", ["a", "other"]),
    "undeclared": lambda text: undeclared(sample(tunerkit="", tunerkit__wrap=text), requirement_names(["torch>=2.9"])),
    "library": lambda text: library_names(Source("core", ast.parse(text))),
    "arithmetic": lambda text: arithmetic(ast.parse(text)),
    "registry": registry_behind,
    "no docstring": lambda text: without_docstring(ast.parse(text)),
    "private": lambda text: private_of("torch", sample(a__b=text)["a.b"], torch_attributes()),
    "state": lambda text: mutable_state(sample(a__b=text)["a.b"]),
}
LAZILY = "def f():\n    "
TYPED = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
FOUND: dict[str, tuple[str, ...]] = {
    "cycle": (
        *("import a.b", "from a.b import thing", "from .b import thing", "class C:\n    import a.b"),
        "try:\n    import a.b\nexcept ImportError:\n    pass",
    ),
    "upward": (
        *("from tunerkit.high import thing", "import tunerkit.high.file", "from ..high import thing"),
        *(LAZILY + "from tunerkit.high import thing", TYPED + "from tunerkit.high import thing"),
        *("from tunerkit import high", "from tunerkit.beside import thing", "import tunerkit"),
    ),
    "past packages": (
        *("from tunerkit.low.file import thing", LAZILY + "import tunerkit.low.file", "from tunerkit.low import file"),
    ),
    "another package": ("import other.x", LAZILY + "from other import x", "from other.x import y"),
    "undeclared": ("import yaml",),
    "library": (
        *("NAME = 'transformers.trainer.Trainer'", "f(f'accelerate.{name}')"),
        "def f(x):\n    return x.__module__.startswith('timm')",
    ),
    "arithmetic": (
        *("x = a + b", "x += 1", "x = p @ q", "x = a | b", "x = -a", "x = sum(a)", "import math"),
        *("from numpy import dot", "def f(x: int = 2 * 3): ...", "y = f(a // 2)"),
    ),
    "registry": (
        *("from tunerkit import Adapter, register", "from tunerkit.adapter import Adapter\nimport tunerkit.wrap"),
        *("from tunerkit import Adapter, wrap", "import tunerkit\nfrom tunerkit.adapter import Adapter"),
    ),
    "no docstring": ("class C:\n    def test_a(self): ...",),
    "private": (
        *("import torch\ntorch._C._is_tracing()", "from torch.nn.modules.conv import _ConvNd", "import torch._dynamo"),
        *("from torch.nn.modules import conv\nconv._ConvNd", LAZILY + "from torch import _dynamo as d\n    d.reset()"),
        *(
            "import importlib\nimportlib.import_module('torch._dynamo')",
            "def f(module):\n    return module._parameters",
        ),
        *("class C:\n    def f(self):\n        del self._modules['a']", "class C:\n    def _apply(self, fn): ..."),
        "def f(module):\n    return getattr(module, '_forward_hooks')",
    ),
    "state": (
        *("x = []", "x: dict[str, int] = {}", "_x = WeakSet()", "X = weakref.WeakKeyDictionary[str, int]()"),
        *("_watch = _Watch()", "registry = hooks.Registry()", "_LOCK = threading.Lock()", "_X = ContextVar('x')"),
        *("app = typer.Typer()", "x = 1\ndef f():\n    global x\n    x = 2"),
    ),
}


@pytest.mark.parametrize(("checker", "text"), [(name, text) for name, texts in FOUND.items() for text in texts])
def test_a_checker_finds_what_is_against_its_rule(checker: str, text: str) -> None:
    """However it is written: absolute or relative, in a function or a class, for types, behind other modules."""
    assert CHECKERS[checker](text)


def test_a_package_without_a_row_is_found() -> None:
    """A new package must be added to the table before it is used."""
    assert upward(sample(tunerkit="", tunerkit__new=""), (("__init__",),)) == ["new stands in no row"]
