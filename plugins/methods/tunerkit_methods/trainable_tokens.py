"""Trainable tokens: some rows of an embedding are trained, all others stay as they are."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Self

import attrs
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from tunerkit.errors import TargetError
from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Factors, Method, exact_patterns, hookimpl, setting

NAMES = {
    "type": "TRAINABLE_TOKENS",
    "tensors": {"rows": "trainable_tokens_delta"},
    "settings": {"tokens": "token_indices"},
    "ignored": ["init_weights"],
    "layers": ["Embedding"],
}


@attrs.frozen
class Config(AdapterConfig):
    """The settings of trainable tokens. By default the targets are the input's embedding and what is tied to it."""

    tokens: tuple[int, ...] | None = setting(
        None, ge=0, doc="ids whose rows are trained; None: the model's special tokens", aka=("token_indices",)
    )

    def for_model(self, model: Any) -> Self:
        """Name the embedding, and the special tokens: those of the model's config, ``eos_token_id`` and the like.

        Raises:
            TargetError: A setting is missing, and the model names no embedding of tokens.
        """
        if self.targets and self.tokens:
            return self
        first = next((each for each in model.modules() if isinstance(each, nn.Embedding)), None)
        found = None if hasattr(model, "get_input_embeddings") else first
        with suppress(NotImplementedError, AttributeError):
            found = model.get_input_embeddings()
        if not isinstance(found, nn.Embedding):
            raise TargetError("this model names no embedding of tokens; say both targets=[...] and tokens=[...]")
        at = [path for path, each in model.named_modules() if getattr(each, "weight", None) is found.weight]
        config = getattr(model, "config", None)
        fields = (config if isinstance(config, Mapping) else getattr(config, "__dict__", {})).items()
        named = [value if isinstance(value, list) else [value] for key, value in fields if key.endswith("_token_id")]
        rows = set(range(found.num_embeddings)) - {found.padding_idx}
        ids = tuple(dict.fromkeys(each for some in named for each in some if each in rows))
        return attrs.evolve(self, targets=self.targets or tuple(exact_patterns(at).values()), tokens=self.tokens or ids)


class Rows(Adapter):
    """Replaces the rows ``ids`` (k,) of an embedding, or of an output head, by trained ``rows`` (k, features).

    They start as the base's own, and what is added is their difference. The padding row is never trained.
    An embedding and a head that is tied to it have rows of their own each, and may come to differ; PEFT's share theirs.
    """

    reads_output = False
    reads_weight = True
    ids: Tensor

    def __init__(self, base: BaseLayer, ids: tuple[int, ...], of_head: bool) -> None:
        super().__init__()
        self.of_head = of_head
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
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


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("trainable-tokens", config=Config, foreign={"peft": NAMES})


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config) -> Rows:
    padding, ids = getattr(base.module, "padding_idx", None), tuple(dict.fromkeys(config.tokens or ()))
    if not base.linear and not isinstance(base.module, nn.Embedding):
        raise TargetError(f"a {type(base.module).__name__} has no rows of tokens: name embeddings or output heads")
    size = base.out_features if base.linear else base.in_features
    if not ids:
        raise TargetError("the model's config names no token to train; say tokens=tokenizer.all_special_ids")
    if padding in ids or max(ids) >= size:
        wrong = f"row {padding}, the padding's, which is never trained" if padding in ids else f"row {max(ids)}"
        raise TargetError(f"it has {size} rows, and tokens names {wrong}; leave it out of tokens")
    return Rows(base, ids, base.linear)


@hookimpl
def tunerkit_factors(adapter: Rows, base: BaseLayer) -> Factors:
    change = adapter.change(base)
    chosen = one_hot(adapter.ids, base.out_features if adapter.of_head else base.in_features).to(change)
    return Factors(q=change, p=chosen.T) if adapter.of_head else Factors(q=chosen, p=change.T)
