"""Trainable tokens: some rows of an embedding are trained, all others stay as they are."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import TargetError
from tunerkit.plugin import (
    Adapter,
    AdapterConfig,
    BaseLayer,
    Factors,
    Method,
    Target,
    exact_patterns,
    hookimpl,
    matches,
    setting,
)

NAMES = {
    "type": "TRAINABLE_TOKENS",
    "tensors": {"rows": "trainable_tokens_delta"},
    "settings": {"tokens": "token_indices"},
    "ignored": ["init_weights"],
    "layers": ["Embedding"],
    "tied": "tied",
}


@attrs.frozen
class Config(AdapterConfig):
    """The settings of trainable tokens. By default the targets are the input's embedding and what is tied to it."""

    tokens: tuple[int, ...] | None = setting(
        None, ge=0, doc="ids whose rows are trained; None: the model's special tokens", aka=("token_indices",)
    )
    tied: bool | None = setting(
        None, doc="one set of rows for all targets, as they share one weight; None: if they do, when they are wrapped"
    )

    def problems(self) -> Iterable[str]:
        """What is wrong across fields."""
        if self.tokens == ():
            yield "expected ids of tokens, got none; leave it out for the model's special tokens @ $.tokens"

    def for_model(self, model: Any) -> Self:
        """Name the embedding, and the special tokens: those of the model's config, ``eos_token_id`` and the like.

        Raises:
            TargetError: A setting is missing, and the model names no embedding of tokens, or no such token; or the
                targets are tied by the setting alone.
        """
        found = self if self.targets and self.tokens else self._named(model)
        tied = _is_tied(model, found.targets or ())
        if self.tied and not tied:
            raise TargetError("tied is True, and the targets are not several modules with one weight; leave it out")
        return attrs.evolve(found, tied=tied if self.tied is None else self.tied)

    def _named(self, model: Any) -> Self:
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
        ids = self.tokens or tuple(dict.fromkeys(each for some in named for each in some if each in rows))
        if not ids:
            raise TargetError("the model's config names no token to train; say tokens=tokenizer.all_special_ids")
        return attrs.evolve(self, targets=self.targets or tuple(exact_patterns(at).values()), tokens=ids)


def _is_tied(model: nn.Module, targets: str | Sequence[str]) -> bool:
    """Whether the targets are several modules that share one weight."""
    patterns = (targets,) if isinstance(targets, str) else targets
    chosen = [each for path, each in model.named_modules() if any(matches(pattern, path) for pattern in patterns)]
    return len(chosen) > 1 and len({id(getattr(each, "weight", each)) for each in chosen}) == 1


class Rows(Adapter):
    """Replaces the rows ``ids`` (k,) of an embedding, or of an output head, by trained ``rows`` (k, features).

    They start as the base's own, and what is added is their difference. The padding row is never trained. An embedding
    and a head that is tied to it share the rows, as PEFT's do; those of other targets are each one's own.
    """

    reads_output = False
    reads_weight = True
    ids: Tensor

    def __init__(self, base: BaseLayer, ids: Sequence[int], *, is_tied: bool) -> None:
        super().__init__()
        self.of_head = base.linear
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        if not is_tied:
            self.rows = start_of(base, ids)

    @property
    def rank(self) -> int:
        return len(self.ids)

    @property
    def trained(self) -> Tensor:
        """The trained rows (k, features), which may be those of all targets."""
        return self.shared.get_parameter("rows") if self.has_shared else self.rows

    def change(self, base: BaseLayer) -> Tensor:
        """What is added to the rows: 0 at the start, since the base's are rounded as the trained ones are."""
        return self.trained - own_rows(base, self.ids).to(self.trained)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        change = self.change(base)
        x = x.to(change.device)
        if self.of_head:
            return y.index_add(-1, self.ids.to(y.device), base.project_in(x.to(change.dtype), change).to(y))
        return y + base.project_out((x.unsqueeze(-1) == self.ids).to(change), change.T).to(y)


class Tied(nn.Module):
    """The rows of all targets, which share one weight."""

    def __init__(self, base: BaseLayer, ids: Sequence[int]) -> None:
        super().__init__()
        self.rows = start_of(base, ids)


def own_rows(base: BaseLayer, ids: Tensor) -> Tensor:
    """The base's rows (k, features)."""
    weight = base.dense() if base.linear else base.dense().T
    return weight[ids.to(weight.device)]


def start_of(base: BaseLayer, ids: Sequence[int]) -> nn.Parameter:
    """The base's rows as trained ones. Core casts them to the adapter's dtype, which may be fp64."""
    own = own_rows(base, torch.tensor(ids))
    return nn.Parameter(own.to("cpu", torch.promote_types(own.dtype, torch.float32), copy=True))


def ids_at(base: BaseLayer, config: Config) -> tuple[int, ...]:
    """The ids to train, once each. Raises `TargetError` for one that the base has no row for."""
    padding, ids = getattr(base.module, "padding_idx", None), tuple(dict.fromkeys(config.tokens or ()))
    if not base.linear and not isinstance(base.module, nn.Embedding):
        raise TargetError(f"a {type(base.module).__name__} has no rows of tokens: name embeddings or output heads")
    size = base.out_features if base.linear else base.in_features
    if padding in ids or max(ids) >= size:
        wrong = f"row {padding}, the padding's, which is never trained" if padding in ids else f"row {max(ids)}"
        raise TargetError(f"it has {size} rows, and tokens names {wrong}; leave it out of tokens")
    return ids


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("trainable-tokens", config=Config, foreign={"peft": NAMES})


@hookimpl
def tunerkit_shared(targets: Sequence[Target], bases: Sequence[BaseLayer], config: Config) -> Tied | None:
    try:
        return Tied(bases[0], ids_at(bases[0], config)) if config.tied else None
    except TargetError as error:
        raise TargetError(f"{targets[0].path}: {error}") from error


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config) -> Rows:
    return Rows(base, ids_at(base, config), is_tied=bool(config.tied))


@hookimpl
def tunerkit_factors(adapter: Rows, base: BaseLayer) -> Factors:
    change = adapter.change(base)
    chosen = change.new_zeros(adapter.rank, base.out_features if adapter.of_head else base.in_features)
    chosen.scatter_(1, adapter.ids.to(change.device).unsqueeze(1), 1.0)
    return Factors(q=change, p=chosen.T) if adapter.of_head else Factors(q=chosen, p=change.T)
