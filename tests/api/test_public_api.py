"""The public names: where users and authors find them, that none is removed, and that no parameter changes."""

import importlib
import inspect
import json
import pydoc
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tunerkit
from tunerkit import extras, patterns, plugin
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin

ROOT = Path(__file__).parents[2]
SNAPSHOT = ROOT / "tests" / "fixtures" / "public_api.json"
# What users call, by DESIGN.md, section 3: these stay where they are.
CONTRACT = {
    *("wrap", "attach", "tuner", "save", "load", "merge", "unmerge", "unwrap", "disabled", "methods", "structure"),
    *("unstructure", "register", "export", "calibrate", "activate", "reference", "param_groups", "grow_"),
    *("from_folder", "save_state", "TunerkitWarning"),
}
# What this release has beyond the snapshot, which was taken at commit 9d060d1; that of `DOORS`, when they were made.
ADDED = frozenset(
    {
        "tunerkit.AdapterConfig.for_model(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD model)",
        "tunerkit.BaseLayer.forwards",
        "tunerkit.Factors.triplets(POSITIONAL_OR_KEYWORD self)",
        "tunerkit.autocast_off(POSITIONAL_OR_KEYWORD device)",
        "tunerkit.Method.foreign",
        "tunerkit.Method.multiplies",
        "tunerkit.add_delta(POSITIONAL_OR_KEYWORD base, POSITIONAL_OR_KEYWORD x, POSITIONAL_OR_KEYWORD y, "
        "POSITIONAL_OR_KEYWORD delta, KEYWORD_ONLY dropout = 0.0)",
        "tunerkit.fit_start_(POSITIONAL_OR_KEYWORD tuner, POSITIONAL_OR_KEYWORD measure)",
        "tunerkit.Holding(KEYWORD_ONLY name = 'an engine', KEYWORD_ONLY way_out = 'load the model without it', "
        "KEYWORD_ONLY one_dtype = '', KEYWORD_ONLY offloads = function, KEYWORD_ONLY load = "
        "builtin_function_or_method, KEYWORD_ONLY device = function, KEYWORD_ONLY forward = function, "
        "KEYWORD_ONLY identity = function, KEYWORD_ONLY duplicate = function, KEYWORD_ONLY shards = function, "
        "KEYWORD_ONLY shape = attrgetter, KEYWORD_ONLY part = function, KEYWORD_ONLY gathered = function, "
        "KEYWORD_ONLY reshard_ = function, KEYWORD_ONLY lent = function, KEYWORD_ONLY outside = function)",
        *(f"tunerkit.Holding.{name}" for name in ("name", "way_out", "one_dtype", "offloads", "load", "device")),
        *(f"tunerkit.Holding.{name}" for name in ("forward", "identity", "duplicate", "shards", "shape", "part")),
        *(f"tunerkit.Holding.{name}" for name in ("gathered", "reshard_", "lent", "outside")),
        "tunerkit.Restriction(POSITIONAL_OR_KEYWORD name, POSITIONAL_OR_KEYWORD refused, "
        "POSITIONAL_OR_KEYWORD classes = (), POSITIONAL_OR_KEYWORD marks = _Nothing, "
        "POSITIONAL_OR_KEYWORD error = None)",
        *(f"tunerkit.Restriction.{name}" for name in ("name", "refused", "classes", "marks", "error")),
        "tunerkit.ModelLibrary(KEYWORD_ONLY heads = function, KEYWORD_ONLY new = function, "
        "KEYWORD_ONLY settings = function, KEYWORD_ONLY tied_flags = function, "
        "KEYWORD_ONLY resize_hint = function)",
        *(f"tunerkit.ModelLibrary.{name}" for name in ("heads", "new", "settings", "tied_flags")),
        "tunerkit.ModelLibrary.resize_hint",
        "tunerkit.NewModules(POSITIONAL_OR_KEYWORD loader, POSITIONAL_OR_KEYWORD whole = (), "
        "POSITIONAL_OR_KEYWORD partly = (), POSITIONAL_OR_KEYWORD heads = (), POSITIONAL_OR_KEYWORD replaced = ())",
        *(f"tunerkit.NewModules.{name}" for name in ("loader", "whole", "partly", "heads", "replaced")),
        "tunerkit.errors.warn(POSITIONAL_OR_KEYWORD text)",
        "tunerkit.Engine.agree_(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD tensors, POSITIONAL_OR_KEYWORD what)",
        "tunerkit.Engine.before_step_(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD optimizer)",
        "tunerkit.Engine.begin_(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD adapters, "
        "POSITIONAL_OR_KEYWORD optimizer)",
        "tunerkit.Engine.fixed_shapes",
        "tunerkit.Engine.gives_pieces",
        "tunerkit.Engine.is_shared",
        "tunerkit.Engine.is_writer",
        "tunerkit.Engine.name",
        "tunerkit.Engine.no_sync(POSITIONAL_OR_KEYWORD self)",
        "tunerkit.Engine.pieces(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD parameters)",
        "tunerkit.Engine.reshard_(POSITIONAL_OR_KEYWORD self)",
        "tunerkit.Engine.resized_(POSITIONAL_OR_KEYWORD self)",
        "tunerkit.Engine.splits",
        "tunerkit.Engine.whole(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD slots, KEYWORD_ONLY gradients)",
        "tunerkit.Engine.withholds",
        "tunerkit.Engine.write_once(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD place, "
        "POSITIONAL_OR_KEYWORD content, POSITIONAL_OR_KEYWORD write)",
        "tunerkit.whole_pieces(POSITIONAL_OR_KEYWORD parameters)",
        "tunerkit.errors.error_text(POSITIONAL_OR_KEYWORD error)",
        "tunerkit.errors.is_of_user(POSITIONAL_OR_KEYWORD error)",
        *(f"tunerkit.{what}_of(POSITIONAL_OR_KEYWORD tuner)" for what in ("factors", "copies", "biases")),
        "tunerkit.Tuner.agree_(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD tensors, POSITIONAL_OR_KEYWORD what)",
        "tunerkit.Tuner.engine",
        "tunerkit.Method.pieces",
        "tunerkit.Pieces(POSITIONAL_OR_KEYWORD values, POSITIONAL_OR_KEYWORD grads, POSITIONAL_OR_KEYWORD starts)",
        "tunerkit.Pieces.are_cut",
        "tunerkit.Pieces.cut(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD tensors)",
        "tunerkit.Pieces.grads",
        "tunerkit.Pieces.joined(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD tensors, POSITIONAL_OR_KEYWORD what)",
        "tunerkit.Pieces.starts",
        "tunerkit.Pieces.sum_(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD tensors, POSITIONAL_OR_KEYWORD what)",
        "tunerkit.Pieces.values",
        "tunerkit.Tuner.groups(POSITIONAL_OR_KEYWORD self)",
        "tunerkit.Tuner.pieces(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD parameters)",
        "tunerkit.Tuner.whole(POSITIONAL_OR_KEYWORD self, KEYWORD_ONLY gradients = False)",
        "tunerkit.no_sync(POSITIONAL_OR_KEYWORD model)",
        "tunerkit.patterns.is_exact(POSITIONAL_OR_KEYWORD pattern)",
        "tunerkit.Description(POSITIONAL_OR_KEYWORD method, KEYWORD_ONLY base = '', "
        "KEYWORD_ONLY model_class = '', KEYWORD_ONLY labels = 0, KEYWORD_ONLY ranks = _Nothing, "
        "KEYWORD_ONLY copies = (), KEYWORD_ONLY settings = _Nothing)",
        "tunerkit.Description.base",
        "tunerkit.Description.copies",
        "tunerkit.Description.labels",
        "tunerkit.Description.method",
        "tunerkit.Description.model_class",
        "tunerkit.Description.ranks",
        "tunerkit.Description.settings",
        "tunerkit.Foreign(POSITIONAL_OR_KEYWORD factors, POSITIONAL_OR_KEYWORD method = 'lora', "
        "KEYWORD_ONLY config = _Nothing, KEYWORD_ONLY tensors = _Nothing, KEYWORD_ONLY shared = _Nothing, "
        "KEYWORD_ONLY copies = _Nothing, KEYWORD_ONLY biases = _Nothing, KEYWORD_ONLY base = '', "
        "KEYWORD_ONLY remarks = ())",
        "tunerkit.Foreign.base",
        "tunerkit.Foreign.biases",
        "tunerkit.Foreign.config",
        "tunerkit.Foreign.copies",
        "tunerkit.Foreign.factors",
        "tunerkit.Foreign.method",
        "tunerkit.Foreign.remarks",
        "tunerkit.Foreign.shared",
        "tunerkit.method_record(POSITIONAL_OR_KEYWORD name)",
        "tunerkit.Foreign.tensors",
        "tunerkit.Format(POSITIONAL_OR_KEYWORD name, POSITIONAL_OR_KEYWORD sniff, "
        "POSITIONAL_OR_KEYWORD read, POSITIONAL_OR_KEYWORD write, POSITIONAL_OR_KEYWORD options = type, "
        "POSITIONAL_OR_KEYWORD describe = None, POSITIONAL_OR_KEYWORD config = function)",
        "tunerkit.Format.config",
        "tunerkit.Format.describe",
        "tunerkit.Format.name",
        "tunerkit.Format.options",
        "tunerkit.Format.read",
        "tunerkit.Format.sniff",
        "tunerkit.Format.write",
        "tunerkit.export(POSITIONAL_OR_KEYWORD model, POSITIONAL_OR_KEYWORD path, "
        "POSITIONAL_OR_KEYWORD format = 'peft', POSITIONAL_OR_KEYWORD adapter = None, VAR_KEYWORD options)",
        "tunerkit.DefaultTargets(POSITIONAL_OR_KEYWORD model_types, POSITIONAL_OR_KEYWORD names)",
        "tunerkit.DefaultTargets.model_types",
        "tunerkit.DefaultTargets.names",
        "tunerkit.WeightReader(POSITIONAL_OR_KEYWORD owner, POSITIONAL_OR_KEYWORD children)",
        "tunerkit.WeightReader.children",
        "tunerkit.WeightReader.owner",
        "tunerkit.AdapterConfig.dropout",
        "tunerkit.AdapterConfig.total_steps",
        "tunerkit.Tuner.progress",
        "tunerkit.reference(POSITIONAL_OR_KEYWORD model)",
        "tunerkit.TunerkitError(VAR_POSITIONAL arguments)",
        "tunerkit.TunerkitWarning(VAR_POSITIONAL arguments)",
        "tunerkit.errors.TunerkitError(VAR_POSITIONAL arguments)",
        "tunerkit.errors.TunerkitWarning(VAR_POSITIONAL arguments)",
        "tunerkit.errors.bounded(POSITIONAL_OR_KEYWORD text)",
        "tunerkit.errors.cut(POSITIONAL_OR_KEYWORD text, POSITIONAL_OR_KEYWORD width = 1000)",
        "tunerkit.errors.first(POSITIONAL_OR_KEYWORD lines, POSITIONAL_OR_KEYWORD shown = 20)",
        "tunerkit.errors.half_character(POSITIONAL_OR_KEYWORD text)",
        "tunerkit.errors.shown(POSITIONAL_OR_KEYWORD value)",
        "tunerkit.Adapter()",
        "tunerkit.Adapter.has_shared",
        "tunerkit.Adapter.rank_dims",
        "tunerkit.Adapter.reads_output",
        "tunerkit.Adapter.reads_weight",
        "tunerkit.Adapter.share(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD module)",
        "tunerkit.Adapter.shared",
        "tunerkit.BaseLayer.bias(POSITIONAL_OR_KEYWORD self)",
        "tunerkit.BaseLayer.has_weight",
        "tunerkit.BaseLayer.merged(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD delta)",
        "tunerkit.BaseLayer.tensor(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD name)",
        "tunerkit.Factors.p",
        "tunerkit.Factors.q",
        "tunerkit.Factors.rank",
        "tunerkit.Growth(POSITIONAL_OR_KEYWORD parameter, POSITIONAL_OR_KEYWORD dim, POSITIONAL_OR_KEYWORD values)",
        "tunerkit.Growth.dim",
        "tunerkit.Growth.parameter",
        "tunerkit.Growth.values",
        "tunerkit.Method.start",
        "tunerkit.Method.statistics",
        "tunerkit.Method.targets",
        "tunerkit.ParamGroup(POSITIONAL_OR_KEYWORD parameters, POSITIONAL_OR_KEYWORD lr_scale = "
        "1.0, POSITIONAL_OR_KEYWORD weight_decay = None)",
        "tunerkit.ParamGroup.lr_scale",
        "tunerkit.ParamGroup.parameters",
        "tunerkit.ParamGroup.weight_decay",
        "tunerkit.Statistics(POSITIONAL_OR_KEYWORD rows, POSITIONAL_OR_KEYWORD inputs, "
        "POSITIONAL_OR_KEYWORD gradients, POSITIONAL_OR_KEYWORD centred = None, "
        "POSITIONAL_OR_KEYWORD variance = 0.0)",
        "tunerkit.Statistics.centred",
        "tunerkit.Statistics.variance",
        "tunerkit.Statistics.gradients",
        "tunerkit.Statistics.inputs",
        "tunerkit.Statistics.rows",
        "tunerkit.StatisticsRequest(POSITIONAL_OR_KEYWORD inputs = 0, POSITIONAL_OR_KEYWORD gradients = 0)",
        "tunerkit.StatisticsRequest.gradients",
        "tunerkit.StatisticsRequest.inputs",
        "tunerkit.Tuner.named_parameters(POSITIONAL_OR_KEYWORD self)",
        "tunerkit.grow_(POSITIONAL_OR_KEYWORD growths, POSITIONAL_OR_KEYWORD optimizer)",
        "tunerkit.low_rank_factors(POSITIONAL_OR_KEYWORD q, POSITIONAL_OR_KEYWORD p, KEYWORD_ONLY "
        "scale, KEYWORD_ONLY lam = None)",
        "tunerkit.param_groups(POSITIONAL_OR_KEYWORD model, KEYWORD_ONLY lr, KEYWORD_ONLY weight_decay = None)",
        "tunerkit.patterns.exact_patterns(POSITIONAL_OR_KEYWORD paths)",
        "tunerkit.resize_obstacle(POSITIONAL_OR_KEYWORD parameters, POSITIONAL_OR_KEYWORD optimizer)",
        "tunerkit.patterns.at_paths(POSITIONAL_OR_KEYWORD config, POSITIONAL_OR_KEYWORD paths, "
        "KEYWORD_ONLY of_file = False)",
        "tunerkit.patterns.file_matchers(POSITIONAL_OR_KEYWORD expressions)",
        "tunerkit.BaseLayer.normalised(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD x)",
        "tunerkit.BaseLayer.obstacle(POSITIONAL_OR_KEYWORD self)",
        "tunerkit.BaseLayer.packing",
        "tunerkit.BaseLayer.put_(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD stored)",
        "tunerkit.BaseLayer.rounded(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD before, "
        "POSITIONAL_OR_KEYWORD delta, POSITIONAL_OR_KEYWORD others)",
        "tunerkit.BaseLayer.unpacked(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD weight)",
        "tunerkit.Packing(POSITIONAL_OR_KEYWORD name, POSITIONAL_OR_KEYWORD bits)",
        "tunerkit.Packing.bits",
        "tunerkit.Packing.name",
        "tunerkit.Rounding(POSITIONAL_OR_KEYWORD stored_as, POSITIONAL_OR_KEYWORD bits, "
        "POSITIONAL_OR_KEYWORD added, POSITIONAL_OR_KEYWORD own, POSITIONAL_OR_KEYWORD change)",
        "tunerkit.Rounding.added",
        "tunerkit.Rounding.bits",
        "tunerkit.Rounding.change",
        "tunerkit.Rounding.own",
        "tunerkit.Rounding.stored_as",
        "tunerkit.forward_name(POSITIONAL_OR_KEYWORD module)",
        "tunerkit.rounding(POSITIONAL_OR_KEYWORD model)",
        "tunerkit.from_folder(POSITIONAL_OR_KEYWORD path, POSITIONAL_OR_KEYWORD base = None)",
    }
)
# What functions of the snapshot have gained: parameters at the end, by keyword and with a default.
GAINED = {
    "tunerkit.Method": ", KEYWORD_ONLY start = 'exact', KEYWORD_ONLY targets = 'weights', "
    "KEYWORD_ONLY multiplies = False, KEYWORD_ONLY statistics = None, KEYWORD_ONLY pieces = False, "
    "KEYWORD_ONLY foreign = _Nothing",
    "tunerkit.attach": ", KEYWORD_ONLY data_parallel = None",
    "tunerkit.load": ", KEYWORD_ONLY check_config = True",
    "tunerkit.save": ", KEYWORD_ONLY allow_nonfinite = False",
    "tunerkit.setting": ", KEYWORD_ONLY aka = ()",
    "tunerkit.unwrap": ", KEYWORD_ONLY dtype = None",
}
# What core alone used: a tuner is made by `tunerkit.wrap` and `tunerkit.load`, and its bookkeeping lies in the model.
REMOVED = frozenset(
    {
        *(f"tunerkit.Tuner.{name}" for name in ("fingerprint", "frozen", "turn", "loaded")),
        *(f"tunerkit.Tuner.{name}(POSITIONAL_OR_KEYWORD self)" for name in ("modules", "slots", "training_state")),
        "tunerkit.Tuner.record(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD ranks)",
    }
)
MODULES = ("tunerkit.errors", "tunerkit.patterns")
# The names of `tunerkit.plugin` that core brings itself.
AUTHORS = [name for name in vars(plugin)["__all__"] if f"plugin.{name}" not in extras.VERBS]
DOORS = ("tunerkit.plugin.engines", "tunerkit.plugin.trainers")


def parameters(function: object) -> Iterator[str]:
    """Each parameter as ``kind name = default``; annotations may be spelt otherwise."""
    if callable(function):
        for parameter in inspect.signature(function).parameters.values():
            default = "" if parameter.default is parameter.empty else f" = {_constant(parameter.default)}"
            yield f"{parameter.kind.name} {parameter.name}{default}"


def _constant(value: object) -> str:
    # The repr of an object names its address.
    return repr(value) if isinstance(value, str | int | float | tuple | None) else type(value).__name__


def described(name: str, found: object) -> Iterator[str]:
    """``name(parameters)`` for a function; for a class its constructor, methods, properties and fields as well."""
    if not inspect.isclass(found):
        yield f"{name}({', '.join(parameters(found))})"
        return
    if "__init__" in vars(found):
        yield f"{name}({', '.join(parameters(found))})"
    fields = [field.name for field in getattr(found, "__attrs_attrs__", ())]
    for attribute in sorted({*vars(found), *fields}):
        if not attribute.startswith("_"):
            member = inspect.getattr_static(found, attribute, None)
            member = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            arguments = f"({', '.join(parameters(member))})" if inspect.isfunction(member) else ""
            yield f"{name}.{attribute}{arguments}"


def users() -> list[str]:
    """The names of ``tunerkit``, with the verbs of other distributions that are installed."""
    return list(getattr(tunerkit, "__all__"))  # noqa: B009 - the stub has none


def names_of_users() -> dict[str, object]:
    return {name: getattr(tunerkit, name) for name in users() if name not in extras.VERBS}


def names_of_authors() -> dict[str, object]:
    """Those of ``tunerkit.plugin``, without the functions on patterns, which have a module of their own."""
    names = [name for name in AUTHORS if name not in vars(patterns)]
    return {name: getattr(plugin, name) for name in names}


def behind_doors() -> Iterator[str]:
    """The functions for engines and trainers with their parameters; classes by name, since core makes the objects."""
    for module in map(importlib.import_module, DOORS):
        for name in vars(module)["__all__"]:
            found = getattr(module, name)
            arguments = "" if inspect.isclass(found) else f"({', '.join(parameters(found))})"
            yield f"{module.__name__}.{name}{arguments}"


def public_api() -> list[str]:
    """All public functions and classes, one per line, wherever they are imported from."""
    named = [(f"tunerkit.{name}", found) for name, found in {**names_of_authors(), **names_of_users()}.items()]
    for module in map(importlib.import_module, MODULES):
        for name, found in vars(module).items():
            if not name.startswith("_") and getattr(found, "__module__", None) == module.__name__:
                named.append((f"{module.__name__}.{name}", found))
    return sorted([*(line for name, found in named for line in described(name, found)), *behind_doors()])


def without_gains(line: str) -> str:
    """The line as it was in the snapshot."""
    gained = GAINED.get(line.partition("(")[0], "")
    return f"{line.removesuffix(f'{gained})')})" if gained else line


def test_no_public_name_is_gone_and_no_parameter_changed() -> None:
    """Everything in the snapshot still exists with the same parameters; new names are listed here."""
    snapshot, found = (
        # A tuner is a handle that nobody builds, so its constructor is not public.
        {line for line in lines if not line.startswith("tunerkit.Tuner(")}
        for lines in (json.loads(SNAPSHOT.read_text(encoding="utf-8")), map(without_gains, public_api()))
    )
    assert sorted(snapshot - found) == sorted(REMOVED)
    assert sorted(found - snapshot) == sorted(ADDED)


def test_what_authors_import_stands_in_one_module() -> None:
    """``tunerkit.plugin`` has what a plugin needs, and the functions on patterns; a verb of users it does not have."""
    names = vars(plugin)["__all__"]
    found = {name: getattr(plugin, name) for name in AUTHORS}
    assert len(found) == len(AUTHORS)
    assert [name for name in dir(plugin) if not name.startswith("__")] == sorted(names)
    assert plugin.lookup({"q_proj": 1}, "layers.0.q_proj", default=2) == 1
    with pytest.raises(AttributeError, match=r"'tunerkit\.plugin' has no attribute 'wrap'"):
        getattr(plugin, "wrap")  # noqa: B009 - a type checker sees it


@pytest.mark.parametrize("door", DOORS)
def test_a_door_has_few_names_each_with_its_words(door: str) -> None:
    """At most 36, none of them in ``tunerkit.plugin`` or ``tunerkit`` too, and each has a docstring."""
    module = importlib.import_module(door)
    names = set(vars(module)["__all__"])
    assert len(names) <= 36
    assert names.isdisjoint({*vars(plugin)["__all__"], *users()})
    assert all(inspect.getdoc(getattr(module, name)) for name in names)


def test_users_find_few_names_and_authors_the_others() -> None:
    """``tunerkit`` has at most 35 names: all of the contract's; every other one is an author's. ``dir`` shows them."""
    names = users()
    assert len(names) == len(set(names)) <= 35
    assert {*names, *extras.VERBS} >= CONTRACT
    assert [name for name in dir(tunerkit) if not name.startswith("__")] == sorted([*names, "errors", "plugin"])
    listed = re.findall(r"(\w+) as \1\b", (ROOT / "tunerkit" / "__init__.pyi").read_text(encoding="utf-8"))
    assert set(listed) - {*names, "errors", "patterns"} <= set(vars(plugin)["__all__"])


def test_names_of_users_come_without_a_warning() -> None:
    """The verbs, the modules, and the marker, which authors of pluggy's world look for at the top."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names_of_users()["wrap"] is tunerkit.wrap
        assert tunerkit.hookimpl is plugin.hookimpl
        assert tunerkit.errors.TunerkitError is tunerkit.TunerkitError
        assert tunerkit.patterns is patterns


@pytest.mark.parametrize(("name", "home"), [("Adapter", "tunerkit.plugin"), ("ConfigError", "tunerkit.errors")])
def test_an_old_name_warns_once_at_each_use_and_names_the_new_import(name: str, home: str) -> None:
    """It is the same object; the warning is at the line that uses the old name, however it is written."""
    line = f"write: from {home} import {name}$"
    for use in (f"from tunerkit import {name}", f"import tunerkit; {name} = tunerkit.{name}"):
        found: dict[str, object] = {}
        with pytest.warns(DeprecationWarning, match=line) as told:
            exec(compile(use, "a_users_file.py", "exec"), found)
        assert [each.filename for each in told] == ["a_users_file.py"]
        assert found[name] is getattr(importlib.import_module(home), name)


def test_our_own_code_uses_no_old_name() -> None:
    """Core, plugins, tests, examples, benchmarks, templates and pages: none shows what will be removed."""
    old = set(vars(plugin)["__all__"]) - set(users()) - {"hookimpl"}
    files = [f for end in ("py", "md", "txt", "ipynb") for part in PARTS for f in (ROOT / part).rglob(f"*.{end}")]
    assert len(files) > 500
    found = {str(f.relative_to(ROOT)): old_names(f.read_text(encoding="utf-8"), old) for f in files}
    on_purpose = {"tests/api/test_public_api.py", "tests/repository/test_architecture.py"}  # names in samples
    assert {name for name, names in found.items() if names} == on_purpose


PARTS = ("tunerkit", "plugins", "tests", "docs", "examples", "benchmarks", "scripts")


def old_names(text: str, old: set[str]) -> set[str]:
    """The names in ``old`` that a text takes from ``tunerkit`` itself, as attributes or by an import."""
    names = set(re.findall(r"(?<![\w.])tunerkit\.(\w+)", text))
    for imported in re.findall(r"from tunerkit import \(?([\w, \n]+)", text):
        names.update(re.findall(r"\w+", imported))
    return names & old


@pytest.mark.parametrize(
    "text", ["x = tunerkit.Adapter", "from tunerkit import wrap, Adapter", "from tunerkit import (\n    Adapter,\n)"]
)
def test_an_old_name_is_found_however_it_is_used(text: str) -> None:
    """As an attribute and in an import of one or many lines; not where it comes from its new home."""
    assert old_names(text, {"Adapter"}) == {"Adapter"}
    new = text.replace("tunerkit.A", "tunerkit.plugin.A").replace("tunerkit import", "tunerkit.plugin import")
    assert old_names(new, {"Adapter"}) == set()


def test_help_begins_with_five_verbs_and_an_example(tmp_path: Path) -> None:
    """The first lines of ``help(tunerkit)`` name what one calls, with an example; and all of it is under 800 lines."""
    lines = pydoc.plain(pydoc.render_doc(tunerkit)).splitlines()
    assert len(lines) < 800
    start = "\n".join(lines[:32])
    assert re.findall(r"^ {8}(\w+)\(.*\) {2,}\w", start, re.MULTILINE) == ["wrap", "attach", "save", "load", "merge"]
    pytest.importorskip("tunerkit_lora", reason="the example wraps a model with LoRA")
    example = re.search(r"^( {8}import torch.*?)^ {4}\S", start, re.MULTILINE | re.DOTALL)
    assert example is not None
    run = [sys.executable, "-W", "error::DeprecationWarning", "-c", textwrap.dedent(example[1])]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "step 10 of 10" in done.stdout
    assert (tmp_path / "out" / "adapter.safetensors").is_file()


def test_a_marker_is_imported_without_torch() -> None:
    """A module with commands is imported for ``tunerkit --help``."""
    code = "import sys; from tunerkit.plugin import hookimpl; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_tuner_is_a_small_handle() -> None:
    """At most 23 public names, and a text of at most ten lines, also with many targets and settings."""
    model = torch.nn.ModuleDict({f"layer{i}": torch.nn.Linear(2, 2) for i in range(40)})
    with registered(LowRankPlugin()):
        settings = {"targets": ["layer?"], "train_modules": ["layer39"], "bias": "all"}
        tuner = tunerkit.tuner(tunerkit.wrap(model, "toy-low-rank", settings))
        assert len([name for name in dir(tuner) if not name.startswith("_")]) <= 23
        lines = repr(tuner).splitlines()
    assert len(lines) <= 10
    assert lines[0] == "tuner of adapter 'default' in a ModuleDict"
