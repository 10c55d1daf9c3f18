"""Write an adapter as PEFT's type of its method, by the names that the method declares."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import tunerkit
from tunerkit.errors import first, shown, warn
from tunerkit.plugin import FileError, PluginError, lookup, matches
from tunerkit_peft.declarations import Declared, Leaf
from tunerkit_peft.declared_settings import replaced, written_settings
from tunerkit_peft.lora_writing import Site, Written
from tunerkit_peft.paths import caveats, modules_of, obstacle, tied_to_input
from tunerkit_peft.shapes import Features, features_of, misfit, shape_of, theirs
from tunerkit_peft.targets import pattern_for, target_modules

if TYPE_CHECKING:
    from tunerkit.plugin import Tuner

_MERGE = "Call tunerkit.unwrap(model, keep_merged=True) and save the whole model instead"


def sites_of(tuner: "Tuner", declared: Declared) -> list[Site]:
    """Return the adapted modules.

    Raises:
        FileError: PEFT adapts no such module by this type, or computes something else there.
    """
    kind = declared.names.type
    ranks = tuner.ranks()
    sites = [Site(target.path, target.path, target.module, ranks[target.path]) for target in tuner.targets]
    sides = [*tied_to_input(modules_of(tuner.model))] if is_tied(tuner, declared) else []
    if {site.name for site in sites} == {*sides}:  # PEFT finds what is tied to the embedding
        sites = [site for site in sites if site.name == sides[0]]
    if any(site.name == "" for site in sites):
        raise FileError(f"the model is itself a target, and PEFT adapts modules inside a model. {_MERGE}")
    wrong = [f"{each.name} ({type(each.module).__name__})" for each in sites if not declared.names.takes(each.module)]
    wrong += [f"{each.name} ({reason})" for each in sites if (reason := obstacle(each.module, kind))]
    for own, (value, layers) in declared.names.fixed.items():
        given = getattr(tuner.config, own)
        others = [each.name for each in sites if type(each.module).__name__ in layers and given != value]
        wrong += [
            f"{name} (there PEFT computes what {own}={value!r} does, and this one has {given!r})" for name in others
        ]
    if wrong:
        raise FileError(
            "\n- ".join(
                [
                    f"the names of PEFT's {kind} are declared for {', '.join(declared.names.layers)}, and others are "
                    f"adapted here. If the method adds products, form='uniform' writes a LoRA. {_MERGE}:",
                    *first(wrong),
                ]
            )
        )
    return sites


def is_tied(tuner: "Tuner", declared: Declared) -> bool:
    """Whether the targets share one weight and all tensors."""
    return bool(declared.names.tied) and bool(getattr(tuner.config, declared.names.tied))


def named(tuner: "Tuner", declared: Declared, sites: Sequence[Site]) -> Written:
    """Return the settings and the tensors of PEFT's type.

    Args:
        tuner: The adapter.
        declared: The method, and its names.
        sites: The adapted modules.

    Raises:
        FileError: PEFT has one value for all targets, and this adapter has several.
        ConfigError: PEFT has no value for one of the settings.
        PluginError: The method declares no name for one of its tensors, or another shape.
    """
    names, adapters, paths = declared.names, tuner.adapters(), [site.owner for site in sites]
    tied = is_tied(tuner, declared)
    known: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for site in sites[:1] if tied else sites:
        features = features_of(site.module)
        where = [
            own
            for own, setting in names.settings.items()
            if setting.targets and any(matches(pattern, site.name) for pattern in getattr(tuner.config, own) or ())
        ]
        sizes = known.setdefault(site.name, {})
        adapter = adapters[site.name]
        for own, tensor in (adapter.shared if tied else adapter).state_dict().items():
            leaf = names.tensors.get(own)
            if leaf is None:
                raise _undeclared(declared, own)
            shape = shape_of(leaf, features, where)
            given = _theirs(declared, own, tensor, leaf, shape, features)
            problem, _ = ("", False) if shape is None else misfit(given.shape, shape, features, sizes)
            if problem:
                raise _misdeclared(declared, own, f"the tensor of {site.name!r} {problem}")
            leaf_name = leaf.embedding if leaf.embedding and isinstance(site.module, nn.Embedding) else leaf.name[0]
            tensors[f"{site.name}.{leaf_name}"] = given
    shared = {} if tied else dict(_shared(declared, adapters[sites[0].name]))
    for leaf in names.shared.values():
        if leaf.shape is not None and leaf.name[0] in shared:
            misfit(shared[leaf.name[0]].shape, leaf.shape, Features(0, ()), known.setdefault("the shared module", {}))
    said, patterns = _patterned(declared, tuner.config, {site.name: known[site.name] for site in sites})
    said |= _alike(declared, tuner.config, known)
    chosen = target_modules(paths, modules_of(tuner.model))
    settings = written_settings(declared, tuner.config, said, lambda patterns: _ends(patterns, paths, chosen))
    _warn(declared, settings, sites)
    again = [leaf.name[0] for leaf in names.shared.values() if leaf.repeated and leaf.name[0] in shared]
    tensors |= {f"{site.name}.{name}": shared[name] for site in sites for name in again}
    if tied:
        here = {name.removeprefix(f"{sites[0].name}."): each for name, each in tensors.items()}
        tensors = {f"{target.path}.{name}": each for target in tuner.targets for name, each in here.items()}
    return Written({**settings, **patterns}, tensors, shared)


def _patterned(
    declared: Declared, config: Any, known: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, object]]:
    """The most common value of each setting that may have patterns, and PEFT's patterns for the others."""
    said: dict[str, Any] = {}
    written: dict[str, object] = {}
    for own, setting in declared.names.settings.items():
        if not setting.pattern:
            continue
        table, usual = getattr(config, f"{own}_pattern"), getattr(config, own)
        values = {path: sizes.get(own, lookup(table, path, usual)) for path, sizes in known.items()}
        said[own] = common = Counter(values.values()).most_common(1)[0][0]
        others = {path: value for path, value in values.items() if value != common}
        written[setting.pattern] = {_key(path, [*values]): value for path, value in others.items()}
    return said, written


def _key(path: str, paths: Sequence[str]) -> str:
    """A pattern for a path: the path itself where that is right, because some types of PEFT's compare it as it is."""
    is_end = any(other.endswith(f".{path}") for other in paths)
    return path if re.fullmatch(r"[\w.-]+", path) and not is_end else pattern_for(path, paths)


def _warn(declared: Declared, settings: Mapping[str, object], sites: Sequence[Site]) -> None:
    """Tell what not every PEFT computes as it is computed here."""
    told = [*caveats([(site.name, site.module) for site in sites], declared.names.type)]
    for setting in declared.names.settings.values():
        if setting.portable and (value := settings[setting.name[0]]) != setting.portable[0]:
            told.append(f"{setting.name[0]!r} is {shown(value)}: {setting.portable[1]}")
    for line in told:
        warn(line)


def below(declared: Declared) -> list[str]:
    """What PEFT puts below a target of this type."""
    starts = dict.fromkeys(name.partition(".")[0] for leaf in declared.names.tensors.values() for name in leaf.names)
    return ["base_layer", *(each for start in starts for each in (start, f"{start}.default"))]


def _shared(declared: Declared, adapter: Any) -> Iterator[tuple[str, Tensor]]:
    if not adapter.has_shared:
        return
    for own, tensor in adapter.shared.state_dict().items():
        names = declared.names.shared
        covering = next((name for name in names if name.endswith("*") and own.startswith(name[:-1])), own)
        if covering not in names:
            raise _undeclared(declared, own)
        name = names[covering].name[0]
        rest = own.removeprefix(covering[:-1]) if name.endswith("*") else ""
        leaf = names[covering]
        yield name.removesuffix("*") + rest, _theirs(declared, own, tensor, leaf, leaf.shape, Features(0, ()))


def _theirs(declared: Declared, own: str, tensor: Tensor, leaf: Leaf, shape: Any, features: Features) -> Tensor:
    try:
        return theirs(tensor.detach().cpu(), leaf, shape, features)
    except (ValueError, RuntimeError) as error:
        raise _misdeclared(declared, own, str(error)) from error


def _alike(declared: Declared, config: object, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The sizes that all targets agree on."""
    settings = declared.names.settings
    alike = {own for own, each in settings.items() if not (each.pattern or each.instead_of)} - replaced(
        declared.names, config
    )
    found: dict[str, dict[Any, str]] = {}
    for path, sizes in known.items():
        for name, size in sizes.items():
            if name in alike:
                found.setdefault(name, {}).setdefault(size, path)
    for name, sizes in found.items():
        wanted = getattr(config, name)
        is_wrong = isinstance(wanted, int) and not isinstance(wanted, bool) and set(sizes) != {wanted}
        if len(sizes) > 1 or is_wrong:
            field = settings[name].name[0]
            lines = [f"{path} has {size}" for size, path in sizes.items()]
            raise FileError(
                "\n- ".join(
                    [
                        f"PEFT has one {field!r} for all targets of its {declared.names.type}"
                        f"{f', {wanted} by the config' if is_wrong else ''}, and this adapter has several {name}. "
                        f"{_MERGE}:",
                        *first(lines),
                    ]
                )
            )
    return {name: next(iter(sizes)) for name, sizes in found.items()}


def _ends(patterns: Sequence[str], paths: Sequence[str], targets: list[str] | str) -> list[str] | str:
    """PEFT's form of patterns of targets: names where their bare ends are right, else an expression for whole paths.

    PEFT wants such names to be among those of the targets.
    """
    wanted = [path for path in paths if any(matches(pattern, path) for pattern in patterns)]
    found = target_modules(wanted, paths) if wanted else []
    is_exact = [path for path in paths if path.endswith(tuple(found))] == wanted
    if isinstance(found, list) and is_exact and (isinstance(targets, str) or set(found) <= set(targets)):
        return found
    return "|".join(map(re.escape, wanted))


def _undeclared(declared: Declared, own: str) -> PluginError:
    return _misdeclared(declared, own, "it is declared nowhere, and PEFT's folder would lack it")


def _misdeclared(declared: Declared, own: str, what: str) -> PluginError:
    distribution = tunerkit.methods()[declared.method].distribution
    return PluginError(
        f"the plugin of method {declared.method!r} ({distribution}) declares foreign['peft'] wrongly for tensor "
        f"{shown(own)}: {what}"
    )
