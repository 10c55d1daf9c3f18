"""Initialization of adapters and ranks from data: EVA from the layers' inputs, LoRA-One from the gradient."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tunerkit.plugin import BaseLayer, Factors, Statistics, StepError, Tuner, resize_
from tunerkit_lora.adapter import LoraAdapter
from tunerkit_lora.config import LoraConfig
from tunerkit_lora.subtracted import SubtractedLora

_GAMMA = 64.0  # γ of LoRA-One's stable scale, as its authors ran it


def refuse_unfitted(tuner: Tuner) -> None:
    """Raise `StepError` if the adapter was neither calibrated nor loaded. Call it if the initialization needs data."""
    config, progress = _config(tuner), tuner.progress
    if progress.calibration is None and not progress.loaded:
        raise StepError(
            f"start {config.start!r} is computed from data, but adapter {tuner.name!r} was not calibrated: call "
            "tunerkit.calibrate(model, batches) between wrap and attach"
        )


def fit_(
    tuner: Tuner, statistics: Mapping[str, Statistics], bases: Mapping[str, BaseLayer]
) -> Mapping[str, int] | None:
    """Initialize all adapters from the statistics, and set their ranks; return the ranks if they changed."""
    config, before = _config(tuner), tuner.ranks()
    if config.start == "eva":
        _fit_inputs_(tuner, config, statistics)
    else:
        _fit_gradients_(tuner, config, statistics, bases)
    after = tuner.ranks()
    return None if after == before else after


def all_b(tuner: Tuner) -> list[nn.Parameter]:
    """Return the B of every target."""
    return [adapter.b for adapter in tuner.adapters().values() if isinstance(adapter, LoraAdapter | SubtractedLora)]


def _config(tuner: Tuner) -> LoraConfig:
    assert isinstance(tuner.config, LoraConfig)
    return tuner.config


# --- By the inputs ----------------------------------------------------------------------------------------------------


def _fit_inputs_(tuner: Tuner, config: LoraConfig, statistics: Mapping[str, Statistics]) -> None:
    """EVA: A is the inputs' first principal components; ranks go to the components with the most explained variance.

    Paischer et al., arXiv 2410.07170, Algorithm 1. Explained variance is relative to the component's own layer. Layers
    with the same input, such as a query and a key, tie; the first of them in the model gets a rank that is left over.
    """
    found = _once_each(statistics)
    shares = {path: _explained(each)[: _cap(path, config, each)] for path, each in found.items()}
    ranks = {path: config.rank_at(path) for path in found}
    if config.most > 1:
        ranks = _largest(shares, sum(ranks.values()))
    for path, adapter in tuner.adapters().items():
        assert isinstance(adapter, LoraAdapter)
        _start_(adapter, _directions(found[path])[: ranks[path]], ranks[path])


def _once_each(statistics: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """Share one approximation between layers with the same input, recognized by equal rows, variance and width."""
    first: dict[tuple[int, float, int], Statistics] = {}
    return {
        path: first.setdefault((each.rows, each.variance, _components(each).shape[1]), each)
        for path, each in statistics.items()
    }


def _components(found: Statistics) -> Tensor:
    assert found.centred is not None  # requested
    return found.centred


def _explained(found: Statistics) -> list[float]:
    """Return the share of the variance that each component explains."""
    squares = _components(found).double().square().sum(dim=1)
    return (squares / found.variance if found.variance > 0 else squares.zero_()).tolist()


def _directions(found: Statistics) -> Tensor:
    """Return the components, (k, in), normalized to length 1, without components of zero variance."""
    components = _components(found)
    lengths = torch.linalg.vector_norm(components, dim=1)
    kept: Tensor = components[lengths > 0] / lengths[lengths > 0, None]
    return kept


def _cap(path: str, config: LoraConfig, found: Statistics) -> int:
    return min(round(config.most * config.rank_at(path)), _components(found).shape[1])


def _largest(shares: Mapping[str, Sequence[float]], budget: int) -> dict[str, int]:
    """Give each rank of the budget to the largest remaining share; ties go to the first target."""
    ordered = sorted(((share, path) for path, own in shares.items() for share in own), key=lambda each: -each[0])
    ranks = dict.fromkeys(shares, 0)
    for _, path in ordered[:budget]:
        ranks[path] += 1
    return ranks


def _start_(adapter: LoraAdapter, directions: Tensor, rank: int) -> None:
    """Set A to the directions, with random rows if there are too few, and B to 0."""
    own = adapter.a.detach()
    missing = rank - len(directions)
    if missing > len(own):
        own = nn.init.kaiming_uniform_(own.new_empty(missing, own.shape[1]), a=math.sqrt(5))
    resize_(adapter.a, torch.cat([directions.to(own), own[: max(missing, 0)]]))
    resize_(adapter.b, adapter.b.new_zeros(adapter.b.shape[0], rank))


# --- By the gradient --------------------------------------------------------------------------------------------------


def _fit_gradients_(
    tuner: Tuner, config: LoraConfig, statistics: Mapping[str, Statistics], bases: Mapping[str, BaseLayer]
) -> None:
    """LoRA-One: A and B are the first singular vectors of −∂L/∂W (Zhang et al., arXiv 2502.01235).

    The paper starts with ΔW = B A, which is a step along the gradient. Here the initial B A is subtracted, so training
    starts at the base. A and B span the gradient's leading subspaces, and the optimizer takes the step.
    """
    found = {path: _gradient(each) for path, each in statistics.items()}
    ranks = {path: config.rank_at(path) for path in found}
    if config.most > 1:
        scores = {path: _importance(each, bases[path]) for path, each in found.items()}
        caps = {path: min(round(config.most * ranks[path]), *bases[path].dense().shape) for path in found}
        ranks = _in_proportion(scores, caps, sum(ranks.values()))
    for path, adapter in tuner.adapters().items():
        assert isinstance(adapter, SubtractedLora)
        adapter.set_start_(_first_triplets(found[path], ranks[path]))


def _gradient(found: Statistics) -> Factors:
    assert found.gradients is not None  # requested
    return found.gradients


def _first_triplets(gradient: Factors, rank: int) -> Factors:
    """Return A (r, in) and B (out, r) from the largest singular triplets of the gradient P Q.

    The triplets are scaled so that the largest singular value of B A is √out / γ, as in the authors' code.
    """
    u, sigma, vh = gradient.triplets()
    root = (sigma[:rank] / sigma[:1].clamp(min=1e-300)).sqrt() * (len(u) ** 0.25 / _GAMMA**0.5)
    return Factors(q=root[:, None] * vh[:rank], p=-u[:, :rank] * root)


def _importance(gradient: Factors, base: BaseLayer) -> float:
    """GoRA's importance of a matrix, mean |W ∘ ∂L/∂W| (He et al., arXiv 2502.12171)."""
    weight = base.dense().float()
    return float((weight * (gradient.p @ gradient.q).to(weight)).abs().mean())


def _in_proportion(scores: Mapping[str, float], caps: Mapping[str, int], budget: int) -> dict[str, int]:
    """Divide a budget of ranks in proportion to scores, up to caps, with the largest-remainder method."""
    ranks: dict[str, int] = {}
    while (open_ := {path: score for path, score in scores.items() if path not in ranks}) and budget > 0:
        total = sum(open_.values())
        parts = {path: budget * (score / total if total else 1 / len(open_)) for path, score in open_.items()}
        full = {path: caps[path] for path, part in parts.items() if part >= caps[path]}
        if not full:
            floors = {path: int(part) for path, part in parts.items()}
            rest = sorted(parts, key=lambda path: floors[path] - parts[path])[: budget - sum(floors.values())]
            return {path: ranks.get(path, floors.get(path, 0)) + (path in rest) for path in scores}
        ranks |= full
        budget -= sum(full.values())
    return {path: ranks.get(path, 0) for path in scores}
