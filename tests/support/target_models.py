"""Models whose layers are selected in tests, and the selection, checked."""

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import nn

from tunerkit import hooks, targets
from tunerkit.config import AdapterConfig
from tunerkit.records import DefaultTargets, Method
from tunerkit.targets import Scan

ANY = Method("any", AdapterConfig)


def scanned(model: nn.Module, *defaults: DefaultTargets) -> Scan:
    """The scan of a model with what is known of layers and models, and with default targets."""
    return targets.scan(model, attrs.evolve(hooks.gather_knowledge(), default_targets=defaults))


def chosen(
    model: nn.Module,
    wanted: str | Sequence[str] | None,
    *,
    defaults: Sequence[DefaultTargets] = (),
    **options: Any,
) -> list[str]:
    """The selected paths, each checked to lead to its module."""
    selected = targets.select(scanned(model, *defaults), targets=wanted, method=ANY, **options)  # type: ignore[arg-type]
    assert all(model.get_submodule(target.path) is target.module for target in selected)
    return [target.path for target in selected]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("query", "key")})
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Linear(4, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.classifier = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


BLOCK = ("attention.query", "attention.key", "mlp")

ALL = [f"layers.{layer}.{name}" for layer in range(3) for name in BLOCK]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.attention = OwnAttention(4, 2)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *args: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.out_proj(self.in_proj_weight)  # type: ignore[no-any-return]


def tied_pair() -> nn.ModuleDict:
    """An ordinary layer, and a head tied to an embedding."""
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "odd": nn.Linear(4, 8), "embed": nn.Embedding(8, 4)})
    model["odd"].weight = model["embed"].weight
    return model
