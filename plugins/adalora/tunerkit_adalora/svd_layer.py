"""The SVD layer: AdaLoRA's adapter, ΔW = scale · P Λ Q with a mask over its triplets."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, BaseLayer, Factors, add_low_rank, low_rank_factors


class Weights(NamedTuple):
    """P (out, r), λ (r,) and Q (r, in) of one layer; for a stack of E matrices, each with E first."""

    p: nn.Parameter
    lam: nn.Parameter
    q: nn.Parameter


class SvdLayer(Adapter):
    """``p`` (out, r), ``lam`` (r,), ``q`` (r, in): triplet i is column i of P, λ_i, row i of Q (Eq. 2).

    ``mask`` (r,) is True for triplets that the last allocation left live. It is neither a parameter nor a buffer, which
    DDP would broadcast. It still follows the parameters to other devices and into ``state_dict``.

    For a stack of E matrices, such as experts, all four have E as their first dimension. Each matrix has its own
    triplets and its own mask.

    Args:
        in_features: Features of the base layer's input.
        out_features: Features of its output.
        rank: r, the number of triplets of each matrix.
        scale: The factor of P Λ Q.
        dropout: Share of the input that is dropped while training.
        start: "gaussian" or "orthonormal" (Λ = 0); all others are initialized like "lora" (P = 0, Λ = 1).
        train_lambda: Whether the optimizer updates Λ. If not, the λ of a masked triplet is 0.
        stack: E, the number of matrices in a stack; 0 for one matrix.
    """

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False
    rank_dims: ClassVar[Mapping[str, int]] = {"p": -1, "lam": -1, "q": -2}

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float,
        dropout: float,
        start: str,
        train_lambda: bool = True,
        stack: int = 0,
    ) -> None:
        super().__init__()
        self.initial_rank = rank
        self.train_lambda = train_lambda
        first = (stack,) if stack else ()
        fill = torch.zeros if start in ("gaussian", "orthonormal") else torch.ones
        self.p = nn.Parameter(torch.zeros(*first, out_features, rank))
        self.lam = nn.Parameter(fill(*first, rank))
        self.q = nn.Parameter(torch.empty(*first, rank, in_features))
        self.mask = torch.ones(*first, rank, dtype=torch.bool)
        self.scale = scale
        self.dropout = dropout
        _start(self, start)

    @property
    def weights(self) -> Weights:
        """P, λ and Q, read without torch's slow attribute lookup, since each step reads all layers' weights."""
        own = self._parameters
        p, lam, q = own.get("p"), own.get("lam"), own.get("q")
        if p is None or lam is None or q is None:  # parametrised or flattened: only attributes
            return Weights(self.p, self.lam, self.q)
        return Weights(p, lam, q)

    @property
    def mask(self) -> Tensor:
        """The live triplets, bool (r,), or (E, r). Assign a new tensor; never write into it."""
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor) -> None:
        self.set_mask(mask, rank=None)

    def set_mask(self, mask: Tensor, *, rank: int | None) -> None:
        """Assign the mask.

        Args:
            mask: Bool (r,), or (E, r).
            rank: The number of triplets that it keeps, if known, so that `rank` need not wait for the device.
        """
        self._mask, self._rank = mask, rank

    @property
    def matrices(self) -> int:
        """The number of matrices: E for a stack, else 1."""
        return self._mask.shape[0] if self._mask.ndim > 1 else 1

    @property
    def rank(self) -> int:
        """The number of live triplets; for a stack, of all its matrices together."""
        if self._rank is None:
            self._rank = int(self._mask.sum())
        return self._rank

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        own: dict[str, Any] = self._parameters
        try:
            p, lam, q = own["p"], own["lam"], own["q"]  # faster than `weights`
        except KeyError:
            p, lam, q = self.weights
        return add_low_rank(base, x, y, q=q, p=p, lam=lam, scale=self.scale, dropout=dropout)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SvdLayer":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.mask = fn(self.mask).bool()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A copy: masks are views of one tensor, and accelerate keeps only one of several tensors that share memory.
        destination[prefix + "mask"] = self.mask.clone()
        if not (self.mask.numel() or keep_vars or self._is_emptied):
            for name in (*self.rank_dims, "mask"):
                destination[prefix + name] = _with_memory(destination[prefix + name])

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mask = state_dict.pop(prefix + "mask", None)
        if mask is None:
            missing_keys.append(prefix + "mask")
        problem = self._contradiction(state_dict, prefix, mask)
        if problem is not None:
            error_msgs.append(f"{prefix}mask: {problem}")
            return  # before core resizes the weights to a rank that the mask does not have
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if mask is not None and (problem := self._misfit(mask, self._triplets)):
            error_msgs.append(f"{prefix}mask: {problem}")
        elif mask is not None:
            # With assign=True, weights keep their device, perhaps for a model on the meta device; so does the mask.
            assigned = local_metadata.get("assign_to_params_buffers", False)
            self.mask = mask.detach().clone().to(mask.device if assigned else self.mask.device)

    @property
    def _is_emptied(self) -> bool:
        """Whether the weights are partitioned: ZeRO-3 empties them between uses, and stores them empty."""
        return self.weights.p.ndim < 2

    @property
    def _triplets(self) -> int:
        """The number of triplets of each matrix in memory, including dead ones."""
        return (self.mask if self._is_emptied else self.lam).shape[-1]

    def _misfit(self, mask: Tensor, rank: int) -> str | None:
        shape = (*self.mask.shape[:-1], rank)
        if mask.shape == shape and mask.dtype == torch.bool:
            return None
        return f"expected bool {shape}, got {mask.dtype} {tuple(mask.shape)}"

    def _contradiction(self, state: Mapping[str, Any], prefix: str, mask: Tensor | None) -> str | None:
        """Return how a state's mask contradicts its weights or this layer; None if it does not."""
        own, found = self.weights._asdict(), {name: state.get(prefix + name) for name in self.rank_dims}
        saved = {name: w for name, w in found.items() if isinstance(w, Tensor) and w.ndim == own[name].ndim}
        sizes = {weight.shape[self.rank_dims[name]] for name, weight in saved.items() if not self._is_emptied}
        rank = sizes.pop() if len(sizes) == 1 else self._triplets  # torch reports weights that disagree
        if mask is None:
            return None if rank == self._triplets else f"missing, and the weights have {rank} triplets"
        if mask.numel() > (most := self.initial_rank * self.matrices):
            return f"{mask.numel()} triplets, above the initial rank {most}"
        if problem := self._misfit(mask, rank):
            return problem
        # If the optimizer trains λ, a masked λ may be nonzero between allocations.
        lam = saved.get("lam")
        if self.train_lambda or lam is None or lam.shape != mask.shape:
            return None
        # FSDP2 and torch's distributed checkpoint pass shards, which a mask does not fit.
        known = type(lam.data) is Tensor and not (lam.is_meta or mask.is_meta)
        stray = int(lam.to(mask.device)[~mask].count_nonzero()) if known else 0
        return f"{stray} masked triplets whose λ is not 0" if stray else None

    def extra_repr(self) -> str:
        rank = "?" if self.mask.is_meta else self.rank  # a meta mask has no values
        dropout = f", dropout={self.dropout}" if self.dropout else ""
        return f"rank={rank} of {self.initial_rank * self.matrices}, scale={self.scale:g}{dropout}"

    def factors(self) -> Factors:
        """Return ΔW as low-rank factors, without triplets that add nothing; in a stack, to any matrix."""
        adds = self.mask.to(self.lam.device) | (self.lam.detach() != 0)
        kept = adds.reshape(self.matrices, -1).any(0).nonzero().squeeze(1)
        p, lam, q = (weight.index_select(dim, kept) for weight, dim in zip(self.weights, (-1, -1, -2), strict=True))
        return low_rank_factors(q, p, scale=self.scale, lam=lam)


def _with_memory(empty: Tensor) -> Tensor:
    """Return an empty tensor with memory: accelerate would consider empty tensors without memory to be shared."""
    return empty.new_empty(1)[:0].view(empty.shape)


@torch.no_grad()
def layer_of(product: Factors) -> SvdLayer:
    """Build the layer that adds ``product``, with scale 1: its triplets are the singular triplets of the product.

    Args:
        product: q (r, in), p (out, r); for a stack, each with E first.

    Returns:
        The layer, with at most r triplets for each matrix.
    """
    u, sigma, vh = product.triplets()
    layer = SvdLayer(
        in_features=product.q.shape[-1],
        out_features=product.p.shape[-2],
        rank=sigma.shape[-1],
        scale=1.0,
        dropout=0.0,
        start="lora",
        stack=len(sigma) if sigma.ndim > 1 else 0,
    )
    layer.p.copy_(u)
    layer.lam.copy_(sigma)
    layer.q.copy_(vh)
    return layer


@torch.no_grad()
def apply_masks_(lams: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Zero the λ of masked triplets (Eq. 6); P and Q stay as they are, and trainable.

    Args:
        lams: λ (r,), or (E, r), of each layer, or its shards, on any devices.
        masks: The mask of each layer, bool, in the shape of its λ.
    """
    # In one tensor: layers may be on several devices, and their masks on the device of the allocation.
    kept = torch.cat([lam.to(lams[0].device).flatten() for lam in lams])
    kept.masked_fill_(torch.cat([mask.to(kept.device).flatten() for mask in masks]).logical_not_(), 0)
    parts = torch.split(kept, [lam.numel() for lam in lams])
    values = [part if lam.ndim == 1 else part.view(lam.shape) for part, lam in zip(parts, lams, strict=True)]
    torch._foreach_copy_(list(lams), values)


def weights_of(layers: Sequence[SvdLayer]) -> list[nn.Parameter]:
    """Return P, λ, Q of each layer, one after the other. Call this at each step, since loading may replace them."""
    found: list[nn.Parameter] = []
    for layer in layers:
        own = layer._parameters
        if "p" in own and "lam" in own and "q" in own:  # three times as fast as `SvdLayer.weights`
            found += own["p"], own["lam"], own["q"]  # type: ignore[arg-type]  # never registered as None
        else:
            found += layer.weights
    return found


def _start(layer: SvdLayer, start: str) -> None:
    """Initialize P and Q. ΔW is 0, since Λ or P is 0."""
    if layer.lam.numel() == 0:
        return
    p, q = layer.p.detach(), layer.q.detach()
    if start == "gaussian":
        nn.init.normal_(p, std=0.02)
        nn.init.normal_(q, std=0.02)
    elif start == "orthonormal":
        for matrix in (*p.view(-1, *p.shape[-2:]), *q.view(-1, *q.shape[-2:])):
            nn.init.orthogonal_(matrix)
    else:
        nn.init.kaiming_uniform_(q.view(-1, q.shape[-1]), a=math.sqrt(5))  # its bound depends on ``in`` alone
