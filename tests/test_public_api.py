"""The public names: none is removed, and no parameter changes."""

import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import tunerkit

SNAPSHOT = Path(__file__).parent / "fixtures" / "public_api.json"
# What this release has beyond the snapshot, which was taken at commit 9d060d1.
ADDED = frozenset(
    {
        "tunerkit.Sharding(POSITIONAL_OR_KEYWORD is_cut, POSITIONAL_OR_KEYWORD part, "
        "POSITIONAL_OR_KEYWORD gathered, POSITIONAL_OR_KEYWORD reshard_)",
        "tunerkit.errors.warn(POSITIONAL_OR_KEYWORD text)",
        *(f"tunerkit.Sharding.{name}" for name in ("gathered", "is_cut", "part", "reshard_")),
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
        "tunerkit.Tuner.as_hooks_see_it(POSITIONAL_OR_KEYWORD self, KEYWORD_ONLY gradients = False)",
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
        "KEYWORD_ONLY config = _Nothing, KEYWORD_ONLY tensors = _Nothing, KEYWORD_ONLY copies = _Nothing, "
        "KEYWORD_ONLY biases = _Nothing, KEYWORD_ONLY base = '', KEYWORD_ONLY remarks = ())",
        "tunerkit.Foreign.base",
        "tunerkit.Foreign.biases",
        "tunerkit.Foreign.config",
        "tunerkit.Foreign.copies",
        "tunerkit.Foreign.factors",
        "tunerkit.Foreign.method",
        "tunerkit.Foreign.remarks",
        "tunerkit.Foreign.tensors",
        "tunerkit.Format(POSITIONAL_OR_KEYWORD name, POSITIONAL_OR_KEYWORD sniff, "
        "POSITIONAL_OR_KEYWORD read, POSITIONAL_OR_KEYWORD write, POSITIONAL_OR_KEYWORD options = type, "
        "POSITIONAL_OR_KEYWORD describe = None)",
        "tunerkit.Format.describe",
        "tunerkit.Format.name",
        "tunerkit.Format.options",
        "tunerkit.Format.read",
        "tunerkit.Format.sniff",
        "tunerkit.Format.write",
        "tunerkit.Tuner.copied(POSITIONAL_OR_KEYWORD self)",
        "tunerkit.Tuner.factors(POSITIONAL_OR_KEYWORD self)",
        "tunerkit.Tuner.trained_biases(POSITIONAL_OR_KEYWORD self)",
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
        "tunerkit.Tuner.is_active",
        "tunerkit.Tuner.needs_steps",
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
        "tunerkit.BaseLayer.example_input(POSITIONAL_OR_KEYWORD self)",
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
        "POSITIONAL_OR_KEYWORD gradients)",
        "tunerkit.Statistics.gradients",
        "tunerkit.Statistics.inputs",
        "tunerkit.Statistics.rows",
        "tunerkit.StatisticsRequest(POSITIONAL_OR_KEYWORD inputs = 0, POSITIONAL_OR_KEYWORD gradients = 0)",
        "tunerkit.StatisticsRequest.gradients",
        "tunerkit.StatisticsRequest.inputs",
        "tunerkit.Tuner.named_parameters(POSITIONAL_OR_KEYWORD self)",
        "tunerkit.Tuner.shared",
        "tunerkit.calibrate(POSITIONAL_OR_KEYWORD model, POSITIONAL_OR_KEYWORD batches, "
        "POSITIONAL_OR_KEYWORD adapter = None, KEYWORD_ONLY loss = None)",
        "tunerkit.grow_(POSITIONAL_OR_KEYWORD growths, POSITIONAL_OR_KEYWORD optimizer)",
        "tunerkit.low_rank_factors(POSITIONAL_OR_KEYWORD q, POSITIONAL_OR_KEYWORD p, KEYWORD_ONLY "
        "scale, KEYWORD_ONLY lam = None)",
        "tunerkit.param_groups(POSITIONAL_OR_KEYWORD model, KEYWORD_ONLY lr, KEYWORD_ONLY weight_decay = None)",
        "tunerkit.patterns.exact_patterns(POSITIONAL_OR_KEYWORD paths)",
        "tunerkit.resize_obstacle(POSITIONAL_OR_KEYWORD parameters, POSITIONAL_OR_KEYWORD optimizer)",
        "tunerkit.patterns.one_allowance()",
        "tunerkit.BaseLayer.obstacle(POSITIONAL_OR_KEYWORD self)",
        "tunerkit.BaseLayer.packing",
        "tunerkit.BaseLayer.requantised(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD weight)",
        "tunerkit.BaseLayer.unpacked(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD weight)",
        "tunerkit.BaseLayer.while_adapted",
        "tunerkit.PackedLinear(POSITIONAL_OR_KEYWORD module)",
        "tunerkit.PackedLinear.in_features",
        "tunerkit.PackedLinear.linear",
        "tunerkit.PackedLinear.matrix(POSITIONAL_OR_KEYWORD self)",
        "tunerkit.PackedLinear.module",
        "tunerkit.PackedLinear.out_features",
        "tunerkit.PackedLinear.pack(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD weight)",
        "tunerkit.PackedLinear.packing",
        "tunerkit.PackedLinear.project_in(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD x, "
        "POSITIONAL_OR_KEYWORD q, POSITIONAL_OR_KEYWORD dropout = 0.0)",
        "tunerkit.PackedLinear.project_out(POSITIONAL_OR_KEYWORD self, POSITIONAL_OR_KEYWORD h, "
        "POSITIONAL_OR_KEYWORD p)",
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
    "KEYWORD_ONLY statistics = None, KEYWORD_ONLY pieces = False",
    "tunerkit.attach": ", KEYWORD_ONLY data_parallel = None",
    "tunerkit.load": ", KEYWORD_ONLY check_config = True",
    "tunerkit.save": ", KEYWORD_ONLY allow_nonfinite = False",
    "tunerkit.unwrap": ", KEYWORD_ONLY dtype = None",
}
# What core alone used: a tuner is made by `tunerkit.wrap` and `tunerkit.load`, and its bookkeeping lies in the model.
REMOVED = frozenset({"tunerkit.Tuner.fingerprint", "tunerkit.Tuner.frozen", "tunerkit.Tuner.turn"})
MODULES = ("tunerkit.errors", "tunerkit.patterns")


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


def public_api() -> list[str]:
    """All public functions and classes, one per line."""
    named = [(f"tunerkit.{name}", getattr(tunerkit, name)) for name in tunerkit.__all__]
    for module in map(importlib.import_module, MODULES):
        for name, found in vars(module).items():
            if not name.startswith("_") and getattr(found, "__module__", None) == module.__name__:
                named.append((f"{module.__name__}.{name}", found))
    return sorted(line for name, found in named for line in described(name, found))


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


def test_names_that_plugins_import_keep_their_path() -> None:
    """``tunerkit.patterns.lookup`` reads a mapping by target pattern; plugins import it from there."""
    from tunerkit.patterns import lookup

    assert lookup({"q_proj": 1}, "layers.0.q_proj", default=2) == 1
