"""PEFT's own config objects, as `tunerkit.wrap` takes them: the settings of tunerkit's method that train the same.

A setting without effect in training is dropped. One that would make another training is refused, with what to write.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Final

from torch import nn

from tunerkit.errors import shown
from tunerkit.plugin import ConfigError
from tunerkit_peft.declarations import BRINGS, IN_METHODS, installed_for
from tunerkit_peft.declared_settings import Converted
from tunerkit_peft.object_targets import converted, fill_defaults, places_of, refuse_parameters, refuse_tying
from tunerkit_peft.paths import modules_of, tied_to_input
from tunerkit_peft.settings import (
    HARMLESS,
    HIGHEST_RANK,
    READ,
    REFUSED,
    Values,
    is_number,
    is_rank,
)

# The class that describes each method; those that derive from one of them describe something else, or the same.
_METHODS: Final = {
    "peft.tuners.adalora.config.AdaLoraConfig": "adalora",
    "peft.tuners.lora.config.LoraConfig": "lora",
}
_BASE: Final = "peft.config.PeftConfig"
_PLAIN: Final = re.compile(r"[\w.-]+")
_KINDS: Final = {"lora": "LORA", "adalora": "ADALORA"}  # as PEFT names them
# Its names of LoRA's starts, and ours; PiSSA by randomised SVD becomes PiSSA.
_STARTS: Final[Mapping[object, str]] = {
    True: "kaiming",
    None: "kaiming",
    "gaussian": "gaussian",
    "pissa": "pissa",
    "olora": "olora",
    "eva": "eva",
}


def settings_of(config: Any, model: nn.Module) -> tuple[str, dict[str, object]] | None:
    """Convert a config of peft's: for LoRA, for AdaLoRA, or of a type whose names a method declares.

    Args:
        config: Any object.
        model: The model that it is meant for. Only the names of its modules are used.

    Returns:
        The name of the method and its settings; None for other objects.

    Raises:
        ConfigError: A setting has no counterpart; the error names every one, with what to do.
        PluginError: The method declares PEFT's names wrongly.
    """
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(config).__mro__]
    if _BASE not in names:
        return None
    # As its file has them: sets become lists.
    found = {name: _plain(value) for name, value in config.to_dict().items()}
    kind, modules = found["peft_type"], modules_of(model)
    declared = installed_for(found)
    method = next((_METHODS[name] for name in names if name in _METHODS), None)
    if declared is None and (method is None or kind != _KINDS[method]):
        if kind in IN_METHODS:
            raise ConfigError([f"this {type(config).__name__} is of a type that no installed method has. {BRINGS} @ $"])
        return None
    if method == "lora":
        found = _converted(config, model, modules)
    reader = Values(found)
    copies, common = reader.names("modules_to_save"), [*_refused_by_all(found)]
    if reader.places("target_modules") and reader.places("exclude_modules"):
        common += [*fill_defaults(found, model, declared), *refuse_tying(found, copies, modules, declared)]
    if declared is None:
        assert method is not None
        word, problems = "lora_only", [*_refused(found, method, modules), *common]
        own = {
            "alpha": reader.number("lora_alpha", 8.0),
            "dropout": reader.number("lora_dropout", 0.0, least=0.0, below=1.0),
            **(_of_lora(reader) if method == "lora" else _of_adalora(reader)),
        }
    else:
        converted, method, word = Converted(), declared.method, declared.names.bias
        # A setting without effect on what is computed is told of a folder, and here it would be another training.
        problems = [*converted.problems_of(found, declared), *converted.remarks, *common]
        own = {**converted.config, **{name: _by_ends(value) for name, value in converted.chosen.items()}}
        own |= {f"{name}_pattern": _by_pattern(table) for name, table in converted.patterns.items()}
    bias = reader.choice("bias", ("none", "all", word) if word else ("none",))
    if wrong := [*reader.problems, *problems]:
        whose = f"this {type(config).__name__} of peft cannot be converted"
        raise ConfigError([f"{whose}: {problem} @ $" for problem in wrong])
    settings = {**own, "bias": bias if bias in ("none", "all") else "adapters"}
    return method, {**settings, **places_of(found, copies, settings, modules, declared)}


def _converted(config: Any, model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    try:
        changed = converted(config, model, modules)
    except ValueError as error:
        raise ConfigError([f"peft refuses this {type(config).__name__}: {error} @ $"]) from error
    return {name: _plain(value) for name, value in changed.to_dict().items()}


def _plain(value: Any) -> Any:
    if isinstance(value, set | tuple):
        return sorted(value) if isinstance(value, set) else [*value]
    return value.value if isinstance(value, Enum) else value


def _by_ends(named: Sequence[str] | str) -> tuple[str, ...]:
    """Patterns for the bare ends of paths, or for an expression for whole paths."""
    return (f"re:{named}",) if isinstance(named, str) else tuple(f"re:.*{re.escape(name)}" for name in named)


def _of_lora(reader: Values) -> dict[str, object]:
    ranks = reader.table("rank_pattern", is_rank, f"an integer from 1 to {HIGHEST_RANK}")
    alphas = reader.table("alpha_pattern", is_number, "a number")
    return {
        "rank": reader.integer("r", 8, least=1, most=HIGHEST_RANK),
        "rslora": reader.flag("use_rslora"),
        "rank_pattern": _by_pattern(ranks),
        "alpha_pattern": _by_pattern(alphas),
        **_start_of(reader.found),
    }


def _start_of(found: Mapping[str, Any]) -> dict[str, object]:
    """LoRA's start, and for EVA how far ranks may move; kaiming for one that is refused."""
    start = _STARTS.get(_start(found), "kaiming")
    return {"start": start, "rho": float(_eva(found).get("rho", 2.0))} if start == "eva" else {"start": start}


def _start(found: Mapping[str, Any]) -> Any:
    """What an object says of the start, without how a decomposition is computed."""
    start = found.get("init_lora_weights", True)
    return re.sub(r"^pissa_niter_\d+$", "pissa", start) if isinstance(start, str) else start


def _eva(found: Mapping[str, Any]) -> Mapping[str, Any]:
    given = found.get("eva_config") or {}
    return given if isinstance(given, Mapping) else vars(given)


def _of_adalora(reader: Values) -> dict[str, object]:
    total = reader.integer("total_step", 0)
    return {
        "init_rank": reader.integer("init_r", 12, least=1, most=HIGHEST_RANK),
        "target_rank": reader.integer("target_r", 8, least=1, most=HIGHEST_RANK),
        "t_init": reader.integer("tinit", 0),
        "t_final": reader.integer("tfinal", 0),
        "delta_t": reader.integer("deltaT", 1, least=1),
        "beta1": reader.number("beta1", 0.85, least=0.0, below=1.0),
        "beta2": reader.number("beta2", 0.85, least=0.0, below=1.0),
        "gamma": reader.number("orth_reg_weight", 0.5, least=0.0),
        "orthogonality": "reference",
        "start": "gaussian",
        "total_steps": total or None,
    }


def _refused(found: Mapping[str, Any], method: str, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield what would be another training, and what to do."""
    for name, value in found.items():
        if not value or name in READ or name in HARMLESS:
            continue
        if name == "target_parameters" and method == "lora":
            yield from refuse_parameters(found, modules)
            continue
        what = REFUSED[name][0] if name in REFUSED else "a setting that PEFT 0.21 does not have"
        instead = ", or train it with PEFT, and merge it there"
        if name == "use_dora" and method == "adalora":
            what, instead = f"{what}, and PEFT's AdaLoRA does not have it", ""
        elif name == "trainable_token_indices" and (calls := _rows_beside(value, modules)):
            instead = f", and wrap once more: {calls}"
        yield f"{name!r} is {shown(value)}: {what}; leave it out{instead}"
    start = _start(found)
    if method == "lora" and start == "loftq":
        yield (
            "'init_lora_weights' is 'loftq', which quantises the base itself, and here it is quantised before; write "
            "tunerkit.wrap(model, 'lora', {'start': 'loftq', 'original': the unquantised base's folder, ...})"
        )
    elif method == "lora" and start not in _STARTS:
        names = ", ".join(repr(name) for name in _STARTS if isinstance(name, str))
        yield f"'init_lora_weights' is {shown(start)}; write init_lora_weights=True, or one of {names}"
    if method == "lora" and start == "eva":
        odd = {"whiten": True, "adjust_scaling_factors": False}
        yield from (
            f"'eva_config.{name}' is {value}, and EVA's A is not whitened here, nor its scale changed; leave it out"
            for name, value in odd.items()
            if _eva(found).get(name, not value) is value
        )
    if method == "adalora" and found.get("rank_pattern"):
        yield (
            "'rank_pattern' holds the masks of an earlier training; load its folder with tunerkit.load(model, folder, "
            "trainable=True)"
        )


def _rows_beside(given: Any, modules: Mapping[str, nn.Module]) -> str:
    """The call for a second adapter that trains the rows of some tokens, or one for each module that is named.

    Sides of a tie train as one, without targets. Empty if PEFT would train these apart.
    """
    named: Mapping[str, Any] = given if isinstance(given, Mapping) else {"": given}
    sides = [*tied_to_input(modules)]
    tied = {name: ids for name, ids in named.items() if any(side.endswith(name) for side in sides)}
    together = [*tied.values()][:1]
    if tied and not (sides[0].endswith(tuple(tied)) and [*tied.values()] == together * len(tied)):
        return ""
    each = [{"tokens": ids} for ids in together]
    apart = {name: ids for name, ids in named.items() if name not in tied}
    each += [{"tokens": ids, **({"targets": [name]} if name else {})} for name, ids in apart.items()]
    calls = (
        f"wrap(model, 'trainable-tokens', {settings}, adapter='tokens{n or ''}')" for n, settings in enumerate(each)
    )
    return " and ".join(f"tunerkit.{call}" for call in calls)


def _refused_by_all(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what would be another training by any method."""
    if found.get("inference_mode"):
        yield (
            "'inference_mode' is True, and wrap makes an adapter to train; leave it out, and call "
            "tunerkit.freeze(model, 'default') if it must not train"
        )


def _by_pattern(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table by patterns of ours: PEFT reads its keys as expressions for the ends of paths."""
    return {name if _PLAIN.fullmatch(name) else rf"re:(.*\.)?({name})": value for name, value in table.items()}
