"""Adapters in a few lines each: what an outside author writes first of a method."""

from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, BaseLayer, Factors, add_low_rank, low_rank_factors

SCALE = 0.5


class LowRank(Adapter):
    """Adds `SCALE` · ``b a x``; ``a`` (rank, in) is random, ``b`` (out, rank) starts at 0."""

    reads_output: ClassVar[bool | None] = False
    reads_weight: ClassVar[bool | None] = False

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return add_low_rank(base, x, y, q=self.a, p=self.b, scale=SCALE)


class Shift(Adapter):
    """Adds a trained vector ``v`` (out,), which starts at 0."""

    reads_output: ClassVar[bool | None] = False
    reads_weight: ClassVar[bool | None] = False

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(base.out_features))

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return y + base.shape_bias(self.v).to(y.dtype)


class Scale(Adapter):
    """Multiplies the output by 1 + ``l`` (out,), as IA3 does; ``l`` starts at 0."""

    reads_output: ClassVar[bool | None] = True
    reads_weight: ClassVar[bool | None] = True

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.zeros(base.out_features))

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return (y * base.shape_bias(1 + self.l)).to(y.dtype)


class Secretive(Scale):
    """A `Scale` whose class does not say what it reads."""

    reads_output: ClassVar[bool | None] = None
    reads_weight: ClassVar[bool | None] = None


class Direction(Adapter):
    """Trains the length ``m`` (out,) of each row of W, and its direction by a low-rank ``b a``, as DoRA does."""

    reads_output = True
    reads_weight = True

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.m = nn.Parameter(torch.linalg.vector_norm(base.dense().float(), dim=1))

    @property
    def rank(self) -> int:
        return len(self.a)

    def stretch(self, base: BaseLayer) -> Tensor:
        """Return the factor of each row of W + ``b a``, (out,)."""
        lengths: Tensor = torch.linalg.vector_norm(base.dense() + self.b @ self.a, dim=1)
        return self.m / lengths

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        bias, stretch = base.bias(), base.shape_bias(self.stretch(base))
        wide = x.to(self.a.dtype) if x.is_floating_point() else x
        product = base.project_out(base.project_in(wide, self.a), self.b)
        linear = y if bias is None else y - base.shape_bias(bias)
        return (y + (stretch - 1) * linear + stretch * product).to(y.dtype)


class Affine(Adapter):
    """Replaces the output by y (1 + ``scale``) + ``shift``, both (features,) and 0 at the start."""

    reads_output = True
    reads_weight = False

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(features))

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return (y * (1 + self.scale) + self.shift).to(y.dtype)


class Matrices(nn.Module):
    """Fixed random ``a`` (rank, in) and ``b`` (out, rank), as large as the largest target."""

    def __init__(self, out: int, into: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, into), requires_grad=False)
        self.b = nn.Parameter(torch.randn(out, rank), requires_grad=False)


class Weighting(Adapter):
    """Adds ``diag(v) b diag(d) a x`` with trained ``v`` (out,), which starts at 0, and ``d`` (rank,)."""

    reads_output = False
    reads_weight = False

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(base.out_features))
        self.d = nn.Parameter(torch.ones(rank))

    @property
    def rank(self) -> int:
        return len(self.d)

    def parts(self, base: BaseLayer) -> tuple[Tensor, Tensor]:
        """Return the target's part of ``a``, (rank, in), and ``diag(v) b``, (out, rank)."""
        shared = cast(Matrices, self.shared)
        return shared.a[:, : base.in_features], self.v[:, None] * shared.b[: base.out_features]

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        q, p = self.parts(base)
        return add_low_rank(base, x, y, q=q, p=p, lam=self.d, scale=1.0)


class Principal(Adapter):
    """Trains the main part ``b a`` of W, as PiSSA does, and takes away its start, a fixed twin ``start_b start_a``."""

    reads_output = False
    reads_weight = True  # at its start

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__()
        u, sigma, vh = torch.linalg.svd(base.dense().float(), full_matrices=False)
        self.a, self.b = nn.Parameter(vh[:rank]), nn.Parameter(u[:, :rank] * sigma[:rank])
        self.start_a = nn.Parameter(self.a.detach().clone(), requires_grad=False)
        self.start_b = nn.Parameter(self.b.detach().clone(), requires_grad=False)

    @property
    def rank(self) -> int:
        return len(self.a)

    def difference(self) -> tuple[Tensor, Tensor]:
        """Return the difference to the start as one product: Q (2 r, in) and P (out, 2 r)."""
        return torch.cat([self.a, self.start_a]), torch.cat([self.b, -self.start_b], dim=1)

    def factors(self) -> Factors:
        """Return the same as a record."""
        q, p = self.difference()
        return low_rank_factors(q, p, scale=1.0)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        q, p = self.difference()
        return add_low_rank(base, x, y, q=q, p=p, scale=1.0)
