"""Folders for the tests of serving: written by hand, and by peft."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

PREFIX = "base_model.model."
SETTINGS: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "base",
    "bias": "none",
    "init_lora_weights": True,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj")


class Attention(nn.Module):
    """Four projections, as in a Llama; the keys and values are narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(16, 16), nn.Linear(16, 16)
        self.k_proj, self.v_proj = nn.Linear(16, 8), nn.Linear(16, 8)


class Decoder(nn.Module):
    """Modules with the names of a small decoder. It is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        for _ in range(2):
            layer = nn.Module()
            layer.self_attn = Attention()
            self.model.layers.append(layer)


def paths(*leaves: str) -> list[str]:
    """The paths of the decoder's projections."""
    return [f"model.layers.{number}.self_attn.{leaf}" for number in range(2) for leaf in leaves or LEAVES]


def write(path: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], extra: Mapping[str, Tensor], **settings: Any) -> Path:
    """Write a folder of pairs (A, B) and other tensors. A setting of None is left out."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {f"{PREFIX}{name}.lora_A.weight": a.contiguous() for name, (a, _) in pairs.items()}
    tensors |= {f"{PREFIX}{name}.lora_B.weight": b.contiguous() for name, (_, b) in pairs.items()}
    save_file(tensors | {PREFIX + name: tensor for name, tensor in extra.items()}, path / "adapter_model.safetensors")
    leaves = sorted({name.rpartition(".")[2] for name in pairs})
    config = SETTINGS | {"target_modules": leaves} | settings
    (path / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return path


def random_folder(path: Path, *leaves: str, rank: int = 8, names: list[str] | None = None, **settings: Any) -> Path:
    """Write a folder with random factors of one rank for the decoder's projections, or for other names."""
    pairs = {name: (torch.randn(rank, 16), torch.randn(16, rank)) for name in names or paths(*leaves)}
    return write(path, pairs, {}, **({"r": rank, "lora_alpha": rank} | settings))


def uniform(path: Path, factors: Mapping[str, tuple[Tensor, Tensor]], rank: int) -> Path:
    """Write factors whose product is all of ΔW with one rank, alpha and r, as tunerkit does."""
    pairs = {}
    for name, (a, b) in factors.items():
        gap = rank - a.shape[0]
        pairs[name] = nn.functional.pad(a, (0, 0, 0, gap)), nn.functional.pad(b, (0, gap))
    return write(path, pairs, {}, r=rank, lora_alpha=rank)


def close(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Whether all modules agree to 1e-6 of the largest entry."""
    if set(got) != set(wanted):
        return False
    return all(
        (got[path] - each).abs().max() <= 1e-6 * max(1.0, float(each.abs().max())) for path, each in wanted.items()
    )
