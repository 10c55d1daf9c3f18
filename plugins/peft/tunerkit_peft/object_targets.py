"""Where PEFT would put the adapter of a config object in a model: its defaults, and the modules that it would find."""

import copy
import importlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from torch import nn

from tunerkit.errors import shown
from tunerkit.plugin import exact_patterns, is_broad, lookup, matches, matches as matches_path
from tunerkit_peft.declarations import Declared
from tunerkit_peft.paths import is_linear, tied_to_input
from tunerkit_peft.stacks import Stack, stacks_of
from tunerkit_peft.targets import ALL_LINEAR, ends, few, is_named, selection_of

# The modules that a PeftModel of a task trains in full, if it finds them.
_HEADS: Final = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_OUT: Final = "out_proj"  # attention's second projection, which PEFT adapts with the first


def fill_defaults(found: dict[str, Any], model: nn.Module, declared: Declared | None) -> Iterator[str]:
    """Put PEFT's defaults in that depend on the model's type; yield what is wrong if it has none.

    Args:
        found: The settings, which are changed.
        model: The model.
        declared: The method that declares the type, if it is neither LoRA nor AdaLoRA.
    """
    kind, of_type = getattr(getattr(model, "config", None), "model_type", None), found["peft_type"]
    # The object is of this library, so it is there.
    known = vars(importlib.import_module("peft.utils.constants"))
    given, parameters = found.get("target_modules"), found.get("target_parameters")
    if not given and not (declared is not None and declared.names.tied):
        tuners = importlib.import_module("peft.mapping").PEFT_TYPE_TO_TUNER_MAPPING
        defaults = {
            **(getattr(tuners.get(of_type), "target_module_mapping", None) or {}),
            **known.get(f"TRANSFORMERS_MODELS_TO_{of_type}_TARGET_MODULES_MAPPING", {}),
        }
        if parameters and (given is not None or kind not in defaults):
            found["target_modules"] = []
            return
        if kind not in defaults:
            yield (
                f"'target_modules' is missing, and PEFT has no default for a model of type {shown(kind)}; name them, "
                "as in target_modules='all-linear'"
            )
            return
        found["target_modules"] = chosen if isinstance(chosen := defaults[kind], str) else sorted(chosen)
    inputs = known.get(f"TRANSFORMERS_MODELS_TO_{of_type}_FEEDFORWARD_MODULES_MAPPING", {})
    if not inputs or found.get("feedforward_modules") is not None:
        return
    if kind not in inputs:
        yield (
            f"'feedforward_modules' is missing, and PEFT has no default for a model of type {shown(kind)}; name the "
            "targets whose input is scaled, or write feedforward_modules=[]"
        )
    paths = _among((path for path, _ in model.named_modules()), found["target_modules"])  # where PEFT looks for them
    found["feedforward_modules"] = [name for name in inputs.get(kind, ()) if any(path.endswith(name) for path in paths)]


def refuse_tying(
    found: Mapping[str, Any], copies: tuple[str, ...], modules: Mapping[str, nn.Module], declared: Declared | None
) -> Iterator[str]:
    """Yield why one adapter on both sides of a tied weight would be another training, if the settings name a side."""
    if not found.get("ensure_weight_tying") or (declared is not None and declared.names.tied):
        return
    sides = tied_to_input(modules)
    named = [path for path in sides if path.endswith(copies)], _among(sides, found.get("target_modules") or ())
    for field, paths in zip(("modules_to_save", "target_modules"), named, strict=True):
        if paths:
            yield (
                f"'ensure_weight_tying' is True, and PEFT trains {few([*sides])} as one; here each has values of its "
                f"own, which start alike. If that will do, leave it out, and name all of them in {field}"
            )


def places_of(
    found: Mapping[str, Any],
    copies: tuple[str, ...],
    settings: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    declared: Declared | None,
) -> dict[str, object]:
    """Return what is adapted and what is trained in full, as PEFT would find it in the model.

    Args:
        found: PEFT's settings, with its defaults.
        copies: Those of ``modules_to_save``.
        settings: The same as the method's. Ranks and alphas by pattern also get those of attention's projections.
        modules: The model's modules by path.
        declared: The method that declares the type, if it is neither LoRA nor AdaLoRA.
    """
    paths = [path for path in modules if path]
    present = {end for path in paths for end in ends(path)}
    heads = (name for name in _HEADS.get(str(found.get("task_type")), ()) if name in present)
    trained = tuple(dict.fromkeys((*copies, *heads)))
    targets, exclude, layers = found["target_modules"], found.get("exclude_modules"), found.get("layers_to_transform")
    # PEFT adapts nothing inside a module that is trained in full.
    inside = [path for path in paths if any(f".{name}." in f".{path}" for name in trained)]
    if _is_all(targets):
        ends_of_trained = tuple(f".{name}" for name in trained)
        heads_too = (path for path in _outside_blocks(modules) if not f".{path}".endswith(ends_of_trained))
        named = (ALL_LINEAR, *exact_patterns(path for path in heads_too if path not in inside).values())
        inside = []
    else:
        named = _names(targets or ())
    stacks, other_stacks = chosen_stacks(found, modules)
    # PEFT looks for the layer's number after these names, and for stacks not at all.
    if found.get("layers_pattern") or (stacks and layers not in (None, [])):
        matches = selection_of(found).matcher()
        named, layers = tuple(exact_patterns(path for path in paths if matches(path)).values()), None
    chosen = [path for path in paths if any(matches_path(pattern, path) for pattern in named)]
    left_out, dropped = _names(exclude or ()), {*inside}
    dropped |= {path for path in paths if any(matches_path(pattern, path) for pattern in left_out)}
    kept = [path for path in chosen if path not in dropped]
    beside, patterns = _attention(kept, modules, settings) if found["peft_type"] == "LORA" else ([], {})
    beside += [stack.path for stack in stacks]
    patterns |= patterns_of(stacks, [path for path in kept if path not in beside], {**settings, **patterns})
    sides = [*tied_to_input(modules)] if declared is not None and declared.names.tied else []
    tied = sides if {*sides[:1]} & {*kept} else ()  # of a head alone, PEFT leaves the embedding as it is
    if not dropped.isdisjoint(beside):  # PEFT adapts these with their attention, whatever is excluded
        left_out, inside = (), [path for path in chosen if path in dropped and path not in beside]
    inside = [path for path in inside if path in chosen and path not in beside]
    inside += [stack.path for stack in other_stacks if stack.path in chosen or _is_all(targets)]
    return {
        "targets": (*named, *exact_patterns((*beside, *tied)).values()) if targets or beside else None,
        "exclude": (*left_out, *exact_patterns(inside).values()),
        "layers": None if layers is None or layers == [] else tuple(layers) if isinstance(layers, list) else (layers,),
        "train_modules": trained,
        **patterns,
    }


def _outside_blocks(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The linear layers that PEFT's ``"all-linear"`` takes and ours may leave out, as heads: all but the output's."""
    model: Any = modules[""]
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    around = {path for path, module in modules.items() if isinstance(module, nn.ModuleList | nn.MultiheadAttention)}
    for path, module in modules.items():
        if is_linear(module) and module is not output and around.isdisjoint(_upwards(path)):
            yield path


def _upwards(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def _attention(
    chosen: Sequence[str], modules: Mapping[str, nn.Module], settings: Mapping[str, Any]
) -> tuple[list[str], dict[str, object]]:
    """The output projections of torch's attention, which PEFT adapts with its input's, and their ranks and alphas.

    They have the rank of the attention, and twice its scale: see `paths.Place`.
    """
    owners = {f"{path}.{_OUT}": path for path in chosen if isinstance(modules[path], nn.MultiheadAttention)}
    if not owners or not {"rank_pattern", "alpha_pattern"} <= settings.keys():
        return [*owners], {}
    names = exact_patterns(owners)
    ranks, alphas = settings["rank_pattern"], settings["alpha_pattern"]
    own = {names[out]: lookup(ranks, owner, settings["rank"]) for out, owner in owners.items()}
    twice = {names[out]: 2 * lookup(alphas, owner, settings["alpha"]) for out, owner in owners.items()}
    return [*owners], {"rank_pattern": {**own, **ranks}, "alpha_pattern": {**twice, **alphas}}


def _among(paths: Iterable[str], targets: str | Sequence[str]) -> list[str]:
    """Those of the paths that PEFT's targets may name; all if these are all linear layers."""
    named = () if _is_all(targets) else _names(targets)
    return [path for path in paths if _is_all(targets) or any(matches_path(pattern, path) for pattern in named)]


def _is_all(targets: object) -> bool:
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    """Patterns for an expression for whole paths, or for names that PEFT compares with the ends of paths."""
    if isinstance(given, str):
        return (f"re:{given}",)
    return tuple(rf"re:(.*\.)?{re.escape(name)}" if is_broad(name) else name for name in given)


def converted(config: Any, model: nn.Module, modules: Mapping[str, nn.Module]) -> Any:
    """Return a config with PEFT's own changes for mixtures whose experts were modules in transformers 4.

    There PEFT takes the names of projections in ``target_modules`` for the stacks that hold them now, at a rank for
    each of them.

    Raises:
        ValueError: PEFT refuses these names.
    """
    if not stacks_of(modules) or not getattr(config, "target_modules", None):
        return config
    changed = copy.deepcopy(config)
    with suppress(ImportError):  # an older PEFT has no such changes
        conversion = importlib.import_module("peft.utils.transformers_weight_conversion")
        conversion.convert_peft_config_for_transformers(changed, model=model, conversions=None)
    return changed


def refuse_parameters(found: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the parameters that ``target_parameters`` names and that are no stacks of experts."""
    owners = [stack.owner for stack in stacks_of(modules).values()]
    for name in found.get("target_parameters") or ():
        if not any(is_named(owner, [name]) for owner in owners):
            known = "name one of its stacks" if owners else "install tunerkit[experts], which finds such stacks"
            yield (
                f"'target_parameters' has {name!r}, which is no stack of experts of this model: {known}. Layers with a "
                "weight of their own belong into 'target_modules', and routers, which PEFT's 'all-linear' means too, "
                "are not adapted here; name the layers instead"
            )


def chosen_stacks(found: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> tuple[list[Stack], list[Stack]]:
    """Return the stacks that PEFT would adapt, and the others, which names of modules must not mean either."""
    stacks, names = stacks_of(modules).values(), found.get("target_parameters") or ()
    chosen = [stack for stack in stacks if is_named(stack.owner, names)]
    return chosen, [stack for stack in stacks if stack not in chosen]


def patterns_of(chosen: Sequence[Stack], kept: Collection[str], settings: Mapping[str, Any]) -> dict[str, object]:
    """Return the ranks and alphas by pattern with those of stacks, which PEFT's patterns name without our child.

    Args:
        chosen: The adapted stacks.
        kept: The paths of the other targets.
        settings: The method's settings.
    """
    if not chosen or not {"rank_pattern", "alpha_pattern"} <= settings.keys():
        return {}
    exact = exact_patterns([stack.path for stack in chosen])
    tables: dict[str, object] = {}
    for name in ("rank", "alpha"):
        table, usual = settings[f"{name}_pattern"], settings[name]
        values = {stack: lookup(table, stack.owner, usual) for stack in chosen}
        own = {exact[stack.path]: value for stack, value in values.items() if value != usual}
        # A pattern that means stacks alone would match nothing here.
        others = {
            pattern: value
            for pattern, value in table.items()
            if any(matches(pattern, path) for path in kept) or not any(matches(pattern, each.owner) for each in chosen)
        }
        tables[f"{name}_pattern"] = {**own, **others}
    return tables
