"""What Text Generation Inference does with an adapter, and LoRAX, from which it has this code."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from tunerkit_serving import mends, signs
from tunerkit_serving.adapter_folder import Folder
from tunerkit_serving.findings import Engine, Rule, Severity
from tunerkit_serving.gguf_header import GgufAdapter
from tunerkit_serving.gguf_signs import only_folders
from tunerkit_serving.mends import quoted
from tunerkit_serving.scaling import Scale, misscaled, ratio, scaled

if TYPE_CHECKING:
    from torch import Tensor

# The order in which they are loaded matters: see `scale`.
TYPES: Final = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj"),
    *("c_proj", "c_fc"),
)
_LORA: Final = "server/text_generation_server/adapters/lora.py"
_MODELS: Final = "server/text_generation_server/models/__init__.py"
_LOOKUP: Final = "server/text_generation_server/utils/adapter.py"
_PATH: Final = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.(\w+)")
_FASTEST: Final = 128


def padded(rank: int) -> int:
    """Return the rank of the buffers on one GPU: at least 8, above that a multiple of 16 (LoRAX's punica.py)."""
    return 8 if rank <= 8 else -(-rank // 16) * 16


def scale(folder: Folder) -> Scale:
    """Return TGI's rule: lora_alpha / r, where the first type of layer that is padded changes r for all later ones.

    A type of layer that not every layer has is dropped, and so is everything outside decoder layers.
    """
    scales: dict[str, float] = {}
    rank = folder.r
    stabilised = bool(folder.config.get("use_rslora"))
    for _, layers in _complete(folder):
        scales |= dict.fromkeys(layers.values(), ratio(folder.alpha, rank, stabilised=stabilised))
        rank = padded(folder.pairs[layers[min(layers)]].rank)
    return scales.get


def delta(folder: Folder) -> Mapping[str, "Tensor"]:
    """Return what TGI adds to each weight on one GPU."""
    return scaled(folder, scale(folder))


def _types(folder: Folder) -> Mapping[str, Mapping[int, str]]:
    """The paths of each type of layer by the layer's number, in the order in which they are loaded."""
    found: dict[str, Mapping[int, str]] = {}
    for layers in signs.by_layer(folder).values():
        known = _PATH.fullmatch(next(iter(layers.values())))
        if known and known[2] in TYPES:
            found[known[2]] = layers
    return {name: found[name] for name in TYPES if name in found}


def _complete(folder: Folder) -> Iterator[tuple[str, Mapping[int, str]]]:
    types = _types(folder)
    numbers = {number for layers in types.values() for number in layers}
    yield from ((name, layers) for name, layers in types.items() if set(layers) == numbers)


def _strangers(folder: Folder, max_rank: int | None) -> list[str]:
    known = {path for layers in _types(folder).values() for path in layers.values()}
    return [path for path in folder.pairs if path not in known] if folder.is_lora else []


def _incomplete(folder: Folder, max_rank: int | None) -> list[str]:
    if not folder.is_lora:
        return []
    whole = {name for name, _ in _complete(folder)}
    lost = [f"{name} (in {len(layers)} layers only)" for name, layers in _types(folder).items() if name not in whole]
    return lost + signs.setting("layers_to_transform")(folder, max_rank)


def _unequal(folder: Folder, max_rank: int | None) -> list[str]:
    if not folder.is_lora:
        return []
    ranks = {name: {padded(folder.pairs[path].rank) for path in layers.values()} for name, layers in _complete(folder)}
    return [f"{name} (padded ranks {min(each)} to {max(each)})" for name, each in ranks.items() if len(each) > 1]


def serves(adapter: Folder | GgufAdapter) -> str:
    """Return the command that serves a folder."""
    base = adapter.base if isinstance(adapter, Folder) else "BASE"
    name = quoted(f"{adapter.path.name}={adapter.path}")
    return f"text-generation-launcher --model-id {quoted(base)} --lora-adapters {name}"


def _uniform(folder: Folder) -> str:
    """Name the rank where the default may be 1, which TGI pads to 8."""
    command = mends.uniform(folder)
    return f"{command} --set rank=8" if folder.rank < 8 and command.startswith("tunerkit") else command


def _rule(severity: Severity, says: str, source: str, finds: signs.Finds, mend: mends.Mend) -> Rule[Folder]:
    return Rule(severity=severity, says=says, source=source, finds=finds, mend=mend)


_WRONG: Final = Severity.WRONG
ENGINE: Final = Engine(
    name="tgi",
    version="TGI at db931fcf",
    reads=_LORA,
    serves=serves,
    delta=delta,
    file_rules=only_folders("TGI", _LOOKUP),
    folder_rules=(
        _rule(Severity.REFUSED, "only LoRA is read.", _LORA, signs.other_method, mends.merged_by_peft),
        _rule(
            _WRONG,
            "tensors that are not named lora_A.weight and lora_B.weight are dropped: nothing of AdaLoRA is left.",
            _LORA,
            signs.adalora,
            _uniform,
        ),
        _rule(
            Severity.REFUSED,
            "the layers of one type are stacked, so they need one rank.",
            _LORA,
            _unequal,
            _uniform,
        ),
        _rule(
            _WRONG,
            "a type of layer is dropped if one layer lacks it; a warning is logged.",
            _LORA,
            _incomplete,
            mends.merged,
        ),
        _rule(
            _WRONG,
            "only q, k, v, o, gate, up, down and qkv_proj, c_proj and c_fc in model.layers are served, others are "
            "dropped.",
            _MODELS,
            _strangers,
            mends.merged,
        ),
        _rule(
            _WRONG,
            "patterns are not read, and r is overwritten with the padded rank (8, or a multiple of 16) after the first "
            "type of layer.",
            _LORA,
            lambda folder, max_rank: list(misscaled(folder, scale(folder))) if folder.is_lora else [],
            _uniform,
        ),
        _rule(_WRONG, "trained biases are not read.", _LORA, signs.bias, mends.merged),
        _rule(_WRONG, "modules that were trained in full are not read.", _LORA, signs.saved_modules, mends.merged),
        _rule(
            _WRONG,
            "settings of LoRA's variants and of its start are not read.",
            _LORA,
            lambda folder, max_rank: (
                signs.setting("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_qalora")(
                    folder, max_rank
                )
                + signs.changed_base(folder, max_rank)
            ),
            mends.merged_by_peft,
        ),
        _rule(
            Severity.SLOW,
            "ranks above 128 are multiplied adapter by adapter.",
            _LORA,
            lambda folder, max_rank: [f"rank {folder.rank}"] if folder.rank > _FASTEST else [],
            mends.none,
        ),
    ),
)
