"""Trainable tokens: some rows of an embedding are trained, all others stay as they are."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from tunerkit.errors import TargetError
from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Factors, Method, hookimpl, setting

NAMES = {
    "type": "TRAINABLE_TOKENS",
    "tensors": {"rows": "trainable_tokens_delta"},
    "settings": {"tokens": "token_indices"},
    "ignored": ["init_weights"],
    "layers": ["Embedding"],
}
# What libraries call the embedding of the input's tokens.
_INPUTS = "embed_tokens|word_embeddings|wte|tok_embeddings|token_embeddings|embed_in|word_embedding|shared"


@attrs.frozen
class Config(AdapterConfig):
    """The settings of trainable tokens."""

    tokens: tuple[int, ...] | None = setting(
        None,
        ge=0,
        doc="ids whose rows are trained; None: the special tokens of the model's config",
        aka=("token_indices",),
    )
    targets: str | tuple[str, ...] | None = setting(
        f"re:(.*\\.)?({_INPUTS})", doc="Embeddings, and output heads: by default those of the input's tokens."
    )


class Rows(Adapter):
    """Replaces the rows ``ids`` (k,) of an embedding, or of an output head, by trained ``rows`` (k, features).

    They start as the base's own, and what is added is their difference. Their padding row is never trained.
    """

    reads_output = False
    reads_weight = True
    rank_dims: ClassVar[Mapping[str, int]] = {"rows": 0, "ids": 0}  # a file knows its ids
    ids: Tensor

    def __init__(self, base: BaseLayer, ids: list[int], of_head: bool) -> None:
        super().__init__()
        self.of_head = of_head
        self.register_buffer("ids", torch.tensor(ids))
        own = self.own(base)
        # Core casts them to the adapter's dtype, which may be fp64.
        self.rows = nn.Parameter(own.to("cpu", torch.promote_types(own.dtype, torch.float32), copy=True))

    @property
    def rank(self) -> int:
        return len(self.ids)

    def own(self, base: BaseLayer) -> Tensor:
        """The base's rows (k, features)."""
        weight = base.dense() if self.of_head else base.dense().T
        return weight[self.ids.to(weight.device)]

    def change(self, base: BaseLayer) -> Tensor:
        """What is added to the rows: 0 at the start, since the base's are rounded as the trained ones are."""
        return self.rows - self.own(base).to(self.rows)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        change, x = self.change(base), x.to(self.rows.device)
        if self.of_head:
            return y.index_add(-1, self.ids.to(y.device), base.project_in(x.to(change.dtype), change).to(y))
        return y + base.project_out((x.unsqueeze(-1) == self.ids).to(change), change.T).to(y)


def special_tokens(model: Any) -> list[int]:
    """The ids that a model's config names: those of its fields ``eos_token_id``, ``pad_token_id`` and the like."""
    fields = vars(model.config).items() if hasattr(model, "config") else ()
    named = [value if isinstance(value, list) else [value] for key, value in fields if key.endswith("_token_id")]
    return [each for ids in named for each in ids if each is not None]


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("trainable-tokens", config=Config, foreign={"peft": NAMES})


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config, model: nn.Module) -> Rows:
    of_head, padding = base.linear, getattr(base.module, "padding_idx", None)
    if not of_head and not isinstance(base.module, nn.Embedding):
        raise TargetError(f"a {type(base.module).__name__} has no rows of tokens: name embeddings or output heads")
    size = base.out_features if of_head else base.in_features
    fitting = [each for each in special_tokens(model) if each < size and each != padding]
    ids = list(dict.fromkeys(fitting if config.tokens is None else config.tokens))
    if not ids:
        raise TargetError("the model's config names no token to train; say tokens=tokenizer.all_special_ids")
    if padding in ids or max(ids) >= size:
        wrong = f"row {padding}, the padding's, which is never trained" if padding in ids else f"row {max(ids)}"
        raise TargetError(f"it has {size} rows, and tokens names {wrong}; leave it out of tokens")
    return Rows(base, ids, of_head)


@hookimpl
def tunerkit_factors(adapter: Rows, base: BaseLayer) -> Factors:
    change = adapter.change(base)
    chosen = one_hot(adapter.ids, base.out_features if adapter.of_head else base.in_features).to(change)
    return Factors(q=change, p=chosen.T) if adapter.of_head else Factors(q=chosen, p=change.T)
