"""VB-LoRA (Li et al., NeurIPS 2024, arXiv 2405.15179): LoRA's factors are mixed from one bank of short vectors."""

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Factors, Method, add_low_rank, hookimpl, setting
from tunerkit_methods.sizes import at_most, common_divisor

NAMES = {
    "type": "VBLORA",
    "tensors": {
        "in_logits": {"name": "vblora_logits_A", "shape": ["rank", "in_pieces", "vectors"]},
        "out_logits": {"name": "vblora_logits_B", "shape": ["out_pieces", "rank", "vectors"]},
    },
    "shared": {"bank": {"name": "vblora_vector_bank", "shape": ["vectors", "length"]}},
    "settings": {
        **{"rank": "r", "dropout": "vblora_dropout"},
        **{"top": "topk", "vectors": "num_vectors", "length": "vector_length"},
        # PEFT has no such setting. Its field says whether the largest logits alone are saved, which ends a training.
        "start": {"name": "save_only_topk_weights", "values": {"random": False, "zero": False}},
    },
    "bias": "vblora_only",
    "ignored": ["init_vector_bank_bound", "init_logits_std"],
}


@attrs.frozen
class Config(AdapterConfig):
    """The settings of VB-LoRA."""

    rank: int = setting(4, ge=1, doc="rank of ΔW", aka=("r",))
    vectors: int = setting(256, ge=2, doc="vectors in the bank", aka=("num_vectors",))
    length: int | None = setting(None, ge=1, doc="numbers in a vector; None takes up to 256", aka=("vector_length",))
    top: int = setting(2, ge=1, doc="vectors that are mixed to one piece of a factor", aka=("topk",))
    start: Literal["zero", "random"] = setting("zero", doc="ΔW starts at 0, or as in the paper near it")
    dropout: float = setting(0.0, ge=0, lt=1, doc="share of the input that is dropped", aka=("vblora_dropout",))

    def problems(self) -> Iterable[str]:
        for name, number in {"top": self.top, "vectors": self.vectors}.items():
            if self.start == "zero" and number % 2:
                yield f'expected an even number, as vectors start in pairs, or start "random", got {number} @ $.{name}'


class Bank(nn.Module):
    """The vectors (vectors, length) that all targets share. For the start at 0, each v has its −v in the other half."""

    def __init__(self, config: Config, length: int) -> None:
        super().__init__()
        bank = torch.empty(config.vectors, length).uniform_(-0.02, 0.02)
        half = bank[: config.vectors // 2]
        self.bank = nn.Parameter(torch.cat([half, -half]) if config.start == "zero" else bank)


class Mixed(Adapter):
    """ΔW = B A, where each piece of ``length`` numbers, of a row of A or a column of B, is a mixture from the bank.

    Its weights are the softmax of its ``top`` largest logits: of A's (rank, in/length, vectors) and of B's (out/length,
    rank, vectors).
    """

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False

    def __init__(self, base: BaseLayer, config: Config, length: int) -> None:
        super().__init__()
        self.top, self.dropout = config.top, config.dropout
        in_logits = 0.1 * torch.randn(config.rank, base.in_features // length, config.vectors)
        if config.start == "zero":  # each piece of A mixes v and −v alike
            half = in_logits[..., : config.vectors // 2]
            # The largest are raised, so that no other ties with them in bf16.
            in_logits = (half + 0.1 * (half >= half.topk(config.top // 2).values[..., -1:])).repeat(1, 1, 2)
        self.in_logits = nn.Parameter(in_logits)
        self.out_logits = nn.Parameter(0.1 * torch.randn(base.out_features // length, config.rank, config.vectors))

    @property
    def rank(self) -> int:
        return len(self.in_logits)

    def mixture(self, logits: Tensor) -> Tensor:
        assert isinstance(self.shared, Bank)
        largest, at = logits.topk(self.top)
        # (..., top, 1) times (..., top, length)
        return (largest.softmax(-1)[..., None] * self.shared.bank.to(logits.device)[at]).sum(-2)

    def product(self) -> Factors:
        # (rank, in/length, length) and (out/length, rank, length)
        return Factors(self.mixture(self.in_logits).flatten(1), self.mixture(self.out_logits).mT.flatten(0, 1))

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        q, p = self.product()
        return add_low_rank(base, x, y, q=q, p=p, scale=1.0, dropout=self.dropout if self.training else 0.0)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("vblora", config=Config, foreign={"peft": NAMES})


@hookimpl
def tunerkit_shared(bases: Sequence[BaseLayer], config: Config) -> Bank:
    sides = [side for base in bases for side in (base.in_features, base.out_features)]
    at_most(config.top, 2, config.vectors, "top, the vectors in the bank")
    length = common_divisor(config.length, 256, sides, "length, both sides of all targets")
    return Bank(config, length)


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config, shared: Bank) -> Mixed:
    return Mixed(base, config, shared.bank.shape[1])


@hookimpl
def tunerkit_factors(adapter: Mixed) -> Factors:
    return adapter.product()
