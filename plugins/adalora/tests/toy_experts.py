"""A toy mixture of experts whose weights are stacks, the same as separate layers, and its base-layer kind."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import tunerkit
from tunerkit.plugin import BaseLayer

EXPERTS = 3


class Stack(nn.Module):
    """Multiplies each row by one of its owner's matrices; it has no parameters, and remembers which rows went where."""

    def __init__(self, owner: "Experts") -> None:
        super().__init__()
        vars(self)["owner"] = owner  # not as a child, which would be a cycle

    def forward(self, rows: Tensor, ids: Tensor) -> Tensor:
        vars(self)["ids"] = ids
        return torch.einsum("noi,ni->no", vars(self)["owner"].w[ids], rows)


class Experts(nn.Module):
    """E matrices in one parameter, ``w`` (E, out, in)."""

    def __init__(self, out: int, inner: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(EXPERTS, out, inner))
        self.stack = Stack(self)

    def forward(self, rows: Tensor, ids: Tensor) -> Tensor:
        result: Tensor = self.stack(rows, ids)
        return result


class SeparateExperts(nn.ModuleList):
    """The same as `Experts`, with one linear layer for each."""

    def forward(self, rows: Tensor, ids: Tensor) -> Tensor:
        found = {number: self[number](rows[ids == number]) for number in ids.unique().tolist()}
        order = torch.cat([(ids == number).nonzero().squeeze(1) for number in found])
        return torch.cat([*found.values()])[order.argsort()]


class StackLayer(BaseLayer):
    """`Stack` as a base layer."""

    forwards: ClassVar[tuple[str, ...]] = (f"{Stack.__module__}.{Stack.__qualname__}",)
    weight_name: ClassVar[str] = "w"

    @property
    def holder(self) -> nn.Module:
        owner: nn.Module = vars(self.module)["owner"]
        return owner

    @property
    def stack(self) -> int:
        return len(self.dense())

    @property
    def in_features(self) -> int:
        return self.dense().shape[2]

    @property
    def out_features(self) -> int:
        return self.dense().shape[1]

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        return torch.einsum("nri,ni->nr", q[vars(self.module)["ids"]], x)

    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        return torch.einsum("nor,nr->no", p[vars(self.module)["ids"]], h)

    def dense(self) -> Tensor:
        return self.tensor("w").detach()

    def pack(self, weight: Tensor) -> Tensor:
        return weight


class Plugin:
    """Describes `Stack`."""

    @tunerkit.hookimpl
    def tunerkit_base_layers(self) -> list[type[BaseLayer]]:
        return [StackLayer]


class Net(nn.Module):
    """Two layers of experts around a linear layer: (N, 6) and ids (2, N) to (N, 3)."""

    def __init__(self, one: nn.Module, middle: nn.Module, two: nn.Module) -> None:
        super().__init__()
        self.one, self.middle, self.two = one, middle, two

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        result: Tensor = self.two(torch.tanh(self.middle(torch.tanh(self.one(x, ids[0])))), ids[1])
        return result


# Any: tests reach for the layers by name, which nn.Module's types do not know.
def stacked() -> Any:
    """The model with stacks, with the same weights at each call."""
    torch.manual_seed(0)
    return Net(Experts(5, 6), nn.Linear(5, 4), Experts(3, 4)).double()


def separate() -> Any:
    """The same model with a layer for each expert."""
    model = stacked()
    for name in ("one", "two"):
        experts = SeparateExperts()
        for w in model.get_parameter(f"{name}.w").detach():
            expert = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
            expert.weight.data.copy_(w)
            experts.append(expert)
        model.set_submodule(name, experts)
    return model
