"""A PEFT LoRA or AdaLoRA as tunerkit's, with the scale and the rank of each module.

Of a LoRA ΔW = scale · B A, of an AdaLoRA ΔW = (alpha/init_rank) · P Λ Q.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import first, shown
from tunerkit.plugin import Factors, FileError, TargetError, exact_patterns, file_matchers, is_broad, low_rank_factors
from tunerkit_peft.paths import place_of
from tunerkit_peft.settings import Settings
from tunerkit_peft.targets import ends
from tunerkit_peft.tensors import Lazy, Parts, Read, Weights, matrices, refuse_ranks

Value = TypeVar("Value")
# Nothing in it repeats or chooses, so the standard library matches it at once. Files have hundreds of these.
_SIMPLE: Final = re.compile(r"\^?(?:[\w-]|\.|\\[^\w])+")


@attrs.frozen
class Rule:
    """What the settings say of one module.

    Attributes:
        ranks: The ranks that they allow: ``r``, or those of the patterns that match.
        alpha: The numerator of its scale.
    """

    ranks: frozenset[int]
    alpha: float


def rules_for(settings: Settings, paths: Iterable[str]) -> dict[str, Rule]:
    """Apply ``rank_pattern`` and ``alpha_pattern`` to module paths, as PEFT does.

    Where several patterns match, PEFT takes the first one, but it has sorted them in the file. So the rank must be that
    of one of them, and the alpha must be the same in all.

    Args:
        settings: The adapter's settings.
        paths: The modules' paths.

    Raises:
        FileError: A pattern is malformed or takes too many steps, or the alpha of a module is ambiguous.
    """
    file, there = settings.common.file, list(paths)
    ranks = matched(file, "rank_pattern", settings.ranks, there)
    alphas = matched(file, "alpha_pattern", settings.alphas, there)
    return {
        path: Rule(
            frozenset(ranks[path].values()) or frozenset({settings.rank}),
            agreed(file, "alpha_pattern", alphas[path], path, settings.alpha),
        )
        for path in there
    }


def matched(file: Path, field: str, table: Mapping[str, Value], paths: Iterable[str]) -> dict[str, dict[str, Value]]:
    r"""Return the patterns that match each path, with their values.

    PEFT compares ``(.*\.)?(PATTERN)`` with a whole path.

    Raises:
        FileError: A pattern is malformed or takes too many steps.
    """
    whole = {pattern: rf"(.*\.)?({pattern})" for pattern in table}
    simple = {text: re.compile(text) for pattern, text in whole.items() if _SIMPLE.fullmatch(pattern)}
    try:
        others = file_matchers(text for text in whole.values() if text not in simple)
        matches = {pattern: others.get(text) or simple[text].fullmatch for pattern, text in whole.items()}
        return {path: {each: table[each] for each in table if matches[each](path)} for path in paths}
    except TargetError as error:
        raise FileError(
            f"{file}: {field!r} has a pattern that cannot be used: {error}. Replace it with the names of the modules"
        ) from error


def agreed(file: Path, field: str, found: Mapping[str, Value], path: str, default: Value) -> Value:
    """Return the value of the patterns that match a path; the default if none does.

    Raises:
        FileError: They have several values.
    """
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{value} by {shown(pattern)}" for pattern, value in sorted(found.items()))
        raise FileError(
            f"{file}: {field!r} has several values for {path!r}: {listed}. PEFT takes "
            "the first one, but it sorts the patterns when it saves, so the order is lost, and with it the scale. "
            "Leave one of them in the file"
        )
    return next(iter(found.values()), default)


_FULL: Final = (torch.float32, torch.float64)
_AWAY: Final = " has no weights"


class NeedsWeightsError(FileError, NotImplementedError):
    """The base's values are needed, and it is on the meta device.

    It derives from the class of torch's own error for that: where the command meets one, it loads the base's values.
    """


def start_of(kind: str, module: nn.Module, rank: int, scale: float) -> Factors:
    """Return A₀ (r, in) and B₀ (out, r), of a module that `refuse_bases` has accepted. An embedding's are zeros."""
    held: Any = module.weight
    weight: Tensor = held.detach().to(torch.float32)  # on its device, which may be much faster
    if isinstance(module, nn.Embedding):  # which PEFT starts as without PiSSA
        return Factors(q=torch.zeros(rank, len(weight)), p=torch.zeros(weight.shape[1], rank))
    if kind == "olora":
        q, r = torch.linalg.qr(weight)
        return Factors(q=r[:rank].cpu(), p=q[:, :rank].cpu())
    if not isinstance(module, nn.Linear):  # Conv1D holds its transpose
        weight = weight.T
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (sigma[:rank] / scale).sqrt()
    return Factors(q=(root[:, None] * vh[:rank]).cpu(), p=(u[:, :rank] * root).cpu())


def refuse_bases(kind: str, source: object, modules: Mapping[str, nn.Module], paths: Sequence[str]) -> None:
    """Raise `FileError` if the start cannot be computed again from the weights that the model holds."""
    if wrong := [*_obstacles(kind, modules, paths)]:
        title = (
            f"{source}: 'init_lora_weights' is {shown(kind)}, so PEFT has subtracted a part of the base's weights, and "
            "that is computed again from a base in full precision. Load the base with its weights, in float32, as in "
            "from_pretrained(..., dtype=torch.float32), and the adapter onto that with tunerkit.load(model, folder): "
            "tunerkit.from_folder leaves a base in the dtype that it is stored in. Or convert the adapter in PEFT: "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=...). Here:"
        )
        is_away = any(each.endswith(_AWAY) for each in wrong)
        raise (NeedsWeightsError if is_away else FileError)("\n- ".join([title, *first(wrong)]))


def _obstacles(kind: str, modules: Mapping[str, nn.Module], paths: Sequence[str]) -> Iterator[str]:
    for path in paths:
        module = modules.get(path)
        if module is None:
            continue  # as core will say
        weight = getattr(module, "weight", None)
        transposes = type(module).__name__ == "Conv1D"
        if not (isinstance(module, nn.Linear | nn.Embedding) or (transposes and kind == "pissa")):
            yield f"{path} is a {type(module).__name__}, for which PEFT has no such start"
        elif not isinstance(weight, Tensor) or type(weight.detach()) is not Tensor or not weight.is_floating_point():
            yield f"{path} is quantised"
        elif weight.is_meta:
            yield f"{path}{_AWAY}"
        elif weight.dtype not in _FULL:
            yield f"{path} is in {str(weight.dtype).removeprefix('torch.')}"


EPSILON: Final = 1e-5  # PEFT divides by the rank plus this
_LAMBDA: Final = ".lora_E"


def read_adalora(settings: Settings, weights: Weights, parts: Sequence[Parts]) -> Read:
    """Read the adapter. PEFT's scale, alpha/(init_r + 1e-5), goes into λ where it differs from tunerkit's.

    With an alpha of 0 or less PEFT takes the rank that a module has when it is loaded in place of alpha.

    Args:
        settings: The adapter's settings.
        weights: Its tensors.
        parts: What is at each module.

    Raises:
        FileError: A rank has no explanation in the settings.
    """
    expected = _expected(settings)
    refuse_ranks(
        settings,
        weights,
        [
            f"{each.names['A']} has rank {each.rank}; 'init_r' and 'rank_pattern' say {wanted}"
            for each in parts
            if each.rank != (wanted := expected.get(each.place.owner, settings.rank))
        ],
    )
    initial = settings.rank
    alpha = settings.alpha if settings.alpha > 0 else float(initial)
    tensors = {each.place.path: _tensors(settings, weights, each) for each in parts}
    return Read(
        factors=Lazy({path: _Triplets(own, alpha / initial) for path, own in tensors.items()}),
        config=_adalora_config(settings, alpha),
        tensors=tensors,
    )


class _Triplets:
    """Computes the product of one module."""

    def __init__(self, own: Mapping[str, Tensor], scale: float) -> None:
        self._own, self._scale = own, scale

    def __call__(self) -> Factors:
        return low_rank_factors(self._own["q"], self._own["p"], lam=self._own["lam"], scale=self._scale)


def _tensors(settings: Settings, weights: Weights, parts: Parts) -> dict[str, Tensor]:
    a, b = matrices(weights, parts)
    numerator = settings.rank if settings.alpha > 0 else parts.rank
    # Over the initial rank, tunerkit's own divisor, this is PEFT's scale.
    lam = weights.matrix(parts.names["E"]).squeeze(1) * (numerator / (settings.rank + EPSILON))
    return {"p": b, "lam": lam, "q": a, "mask": torch.ones(parts.rank, dtype=torch.bool)}


def _expected(settings: Settings) -> dict[str, int]:
    """The rank of each module that ``rank_pattern`` names: ``path.lora_E``, or with an adapter's name after it."""
    live = settings.live or {}
    return {place_of(name.rpartition(_LAMBDA)[0], str).owner: rank for name, rank in live.items() if _LAMBDA in name}


def _adalora_config(settings: Settings, alpha: float) -> dict[str, object]:
    """The settings of `tunerkit_adalora`. Steps become shares of training: the next one has another length."""
    own = settings.schedule
    total = own.total_step if own.tinit + own.tfinal < own.total_step else 0
    return {
        "init_rank": settings.rank,
        "target_rank": min(own.target_r, settings.rank),
        "alpha": alpha,
        "dropout": settings.dropout,
        "t_init": own.tinit / total if total else 0.0,
        "t_final": own.tfinal / total if total else 0.0,
        "delta_t": own.delta_t,
        **({"beta1": own.beta1} if own.beta1 > 0 else {}),  # at 0 every score is 0
        "beta2": own.beta2,
        "gamma": own.orth_reg_weight,
        "orthogonality": "reference",
        "start": "gaussian",
    }


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
        config=_lora_config(settings, own),
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


def _lora_config(settings: Settings, own: Mapping[str, _Own]) -> dict[str, object]:
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
