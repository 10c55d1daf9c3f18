"""A PEFT LoRA as tunerkit's LoRA: ΔW = scale · B A, with the scale and the rank of each module."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import Factors, FileError, exact_patterns, is_broad, low_rank_factors
from tunerkit_peft.adapter_config import Settings
from tunerkit_peft.base_starts import refuse_bases, start_of
from tunerkit_peft.parts import Parts, matrices, refuse_ranks
from tunerkit_peft.products import Lazy, Read
from tunerkit_peft.rules import Rule, rules_for
from tunerkit_peft.selection import ends
from tunerkit_peft.weights import Weights


@attrs.frozen(eq=False)
class _Own:
    """One module's adapter: A (r, in), B (out, r), the numerator of the scale, and what is subtracted from B A.

    At a stack of E matrices, A is (E, r, in) and B is (E, out, r).
    """

    a: Tensor
    b: Tensor
    alpha: float
    start: Factors | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def tensors(self) -> dict[str, Tensor]:
        """What `tunerkit_lora` has at the module."""
        own = {"a": self.a, "b": self.b}
        return own if self.start is None else {**own, "a_start": self.start.q, "b_start": self.start.p}


def read_lora(
    settings: Settings,
    weights: Weights,
    parts: Sequence[Parts],
    modules: Mapping[str, nn.Module],
    rows: Mapping[str, Factors],
) -> Read:
    """Read the adapter.

    A row of A that is zero together with its column of B adds nothing and gets no gradient, so it can never train: it
    is padding, and is left out.

    Args:
        settings: The adapter's settings.
        weights: Its tensors.
        parts: What is at each module.
        modules: The model's modules.
        rows: What is added at other modules.

    Raises:
        FileError: A rank has no explanation in the settings, a pattern cannot be used, or the base cannot tell what
            PEFT has subtracted from it.
    """
    rules = rules_for(settings, dict.fromkeys(each.place.owner for each in parts))
    ranks = {each.name: _rank(settings, weights, each, modules, rules[each.place.owner].ranks) for each in parts}
    refuse_ranks(settings, weights, [*_unexplained(parts, ranks, rules)])
    own = {each.place.path: _own(settings, weights, each, rules[each.place.owner], ranks[each.name]) for each in parts}
    if settings.start:
        refuse_bases(settings.start, weights.file, modules, [*own])
        if odd := [path for path, rule in rules.items() if rule.alpha <= 0]:
            raise FileError(
                f"{weights.file}: alpha is {rules[odd[0]].alpha:g} at {odd[0]!r}, and 'init_lora_weights' "
                f"{settings.start!r} divides by it; it must be above 0"
            )
        own = {path: _started(settings, each, modules.get(path)) for path, each in own.items()}
    own |= {path: _row(settings, each) for path, each in rows.items()}
    return Read(
        factors=Lazy({path: _Product(each, settings.rslora) for path, each in own.items()}),
        config=_config(settings, own),
        tensors={path: each.tensors() for path, each in own.items()},
    )


@attrs.frozen(eq=False)
class _Product:
    """Computes the product of one module."""

    own: _Own
    rslora: bool

    def __call__(self) -> Factors:
        own = self.own
        scale = own.alpha / _divisor(own.rank or 1, self.rslora)
        if own.start is None:
            return low_rank_factors(own.a, own.b, scale=scale)
        return low_rank_factors(torch.cat([own.a, own.start.q]), torch.cat([own.b, -own.start.p], 1), scale=scale)


def _rank(
    settings: Settings, weights: Weights, parts: Parts, modules: Mapping[str, nn.Module], allowed: Collection[int]
) -> int:
    """The rank that PEFT divides by: above that of the tensors where such a start finds no more directions."""
    most = min(weights.shape(parts.names["A"])[1], weights.shape(parts.names["B"])[0])
    if not settings.start or parts.rank != most or isinstance(modules.get(parts.place.path), nn.Embedding):
        return parts.rank
    return min(allowed) if len(allowed) == 1 and min(allowed) > most else parts.rank


def _own(settings: Settings, weights: Weights, parts: Parts, rule: Rule, rank: int) -> _Own:
    a, b = matrices(weights, parts)
    used = a.any(dim=-1) | b.any(dim=-2)
    used = used.any(dim=0) if parts.is_stack else used
    kept = parts.rank if settings.start else int(used.sum())
    if kept < len(used):
        a, b = a[..., used, :], b[..., used]
    if rule.alpha <= 0:  # tunerkit's are above 0, so the scale goes into B
        scale = rule.alpha / _divisor(parts.rank, settings.rslora)
        return _Own(a, b * scale, alpha=_divisor(kept, settings.rslora))
    # The scale stays as it was with the padding.
    alpha = rule.alpha * _divisor(kept, settings.rslora) / _divisor(rank, settings.rslora)
    return _Own(a, b, alpha=rule.alpha if kept == rank else alpha)


def _started(settings: Settings, own: _Own, module: nn.Module | None) -> _Own:
    """The adapter with what PEFT has subtracted from the base."""
    if module is None:
        return own
    scale = own.alpha / _divisor(own.rank, settings.rslora)
    return attrs.evolve(own, start=start_of(settings.start, module, own.rank, scale))


def _row(settings: Settings, rows: Factors) -> _Own:
    """A product as an adapter of scale 1."""
    own = _Own(rows.q, rows.p, alpha=_divisor(rows.rank, settings.rslora))
    zeros = Factors(q=torch.zeros_like(rows.q), p=torch.zeros_like(rows.p))
    return attrs.evolve(own, start=zeros) if settings.start else own


def _divisor(rank: int, rslora: bool) -> float:
    return math.sqrt(rank) if rslora else float(rank)


def _unexplained(parts: Sequence[Parts], ranks: Mapping[str, int], rules: Mapping[str, Rule]) -> Iterator[str]:
    for each in parts:
        if ranks[each.name] not in (allowed := rules[each.place.owner].ranks):
            expected = " or ".join(map(str, sorted(allowed)))
            yield f"{each.names['A']} has rank {each.rank}; 'r' and 'rank_pattern' say {expected}"


def _config(settings: Settings, own: Mapping[str, _Own]) -> dict[str, object]:
    """The settings of `tunerkit_lora`: the most common rank and alpha, and patterns for the others."""
    live = {path: each for path, each in own.items() if each.rank > 0}
    rank = _common([each.rank for each in live.values()], settings.rank)
    alpha = _common([each.alpha for each in live.values()], max(settings.alpha, 1.0))
    names = _names(own)
    return {
        "rank": int(rank),
        "alpha": alpha,
        "dropout": settings.dropout,
        "rslora": settings.rslora,
        **({"start": settings.start} if settings.start else {}),
        "rank_pattern": {names[path]: each.rank for path, each in own.items() if each.rank != rank},
        "alpha_pattern": {names[path]: each.alpha for path, each in live.items() if each.alpha != alpha},
    }


def _common(values: Sequence[float], default: float) -> float:
    return Counter(values).most_common(1)[0][0] if values else default


def _names(own: Mapping[str, object]) -> dict[str, str]:
    """A pattern for each path. The path itself is one, unless it is the end of another: it is faster to match."""
    counted = Counter(end for path in own for end in ends(path))
    exact = exact_patterns(own)
    return {path: exact[path] if counted[path] > 1 or is_broad(path) else path for path in own}
