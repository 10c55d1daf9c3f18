"""Variants of AdaLoRA that the package does not offer, to measure them against it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import tunerkit
import tunerkit_adalora.step as inner
from tunerkit.plugin import Tuner, optimizer_of
from tunerkit_adalora import allocator
from tunerkit_adalora.importance import Part, Stack, triplet_scores
from tunerkit_adalora.svd_form import to_svd_form_
from tunerkit_adalora.svd_layer import SvdLayer
from tunerkit_adalora.training import layers_of

_ADAM = ("exp_avg", "exp_avg_sq")

Score = Callable[[Sequence[Stack], Sequence[SvdLayer]], list[Tensor]]


def sensitivity(stacks: Sequence[Stack], _: Sequence[SvdLayer]) -> list[Tensor]:
    """The paper's score without its uncertainty: s = Ī."""
    return triplet_scores([_with_uncertainty(stack, torch.ones_like(stack.sensitivity)) for stack in stacks])


def exact(stacks: Sequence[Stack], _: Sequence[SvdLayer]) -> list[Tensor]:
    """Ī of λ alone: |λ ∂L/∂λ| is the first-order change of the loss when the whole triplet is removed."""
    own = [stack for stack in stacks if stack.part is Part.LAM]
    found = {index: mean for stack in own for index, mean in zip(stack.members, stack.sensitivity, strict=True)}
    return [found[index].clone() for index in sorted(found)]


def squared(stacks: Sequence[Stack], layers: Sequence[SvdLayer]) -> list[Tensor]:
    """The square of `exact`: near a minimum it is proportional to the change of the loss, so a cost can divide it.

    Without the triplet, the loss rises by half of λ² times the curvature. (∂L/∂λ)² approximates the curvature (the
    empirical Fisher information).
    """
    return [score.square() for score in exact(stacks, layers)]


def magnitude(_: Sequence[Stack], layers: Sequence[SvdLayer]) -> list[Tensor]:
    """The size of the triplet's part of ΔW, |λ| ‖P_i‖ ‖Q_i‖: its singular value if triplets are orthogonal."""
    return [layer.lam.abs() * layer.p.norm(dim=0) * layer.q.norm(dim=1) for layer in layers]


def _with_uncertainty(stack: Stack, uncertainty: Tensor) -> Stack:
    return Stack(stack.members, stack.sensitivity, uncertainty)


SCORES: dict[str, Score] = {"sensitivity": sensitivity, "exact": exact, "squared": squared, "magnitude": magnitude}


def turn_(
    layers: Sequence[SvdLayer],
    scores: Sequence[Tensor],
    optimizer: Optimizer | None,
    *,
    total: float,
    power: float = 1.0,
) -> None:
    """Do what `to_svd_form_` does, with λ in proportion to a ``power`` of the singular value.

    With an ``optimizer``, Adam's averages are rotated too; without one they stay as they are.
    """
    for layer, score in zip(layers, scores, strict=True):
        lam, q = layer.lam.detach().clone(), layer.q.detach().clone()
        to_svd_form_([layer], [score], total=total)
        if not torch.equal(layer.q, q):  # Q is unchanged if there is nothing to rotate
            _spread_(layer, total, power)
            if optimizer is not None:
                _turn_averages_(layer, optimizer, lam, q)


@torch.no_grad()
def _spread_(layer: SvdLayer, total: float, power: float) -> None:
    """Set λ in proportion to a power of the singular value; P Λ stays the same."""
    shares = layer.lam[layer.mask] ** power
    lam = total * shares / shares.sum()
    layer.p[:, layer.mask] *= layer.lam[layer.mask] / lam
    layer.lam[layer.mask] = lam


@torch.no_grad()
def _turn_averages_(layer: SvdLayer, optimizer: Optimizer, lam: Tensor, q: Tensor) -> None:
    """Rotate Adam's averages of the live triplets from the old ``lam`` and ``q`` to the current triplets."""
    live = layer.mask
    # Q' = M Q and P' Λ' = P Λ M⁻¹, so ∂L/∂P' = ∂L/∂P Λ⁻¹ Mᵀ Λ' and ∂L/∂Q' = M⁻ᵀ ∂L/∂Q.
    turn = torch.linalg.lstsq(q[live].T.double(), layer.q[live].T.double()).solution.T.to(q.dtype)
    on_p, on_q = (turn / lam[live]).T * layer.lam[live], torch.linalg.inv(turn).T
    mean_p, spread_p = (optimizer.state[layer.p][name] for name in _ADAM)
    mean_q, spread_q = (optimizer.state[layer.q][name] for name in _ADAM)
    mean_p[:, live] = mean_p[:, live] @ on_p
    spread_p[:, live] = spread_p[:, live] @ on_p.square()
    mean_q[live] = on_q @ mean_q[live]
    spread_q[live] = on_q.square() @ spread_q[live]
    if layer.lam in optimizer.state:
        optimizer.state[layer.lam]["exp_avg"][live] = 0.0


@torch.no_grad()
def restart_(model: nn.Module, *, q_scale: float = 1.0, q_orthonormal: bool = False) -> None:
    """Start with Q ``q_scale`` times as large and the scale divided by it, or with orthogonal rows as long as LoRA's.

    A larger Q changes its direction less per optimizer step, while the first steps of P move ΔW as far as before.
    """
    for layer in layers_in(model):
        if q_orthonormal:
            length = layer.q.norm() / len(layer.q) ** 0.5
            nn.init.orthogonal_(layer.q)
            layer.q.mul_(length)
        layer.q.mul_(q_scale)
        layer.scale /= q_scale


def scale_lambda_steps(model: nn.Module, optimizer: Optimizer, factor: float) -> None:
    """Multiply the steps of every λ by ``factor``."""
    lams = [layer.lam for layer in layers_in(model)]
    before: list[Tensor] = []

    def remember(*_: object) -> None:
        before[:] = [lam.detach().clone() for lam in lams]

    @torch.no_grad()
    def stretch(*_: object) -> None:
        for lam, old in zip(lams, before, strict=True):
            if lam.shape == old.shape:
                lam.copy_(old + factor * (lam - old))

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(stretch)


def layers_in(model: nn.Module) -> list[SvdLayer]:
    """The SVD layers, in the order of the targets."""
    return layers_of(tunerkit.tuner(model))


@contextmanager
def changed(
    *,
    score: str | None = None,
    per_parameter: bool = False,
    moments: bool = False,
    power: float = 1.0,
    root: float = 0.0,
) -> Iterator[None]:
    """AdaLoRA with another score, with scores per parameter, or with another re-parametrisation.

    ``moments`` (whether Adam's averages are rotated too) and ``power`` are explained at `turn_`. With ``root``, the λ
    of a target add up to less when fewer triplets are left: to the initial rank times that power of the share left.
    """
    after_step = inner.after_step

    def stepping(tuner: Tuner, step: int) -> dict[str, int] | None:
        layers = layers_of(tuner)

        def scored(stacks: Sequence[Stack]) -> list[Tensor]:
            scores = triplet_scores(stacks) if score is None else SCORES[score](stacks, layers)
            return [
                each / (layer.p.shape[0] + layer.q.shape[1] + 1) if per_parameter else each
                for each, layer in zip(scores, layers, strict=True)
            ]

        def turning(layers: Sequence[SvdLayer], scores: Sequence[Tensor], *, total: float) -> None:
            if moments or power != 1.0:
                turn_(layers, scores, optimizer_of(tuner) if moments else None, total=total, power=power)
                return
            for layer, each in zip(layers, scores, strict=True):
                to_svd_form_([layer], [each], total=total * (layer.rank / total) ** root)

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(inner, "triplet_scores", scored))
            if moments or power != 1.0 or root:
                stack.enter_context(mock.patch.object(allocator, "to_svd_form_", turning))
            return after_step(tuner, step)

    with mock.patch.object(inner, "after_step", stepping):
        yield
