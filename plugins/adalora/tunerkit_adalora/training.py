"""What AdaLoRA does around an optimizer step: importance, budget, allocation, masks, shrinking."""

import sys
import warnings
from collections.abc import Sequence
from itertools import accumulate, pairwise

import attrs
import torch
from torch import Tensor, nn

from tunerkit import StepError, Tuner, TunerkitWarning, optimizer_of
from tunerkit_adalora.allocator import allocate
from tunerkit_adalora.budget import check_bounds, costs_of, live_budget, schedule_of
from tunerkit_adalora.config import AdaLoraConfig
from tunerkit_adalora.importance import Stack, new_stacks, smooth_, triplet_scores, unstack
from tunerkit_adalora.orthogonality import add_gradient_
from tunerkit_adalora.schedule import Schedule
from tunerkit_adalora.shrinking import shrink_layers_
from tunerkit_adalora.svd_form import copies_in, to_svd_form_
from tunerkit_adalora.svd_layer import SvdLayer, apply_masks_


@attrs.define(eq=False)
class Training:
    """AdaLoRA's training state. ``layers`` are in the order of the targets, ``stacks`` the averages of their weights.

    The layers were in the model at the last allocation; the step hooks take them from here, since to look for all of
    them costs more than what is done with them.

    ``held`` are the λ that the step now taken leaves alone, with their gradients.
    ``averaged`` counts the steps since the last allocation, ``seen`` their gradients, ``left_out`` (0-d, on the
    device) the bad ones among these. ``blank`` until a step was averaged at all; ``anew`` from a turn to the next step,
    whose gradients are the first of the new triplets. ``sizes`` are the layers' triplets in memory, dead ones included.
    """

    layers: list[SvdLayer]
    schedule: Schedule
    stacks: list[Stack]
    left_out: Tensor
    in_force: int
    sizes: list[int]
    held: list[tuple[nn.Parameter, Tensor]] = attrs.field(factory=list)
    last_step: int = 0
    final: bool = False
    shrunk: bool = False
    blank: bool = True
    anew: bool = False
    averaged: int = 0
    seen: int = 0

    @property
    def averages(self) -> tuple[list[Tensor], list[Tensor]]:
        """Ī and Ū of P, λ, Q of the first layer, of the second, and so on; nothing once the ranks are final."""
        return unstack(self.stacks)


def start(tuner: Tuner, total_steps: int) -> Training:
    """The state before the first step: averages at 0. Every triplet is live from the first step on, not before.

    An adapter that was loaded pruned keeps its masks until then, so that it can still be saved as it is. Triplets that
    have left memory stay away: the budget then falls from what there is.
    """
    config = config_of(tuner)
    layers = layers_of(tuner)
    _refuse_sharded(tuner, weights_of(layers))
    there = sum(len(layer.lam) * cost for layer, cost in zip(layers, costs_of(config, layers), strict=True))
    configured = schedule_of(config, layers, total_steps)
    check_bounds(config, tuner.targets, layers, configured.target)
    return Training(
        layers=layers,
        schedule=attrs.evolve(configured, initial=there, target=min(configured.target, there)),
        stacks=new_stacks(weights_of(layers)),
        left_out=torch.zeros((), dtype=torch.int64, device=layers[0].lam.device),
        in_force=live_budget(config, layers),
        sizes=[len(layer.lam) for layer in layers],
    )


def _refuse_sharded(tuner: Tuner, weights: Sequence[Tensor]) -> None:
    # Where nobody has imported it there is none, and importing it takes long.
    sharding = sys.modules.get("torch.distributed.tensor")
    # By the few types and not by the many weights: this is asked at each step.
    if sharding is not None and any(issubclass(kind, sharding.DTensor) for kind in {type(w) for w in weights}):
        raise StepError(
            f"adapter {tuner.name!r} has DTensors for weights (fully_shard?), and AdaLoRA scores whole triplets: it "
            "cannot train them yet; train in one process or with DDP"
        )


def before_step(tuner: Tuner, grad_scale: Tensor | None) -> None:
    """Before the weights move: add the regulariser's gradient, once per step, scaled as the gradients are; hold λ."""
    config = config_of(tuner)
    training = training_of(tuner)
    weights = weights_of(training.layers)
    _refuse_sharded(tuner, weights)
    if [len(lam) for lam in weights[1::3]] != training.sizes:
        raise StepError(
            f"adapter {tuner.name!r} has other ranks than when it was attached (load_state_dict of a checkpoint?), so "
            "the optimizer's state does not fit; load the optimizer's state too, then tunerkit.load_state"
        )
    if config.gamma > 0:
        pairs = list(zip(weights[0::3], weights[2::3], strict=True))
        add_gradient_(pairs, gamma=config.gamma, form=config.orthogonality, grad_scale=grad_scale)
    training.held = [] if config.trains_lambda else _without_gradients(weights[1::3], grad_scale)


def _without_gradients(lams: Sequence[nn.Parameter], grad_scale: Tensor | None) -> list[tuple[nn.Parameter, Tensor]]:
    """Take away the gradients, unscaled; every optimizer leaves alone what has none, momentum and weight decay too."""
    held = []
    for lam in lams:
        if lam.grad is not None:  # a shared one is taken once
            held.append((lam, lam.grad))
            lam.grad = None
    if grad_scale is not None:
        # A fused optimizer unscales what it sees, and importance compares all gradients.
        for device in {grad.device for _, grad in held}:
            torch._foreach_div_([grad for _, grad in held if grad.device == device], grad_scale.to(device))
    return held


def after_step(tuner: Tuner, step: int) -> dict[str, int] | None:
    """After the weights moved: smooth the importance, allocate if it is due; the new ranks if it was.

    The averages rest from T - t_f on, as in both public codes, unless no step was averaged before: the first one that
    comes then makes the scores. From then on the mask holds after every step; before, a λ that is trained moves
    freely between allocations.
    """
    training = training_of(tuner)
    layers = training.layers
    for lam, grad in training.held:
        lam.grad = grad
    training.held = []
    if training.last_step == 0 and not training.final:
        for layer in layers:
            layer.set_mask(torch.ones_like(layer.mask), rank=len(layer.mask))
        training.in_force = training.schedule.initial
    if not training.final and (training.blank or step < training.schedule.final_step):
        _smooth(config_of(tuner), layers, training)
    due = training.schedule.due(training.last_step, step)
    training.last_step = step
    if training.final and not training.shrunk:
        apply_masks_(layers)
    if training.final or due is None:
        return None
    return _allocate(tuner, training, training.schedule.cubic(due), final=due >= training.schedule.final_step)


def finish(tuner: Tuner) -> dict[str, int] | None:
    """The final allocation now, unless it has been made."""
    training = training_of(tuner)
    if training.final:
        return None
    if tuner.steps == 0:
        raise StepError("no step was taken yet, so every score is 0; call finish() after training")
    return _allocate(tuner, training, training.schedule.target, final=True)


def budget(tuner: Tuner, step: int | None) -> int:
    """The budget in force after ``step`` steps by the schedule; for None, that of the last allocation.

    A loaded adapter has the one that its masks count. In parameters the masks may count less than the budget in force,
    where what is left of it is too little for another triplet.
    """
    if step is not None:
        return _known_schedule(tuner).budget(step)
    if isinstance(tuner.state, Training):
        return tuner.state.in_force
    return live_budget(config_of(tuner), layers_of(tuner))


def config_of(tuner: Tuner) -> AdaLoraConfig:
    """The tuner's config as AdaLoRA's own."""
    assert isinstance(tuner.config, AdaLoraConfig)
    return tuner.config


def layers_of(tuner: Tuner) -> list[SvdLayer]:
    """The SVD layers in the order of the targets, as they are in the model now."""
    return [adapter for adapter in tuner.adapters().values() if isinstance(adapter, SvdLayer)]


def weights_of(layers: Sequence[SvdLayer]) -> list[nn.Parameter]:
    """p, lam, q of each layer, one after the other; asked for at each step, since loading may replace them."""
    return [weight for layer in layers for weight in layer.weights]


def training_of(tuner: Tuner) -> Training:
    """The tuner's training state, or an error that says how to get one."""
    if not isinstance(tuner.state, Training):
        raise StepError(
            f"adapter {tuner.name!r} is not attached; call tunerkit.attach(model, optimizer, total_steps=...)"
        )
    return tuner.state


def _known_schedule(tuner: Tuner) -> Schedule:
    """The schedule of the training that runs or ran, else the one that the config alone describes."""
    if isinstance(tuner.state, Training):
        return tuner.state.schedule
    total_steps = tuner.total_steps if tuner.total_steps is not None else config_of(tuner).total_steps
    if total_steps is None:
        raise StepError("the schedule needs the total steps: call tunerkit.attach first, or set total_steps")
    return schedule_of(config_of(tuner), layers_of(tuner), total_steps)


def _smooth(config: AdaLoraConfig, layers: Sequence[SvdLayer], training: Training) -> None:
    """Update the averages of every weight that has a gradient; an unused layer's stay."""
    weights = weights_of(layers)
    grads = [weight.grad for weight in weights]
    training.stacks = _beside(weights, training.stacks)
    training.blank = False
    training.averaged += 1
    training.seen += sum(grad is not None for grad in grads)
    left_out = smooth_(weights, grads, training.stacks, beta1=config.beta1, beta2=config.beta2, anew=training.anew)
    training.anew = False
    training.left_out = training.left_out.to(left_out.device) + left_out


def _beside(weights: Sequence[Tensor], stacks: list[Stack]) -> list[Stack]:
    """The averages where their weights are now: a model may be moved, or spread over devices, after it was attached."""
    if all(weights[place].device == stack.sensitivity.device for stack in stacks for place in stack.members):
        return stacks
    moved = new_stacks(weights)
    for new, old in zip(unstack(moved), unstack(stacks), strict=True):
        for average, value in zip(new, old, strict=True):
            average.copy_(value)
    return moved


def _allocate(tuner: Tuner, training: Training, keep: int, *, final: bool) -> dict[str, int]:
    """Give the budget ``keep`` to the triplets with the highest scores, mask the others; the new ranks."""
    config = config_of(tuner)
    paths = [target.path for target in tuner.targets]
    layers = training.layers = layers_of(tuner)
    scores = triplet_scores(training.stacks)
    masks = allocate(
        scores,
        keep,
        costs=costs_of(config, layers) if config.budget_unit == "parameters" else None,
        minimum=[config.minimum_at(path) for path in paths],
        maximum=[config.maximum_at(path) for path in paths],
        # Where nothing moves λ, what is at 0 stays there, whatever the averages remember.
        lams=None if config.trains_lambda else [layer.lam for layer in layers],
    )
    bad, ranked, *ranks = _brought_to_the_host(training.left_out, scores, masks)
    _judge_gradients(tuner, training, bad)
    if not ranked and keep < training.in_force:
        warnings.warn(
            f"adapter {tuner.name!r}: every score is 0, so triplets are kept by their position; the gradients are 0 or "
            "too small for fp32 (scale the loss up)",
            TunerkitWarning,
            stacklevel=2,
        )
    for layer, mask, rank in zip(layers, masks, ranks, strict=True):
        layer.set_mask(mask, rank=rank)
    apply_masks_(layers)
    if config.in_svd_form:
        _turn(tuner, training, scores)
    training.in_force = keep
    training.final = final
    if final:
        training.stacks = []
        training.shrunk = config.shrink and shrink_layers_(tuner, layers)
        training.sizes = [len(layer.lam) for layer in layers]
    return tuner.ranks()


def _turn(tuner: Tuner, training: Training, scores: Sequence[Tensor]) -> None:
    """Make P Λ Q the SVD of ΔW; the averages, which were of other triplets, start anew."""
    copies = copies_in(optimizer_of(tuner), weights_of(training.layers))
    if copies:
        warnings.warn(
            f"adapter {tuner.name!r}: the optimizer keeps weights of its own ({', '.join(copies)}), so P, Λ and Q are "
            "left as they are at allocations; to say so set exact_svd=False, train_lambda=False, init_rank and alpha",
            TunerkitWarning,
            stacklevel=3,
        )
        return
    to_svd_form_(training.layers, scores, total=config_of(tuner).initial_rank)
    training.anew = True


def _brought_to_the_host(left_out: Tensor, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> list[int]:
    """All that the host has to wait for, at once.

    That is the number of gradients left out, whether any score is above 0, and what each mask counts.
    """
    kept = torch.cat(list(masks)).cumsum(0)
    above = (torch.cat(list(scores)) > 0).any()
    bad, ranked, *counted = torch.cat([left_out.to(kept.device).view(1), above.view(1), kept]).tolist()
    ends = accumulate(len(mask) for mask in masks)
    return [
        bad,
        ranked,
        *(after - before for before, after in pairwise([0, *(counted[end - 1] if end else 0 for end in ends)])),
    ]


def _judge_gradients(tuner: Tuner, training: Training, bad: int) -> None:
    """Tell of bad gradients since the last allocation, and refuse to allocate by scores that know no good one."""
    # Nothing was averaged at T - t_f right after another allocation, or if every step was skipped: no fault of theirs.
    if training.averaged and training.seen == bad:
        why = (
            "check that the loss depends on it (reentrant checkpointing of a frozen base cuts it off: set "
            "use_reentrant=False)"
            if not bad
            else f"all {bad} were NaN or infinite: lower the learning rate or mend the loss"
        )
        raise StepError(
            f"adapter {tuner.name!r} had no usable gradient in the {training.averaged} steps since the last "
            f"allocation, so its scores say nothing; {why}"
        )
    if bad:
        training.left_out.zero_()
        warnings.warn(
            f"adapter {tuner.name!r}: {bad} of {training.seen} gradients were not finite since the last allocation and "
            "were left out of the importance averages",
            TunerkitWarning,
            stacklevel=3,
        )
    training.averaged = training.seen = 0
