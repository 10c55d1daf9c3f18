"""What MLX-LM does with an adapter."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from tunerkit_serving import gguf_signs, mends
from tunerkit_serving.adapter_folder import Folder
from tunerkit_serving.findings import Engine, Rule, Severity
from tunerkit_serving.gguf_header import GgufAdapter
from tunerkit_serving.mends import quoted

if TYPE_CHECKING:
    from torch import Tensor

_LOADS: Final = "mlx_lm/tuner/utils.py"


def delta(folder: Folder) -> Mapping[str, "Tensor"]:
    """Return what MLX-LM adds to each weight once the factors are transposed into its own file.

    It has one rank and one scale for all modules: lora_a (in, r), lora_b (r, out), scale = lora_alpha / r.
    """
    scale = folder.alpha / folder.r
    found = {}
    for path, pair in folder.pairs.items():
        if pair.rank != folder.r:
            continue  # the shape differs from the model's: it is refused
        found[path] = scale * folder.product(path)
    return found


def serves(adapter: Folder | GgufAdapter) -> str:
    """Return the command that serves an adapter of MLX-LM's own."""
    return f"mlx_lm.server --model BASE --adapter-path {quoted(adapter.path)}"


ENGINE: Final = Engine(
    name="mlx",
    version="mlx-lm 0.32.2",
    reads=_LOADS,
    serves=serves,
    delta=delta,
    file_rules=(
        Rule(
            severity=Severity.REFUSED,
            says="adapters are folders of MLX-LM's own layout.",
            source=_LOADS,
            finds=gguf_signs.any_file,
            mend=gguf_signs.to_folder,
        ),
    ),
    folder_rules=(
        Rule(
            severity=Severity.REFUSED,
            says="it reads adapters.safetensors with num_layers and lora_parameters in adapter_config.json, which PEFT "
            "does not write; a merged model folder is read as it is.",
            source=_LOADS,
            finds=lambda folder, max_rank: [folder.path.name],
            mend=lambda folder: (
                mends.merged(folder) if folder.kind in ("LORA", "ADALORA") else mends.merged_by_peft(folder)
            ),
        ),
    ),
)
