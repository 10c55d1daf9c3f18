"""Stacks of experts: where a model has them, and which of their sides PEFT's packed matrices belong to.

A stack is one parameter (E, s1, s2) of an experts module with the matrices of all E experts. PEFT wraps the experts
module once for each parameter, and packs A expert by expert, (E r, i), and B with the expert fastest, (o, r E).
"""

import importlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, Protocol, runtime_checkable

import attrs
from torch import Tensor, nn

from tunerkit.errors import first, shown, warn
from tunerkit.plugin import Factors, FileError
from tunerkit_peft.targets import ends, is_named

CHILD: Final = ".stacks."  # between an experts module and the name of its parameter, in paths of targets
LEVEL: Final = ".base_layer"  # PEFT's name of what a wrapper wraps
_RELEASE: Final = re.compile(r"(\d+)\.(\d+)\.(\d+)(?:\.post\d+)?")
GATED: Final = "gate_up_proj"


@runtime_checkable
class StackModule(Protocol):
    """The module that stands for a stack, as the plugin for experts has it."""

    name: str
    count: int
    in_features: int
    out_features: int
    is_transposed: bool


@attrs.frozen
class Stack:
    """One stack of a model.

    Attributes:
        path: The path of its module.
        experts: The path of the experts module.
        parameter: The name of the parameter.
        count: E.
        in_features: The features of a row.
        out_features: The features of its output.
        is_transposed: Whether the parameter is (E, in, out).
        is_marked: Whether its class says so to PEFT. Llama 4's does not, and is transposed.
        is_concatenated: Whether the rows of gate and up are two halves; else they alternate.
    """

    path: str
    experts: str
    parameter: str
    count: int
    in_features: int
    out_features: int
    is_transposed: bool
    is_marked: bool
    is_concatenated: bool

    @property
    def owner(self) -> str:
        """The path of the parameter, by which PEFT's settings name it."""
        return f"{self.experts}.{self.parameter}"

    def is_swapped(self, version: str) -> bool | None:
        """Return whether a version of PEFT takes s2 for the input's side; None if it does not say.

        No version up to 0.18 does. 0.19.0 does so where the class says that it is transposed, and later ones where it
        does not.
        """
        found = _RELEASE.fullmatch(version)
        if found is None:
            return None
        release = tuple(map(int, found.groups()))
        if release < (0, 19, 0):
            return False
        return self.is_marked if release == (0, 19, 0) else not self.is_marked

    def is_straight(self, *, swapped: bool) -> bool:
        """Whether PEFT's A belongs to the input, so that it is ours; else it is the transpose of our B."""
        return swapped != self.is_transposed


def stacks_of(modules: Mapping[str, nn.Module]) -> dict[str, Stack]:
    """Return the stacks of a model by the paths of their modules, in the order in which PEFT wraps them."""
    found = {}
    for path, module in modules.items():
        experts, child, parameter = path.rpartition(CHILD)
        owner = modules.get(experts)
        if not child or owner is None or not isinstance(module, StackModule) or module.name != parameter:
            continue
        found[path] = Stack(
            path,
            experts,
            parameter,
            module.count,
            module.in_features,
            module.out_features,
            module.is_transposed,
            is_marked=bool(getattr(owner, "is_transposed", False)),
            is_concatenated=bool(getattr(owner, "is_concatenated", True)),
        )
    places = {path: number for number, path in enumerate(modules)}
    order = {
        stack.path: (places[stack.experts], own_parameters(modules[stack.experts]).index(stack.parameter))
        for stack in found.values()
    }
    return {path: found[path] for path in sorted(found, key=order.__getitem__)}


def own_parameters(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters, in order."""
    return [name for name, _ in module.named_parameters(recurse=False)]


def packed(product: Factors, stack: Stack, version: str) -> tuple[Tensor, Tensor]:
    """Return A (E r, i) and B (o, r E) of a product, q (E, r, in) and p (E, out, r), for a release of PEFT."""
    swapped = stack.is_swapped(version)
    assert swapped is not None
    q, p = product if stack.is_straight(swapped=swapped) else (product.p.mT, product.q.mT)
    return q.flatten(0, 1), p.permute(1, 2, 0).flatten(1)


def unpacked(a: Tensor, b: Tensor, stack: Stack, *, swapped: bool) -> Factors:
    """Return the product of A (E r, i) and B (o, r E): q (E, r, in) and p (E, out, r)."""
    q = a.unflatten(0, (stack.count, -1))
    p = b.unflatten(1, (-1, stack.count)).permute(2, 0, 1)
    return Factors(q=q, p=p) if stack.is_straight(swapped=swapped) else Factors(q=p.mT, p=q.mT)


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
