"""The measured table of the gallery: what each installed method costs on one layer, counted and not timed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import tunerkit
from tunerkit import hooks
from tunerkit_testing.counting import Counting

WIDTH, TOKENS = 1024, 512
# Where a method adapts something else than a linear layer.
_ELSEWHERE: dict[str, Callable[[], nn.Module]] = {
    "ln-tuning": lambda: nn.LayerNorm(WIDTH),
    "trainable-tokens": lambda: nn.Embedding(WIDTH, WIDTH),
}


class _Layer(nn.Module):
    """One frozen layer, whose input needs a gradient, as in the middle of a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.ids = isinstance(layer, nn.Embedding)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(torch.zeros(TOKENS, dtype=torch.long) if self.ids else x)
        return out


def _cost(model: nn.Module) -> tuple[int, int]:
    """The operations of a forward and backward, and the bytes that are kept in between."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not any(tensor.untyped_storage().data_ptr() == own for own in owned):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    owned = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers(), x)}
    with saved_tensors_hooks(pack, lambda tensor: tensor), Counting() as mode:
        out = model(x)
        if out.requires_grad:
            out.backward(torch.ones_like(out))
    return mode.count, sum(kept.values())


def measured() -> str:
    """Describe what each installed method costs on one linear layer of `WIDTH` features, at its default settings."""
    rows: dict[str, tuple[Any, ...]] = {}
    for name, info in tunerkit.methods().items():
        if info.error:
            continue
        torch.manual_seed(0)
        make = _ELSEWHERE.get(name, lambda: nn.Linear(WIDTH, WIDTH))
        settings: dict[str, object] = {"targets": ["layer"]}
        settings |= {"tokens": [0, 1, 2, 3]} if name == "trainable-tokens" else {}
        before = _cost(_Layer(make()))
        wrapped = tunerkit.wrap(_Layer(make()), name, settings, seed=0)
        count, kept = (after - base for after, base in zip(_cost(wrapped), before, strict=True))
        served = "as a LoRA, or merged" if hooks.has_factors(name) else "merged, or converted to a LoRA"
        served = "merged" if hooks.registry.get(name).targets != "weights" else served
        rows[name] = (f"{tunerkit.trainable_parameters(wrapped).trainable:,}", count, f"{kept / 1e3:,.0f}", served)
    head = "| method | trained parameters | operations | kept for backward, kB | served |\n|---|---:|---:|---:|---|\n"
    return head + "".join(f"| `{name}` | {' | '.join(map(str, row))} |\n" for name, row in sorted(rows.items()))
