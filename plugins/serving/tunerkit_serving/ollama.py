"""What Ollama does with an adapter."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from tunerkit.errors import shown
from tunerkit_serving import llama_cpp, mends, signs
from tunerkit_serving.adapter_folder import CONFIG, Folder
from tunerkit_serving.findings import Engine, Rule, Severity
from tunerkit_serving.gguf_header import GgufAdapter
from tunerkit_serving.mends import quoted
from tunerkit_serving.scaling import Scale, misscaled, scaled

if TYPE_CHECKING:
    from torch import Tensor

_CONVERT: Final = "convert/convert.go"
_LLAMA: Final = "convert/convert_llama_adapter.go"
_KNOWN: Final = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")


def scale(folder: Folder) -> Scale:
    """Return the rule for a folder: lora_alpha over the tensor's own rank, as in llama.cpp, which runs the model."""
    return llama_cpp.scale(folder)


def delta(folder: Folder) -> Mapping[str, "Tensor"]:
    """Return what is added to each weight of a Gemma 2 base. On a Llama base q_proj and k_proj are scrambled."""
    return scaled(folder, scale(folder))


def _no_whole_alpha(folder: Folder, max_rank: int | None) -> list[str]:
    alpha = folder.config.get("lora_alpha")
    return [] if isinstance(alpha, int) else [f"{CONFIG}: lora_alpha={shown(alpha)}"]


def _strangers(folder: Folder, max_rank: int | None) -> list[str]:
    return [path for path in folder.pairs if not _KNOWN.fullmatch(path)]


def _turned(folder: Folder, max_rank: int | None) -> list[str]:
    return [path for path in folder.pairs if path.endswith((".q_proj", ".k_proj"))]


def serves(adapter: Folder | GgufAdapter) -> str:
    """Return the commands that make a model of a base and an adapter."""
    made = f"printf 'FROM BASE\\nADAPTER %s\\n' {quoted(adapter.path.resolve())} > Modelfile"
    return f"{made} && ollama create {quoted(adapter.path.stem)} -f Modelfile"


def _folder(
    severity: Severity, says: str, finds: signs.Finds, mend: mends.Mend, source: str = _CONVERT
) -> Rule[Folder]:
    return Rule(severity=severity, says=says, source=source, finds=finds, mend=mend)


ENGINE: Final = Engine(
    name="ollama",
    version="Ollama 0.33.0-rc2",
    reads="llm/llama_server.go",
    serves=serves,
    delta=delta,
    file_rules=llama_cpp.FILE_RULES,
    folder_rules=(
        _folder(Severity.REFUSED, "only LoRA is converted.", signs.other_method, mends.merged_by_peft),
        _folder(
            Severity.REFUSED,
            "tensors must be named lora_A.weight and lora_B.weight; AdaLoRA has lora_A, lora_B and lora_E.",
            signs.adalora,
            mends.gguf,
        ),
        _folder(Severity.REFUSED, "lora_alpha must be a whole number.", _no_whole_alpha, mends.gguf),
        _folder(
            Severity.REFUSED,
            "only the projections of a Llama or Gemma 2 decoder are converted.",
            _strangers,
            mends.gguf,
            _LLAMA,
        ),
        _folder(
            Severity.REFUSED,
            "tensors that are neither lora_A nor lora_B are refused when the model starts.",
            lambda folder, max_rank: (
                signs.setting("use_dora", "lora_bias")(folder, max_rank)
                + signs.bias(folder, max_rank)
                + signs.saved_modules(folder, max_rank)
            ),
            mends.merged,
        ),
        _folder(
            Severity.WRONG,
            "on a Llama base the folder's lora_A of q_proj and k_proj is reordered, where the order of heads concerns "
            "lora_B.",
            _turned,
            mends.gguf,
            _LLAMA,
        ),
        _folder(
            Severity.WRONG,
            "only lora_alpha is read, and every pair is scaled by it over its own rank.",
            lambda folder, max_rank: list(misscaled(folder, scale(folder))) if folder.is_lora else [],
            mends.gguf,
        ),
        _folder(
            Severity.WRONG,
            "init_lora_weights is not read: the factors meet an unchanged base.",
            signs.changed_base,
            mends.merged_by_peft,
        ),
    ),
)
