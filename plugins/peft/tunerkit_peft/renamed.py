"""What PEFT takes settings for where transformers 5 stacks experts that were modules in transformers 4.

For these models PEFT takes the names of projections in ``target_modules`` for the stacks, whichever layers have them.
"""

import importlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from torch import nn

from tunerkit.errors import first, shown, warn
from tunerkit.plugin import FileError
from tunerkit_peft.selection import ends
from tunerkit_peft.stacks import GATED, is_named, stacks_of

_DOWN: Final = "down_proj"
_ROUTER: Final = {"gate": "gate.weight"}
# PEFT 0.21.2's table, with the types of transformers, for where PEFT is not installed.
_MIXTRAL: Final = {**_ROUTER, "w1": GATED, "w3": GATED, "w2": _DOWN}
_QWEN: Final = {**_ROUTER, "gate_proj": GATED, "up_proj": GATED, "down_proj": _DOWN}
_TYPES: Final[Mapping[str, Mapping[str, str]]] = {
    **dict.fromkeys(("minimax", "minimax_m2", "mixtral"), _MIXTRAL),
    **dict.fromkeys(
        (
            *("Dots3NoteTextModel", "UnlimitedOcrTextModel", "afmoe", "beam", "cohere2_moe", "deepseek_v2"),
            *("deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe"),
            *("glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe"),
            *("qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker"),
            *("sarvam_mla", "solar_open"),
        ),
        _QWEN,
    ),
}


def refuse_lost(
    settings: Mapping[str, Any],
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    owners: Collection[str],
    adapted: Collection[str],
    *,
    for_engines: bool,
) -> None:
    """Compare what PEFT adapts with some settings with what is meant.

    Args:
        settings: The settings of a folder.
        model: The model.
        modules: Its modules by path.
        owners: The paths of adapted modules.
        adapted: The paths of the targets, among them stacks.
        for_engines: Whether each expert has matrices of its own, for engines: then warn.

    Raises:
        FileError: PEFT would leave out adapted layers.
    """
    if settings["peft_type"] != "LORA" or not _has_stacks(modules):
        return
    stacks = stacks_of(modules)
    meant = {stacks[path].owner for path in adapted if path in stacks}
    layers = {path for path in owners if path in modules}
    try:
        names, parameters = _taken(settings, model, layers)
    except ValueError:  # PEFT refuses gate_proj without up_proj
        names, parameters = set(), set()
    lost = sorted(path for path in layers if not _is_chosen(path, names))
    lost += sorted(path for path in meant if not is_named(path, parameters))
    if for_engines and GATED in parameters and _DOWN not in parameters:
        lost = sorted(meant)  # PEFT looks for these matrices where they are if both stacks are adapted
    if not lost:
        return
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if for_engines:
        warn(
            "\n- ".join(
                [
                    "form='experts' is for engines. PEFT itself does not read this form of this adapter: for models of "
                    f"type {shown(kind)} it would leave out what is adapted at:",
                    *first(lost),
                ]
            )
        )
        return
    raise _refusal(kind, lost, is_adalora_open=not (meant or settings.get("use_dora")))


def _refusal(kind: str, lost: Sequence[str], *, is_adalora_open: bool) -> FileError:
    """The error for layers that PEFT would leave out, with the ways out."""
    ways = [
        "- Train without these layers: exclude=" + repr(sorted({".".join(path.split(".")[-2:]) for path in lost})),
        "- Or call tunerkit.unwrap(model, keep_merged=True) and save the whole model instead",
        "- tunerkit.save keeps the adapter in tunerkit's own form, and form='experts' is for engines, not PEFT",
    ]
    if is_adalora_open:
        ways.append("- form='adalora' writes an AdaLoRA, whose names PEFT leaves as they are")
    why = (
        f"PEFT cannot hold this adapter: for models of type {shown(kind)} it takes the names of projections, such as "
        "'down_proj', for the stacks of experts, also where dense layers and shared experts have them. So it would "
        "lose what is adapted at:"
    )
    return FileError("\n".join([why, *(f"- {line}" for line in first(lost)), "What to do:", *ways]))


def _has_stacks(modules: Mapping[str, nn.Module]) -> bool:
    """Whether there are experts that are no modules by themselves, as they are in transformers 4."""
    return any(path.rpartition(".")[2] == "experts" and f"{path}.0" not in modules for path in modules)


def _is_chosen(path: str, names: Collection[str]) -> bool:
    return any(end in names for end in ends(path))


def _taken(settings: Mapping[str, Any], model: nn.Module, layers: Collection[str]) -> tuple[set[str], set[str]]:
    """What PEFT makes of ``target_modules``, as names, and of ``target_parameters``."""
    modules, parameters = settings["target_modules"], settings.get("target_parameters") or []
    try:
        conversion = importlib.import_module("peft.utils.transformers_weight_conversion")
    except ImportError:
        found = _by_table(modules, parameters, model, layers)
    else:
        config = importlib.import_module("peft").LoraConfig(
            r=settings["r"], lora_alpha=settings["lora_alpha"], target_modules=modules, target_parameters=parameters
        )
        conversion.convert_peft_config_for_transformers(config, model=model, conversions=None)
        found = config.target_modules, config.target_parameters
    taken, own = found
    return set(layers if isinstance(taken, str) else taken or ()), set(own or ())


def _by_table(
    modules: list[str] | str, parameters: list[str], model: nn.Module, layers: Collection[str]
) -> tuple[set[str] | str, set[str]]:
    """PEFT's rule, where PEFT is not installed."""
    table = _TYPES.get(getattr(getattr(model, "config", None), "model_type", ""))
    if table is None:
        return modules if isinstance(modules, str) else set(modules), set(parameters)
    names = {path.rpartition(".")[2] for path in layers} if isinstance(modules, str) else set(modules)
    renamed = {name: table[leaf] for name in names if (leaf := name.rpartition(".")[2]) in table}
    return names - renamed.keys(), {*parameters, *renamed.values()}
