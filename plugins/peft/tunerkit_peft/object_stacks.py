"""The stacks of experts that PEFT would adapt with a config object, as targets of ours."""

import copy
import importlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from tunerkit.plugin import exact_patterns, lookup, matches
from tunerkit_peft.stacks import Stack, is_named, stacks_of


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
