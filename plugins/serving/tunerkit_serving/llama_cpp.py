"""What llama.cpp does with an adapter."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from tunerkit_serving import gguf_signs, mends, signs
from tunerkit_serving.adapter_folder import Folder
from tunerkit_serving.findings import Engine, Rule, Severity
from tunerkit_serving.gguf_header import GgufAdapter
from tunerkit_serving.mends import quoted
from tunerkit_serving.scaling import Scale, misscaled, scaled

if TYPE_CHECKING:
    from torch import Tensor

_ADAPTER: Final = "src/llama-adapter.cpp"
_SCALE: Final = "src/llama-adapter.h"
_CONVERTER: Final = "convert_lora_to_gguf.py"
VERSION: Final = "llama.cpp at 0650ea8c"
CONVERTED: Final = "llama.cpp at 0b03adaa"


def scale(folder: Folder) -> Scale:
    """Return the rule for a folder that llama.cpp's own converter turned into GGUF: lora_alpha / the tensor's rank."""
    return lambda path: own_rank_scale(folder.alpha, folder.pairs[path].rank)


def own_rank_scale(alpha: float, rank: int) -> float:
    """Return the scale of a pair: alpha over its own rank; without alpha, 1.

    A pair of rank 0 changes nothing, whatever its scale.
    """
    return alpha / rank if alpha and rank else 1.0


def delta(folder: Folder) -> Mapping[str, "Tensor"]:
    """Return what llama.cpp adds to each weight once its own converter has made the folder a GGUF file."""
    return scaled(folder, scale(folder))


def serves(adapter: Folder | GgufAdapter) -> str:
    """Return the command that serves a file."""
    return f"llama-server -m BASE.gguf --lora {quoted(adapter.path)}"


FILE_RULES: Final[tuple[Rule[GgufAdapter], ...]] = (
    Rule(
        severity=Severity.REFUSED,
        says="general.type must be 'adapter' and adapter.type 'lora'.",
        source=_ADAPTER,
        finds=gguf_signs.not_an_adapter,
        mend=mends.none,
    ),
    Rule(
        severity=Severity.REFUSED,
        says="tensors must end in .lora_a or .lora_b.",
        source=_ADAPTER,
        finds=gguf_signs.strange_tensors,
        mend=mends.none,
    ),
    Rule(
        severity=Severity.REFUSED,
        says="lora_a and lora_b must both be there, with one rank.",
        source=_ADAPTER,
        finds=gguf_signs.broken_pairs,
        mend=mends.none,
    ),
    Rule(
        severity=Severity.IGNORED,
        says="without alpha the factors are multiplied by 1, whatever their rank.",
        source=_SCALE,
        version="llama.cpp at 215841fc",
        finds=gguf_signs.no_alpha,
        mend=mends.none,
    ),
    Rule(
        severity=Severity.FINE,
        says="each pair is scaled by alpha over its own rank; tunerkit has allowed for that in lora_b, other writers "
        "may not.",
        source=_SCALE,
        version="llama.cpp at 215841fc",
        finds=gguf_signs.unequal_ranks,
        mend=mends.none,
    ),
)
ENGINE: Final = Engine(
    name="llama.cpp",
    version=VERSION,
    reads=_ADAPTER,
    serves=serves,
    delta=delta,
    file_rules=FILE_RULES,
    folder_rules=(
        Rule(
            severity=Severity.REFUSED,
            says="--lora takes a GGUF file, not a folder.",
            source=_ADAPTER,
            finds=lambda folder, max_rank: [folder.path.name] if folder.kind in ("LORA", "ADALORA") else [],
            mend=mends.gguf,
        ),
        Rule(
            severity=Severity.REFUSED,
            says="only LoRA can be converted.",
            source=_CONVERTER,
            version=CONVERTED,
            finds=signs.other_method,
            mend=mends.merged_by_peft,
        ),
        Rule(
            severity=Severity.REFUSED,
            says="llama.cpp's converter stops at tensors that are neither lora_A nor lora_B.",
            source=_CONVERTER,
            version=CONVERTED,
            finds=lambda folder, max_rank: (
                signs.setting("use_dora", "lora_bias")(folder, max_rank)
                + signs.bias(folder, max_rank)
                + signs.saved_modules(folder, max_rank)
            ),
            mend=mends.merged,
        ),
        Rule(
            severity=Severity.WRONG,
            says="llama.cpp's converter reads only lora_alpha, and every pair is scaled by it over its own rank; "
            "tunerkit's converter multiplies use_rslora and patterns in.",
            source=_CONVERTER,
            version=CONVERTED,
            finds=lambda folder, max_rank: misscaled(folder, scale(folder)) if folder.is_lora else (),
            mend=mends.gguf,
        ),
        Rule(
            severity=Severity.WRONG,
            says="init_lora_weights is not read: the factors meet an unchanged base.",
            source=_CONVERTER,
            version=CONVERTED,
            finds=signs.changed_base,
            mend=mends.merged_by_peft,
        ),
    ),
)
