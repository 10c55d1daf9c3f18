"""AdaLoRA's part of an optimizer step: importance, budget, allocation, masks."""

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from tunerkit import StepError, Tuner, TunerkitWarning, optimizer_of
from tunerkit_adalora.allocator import allocate
from tunerkit_adalora.averages import Part, on_devices_of
from tunerkit_adalora.budget import costs_of
from tunerkit_adalora.importance import smooth_, triplet_scores
from tunerkit_adalora.orthogonality import add_gradient_
from tunerkit_adalora.partial_scores import partial_scores, placed_lams
from tunerkit_adalora.phase import Phase
from tunerkit_adalora.preconditions import refuse_other_ranks, refuse_sharded
from tunerkit_adalora.readback import Readback, read_back
from tunerkit_adalora.schedule import Allocation
from tunerkit_adalora.shrinking import shrink_layers_
from tunerkit_adalora.svd_form import to_svd_form_
from tunerkit_adalora.svd_layer import SvdLayer, apply_masks_
from tunerkit_adalora.training import Training, config_of, layers_of, training_of, weights_of
from tunerkit_adalora.weight_copies import copies_in


def before_step(tuner: Tuner, grad_scale: Tensor | None) -> Iterable[nn.Parameter] | None:
    """Add the regulariser's gradient, once per step, scaled as the gradients are.

    Args:
        tuner: The tuner whose optimizer steps.
        grad_scale: The factor that the gradients carry (0-d), or None.

    Returns:
        The λ, which the step must leave alone where the optimizer does not train them.

    Raises:
        StepError: If the weights are sharded, or have other ranks than the training knows of.
    """
    config, training = config_of(tuner), training_of(tuner)
    weights = [layer.weights for layer in training.layers]
    refuse_sharded(tuner, weights)
    refuse_other_ranks(tuner.name, weights, training.sizes)
    if config.gamma > 0:
        with tuner.whole(gradients=True):
            whole = [layer.weights for layer in training.layers]
            pairs = [(each.p, each.q) for each in whole]
            add_gradient_(pairs, gamma=config.gamma, form=config.orthogonality, grad_scale=grad_scale)
    return None if training.resolved.train_lambda else [each.lam for each in weights]


def after_step(tuner: Tuner, step: int) -> dict[str, int] | None:
    """Follow the paper's algorithm: importance, budget, allocation, masks.

    Between allocations a λ that the optimizer trains moves freely, masked or not. Once the ranks are final, the mask
    holds after every step.

    Args:
        tuner: The tuner whose weights have just moved.
        step: The step's number, from 1.

    Returns:
        The new ranks by target path if an allocation was due, else None.
    """
    training = training_of(tuner)
    if training.phase is Phase.WAITING:
        _make_all_live_(training)
        _warn_if_nothing_is_left(tuner, training)
    _measure_(tuner, training, step)  # importance: Ī and Ū (Eq. 8-10)
    due = training.advance_(step)  # budget: b(t), if an allocation is due
    if due is not None:
        return _allocate(tuner, training, due)  # allocation by score (Eq. 11-13), masks (Eq. 6)
    if training.phase is Phase.FINAL_MASKED:
        _apply_masks_(tuner, training.layers)
    return None


def finish(tuner: Tuner) -> dict[str, int] | None:
    """Make the final allocation now, unless it has been made.

    Args:
        tuner: The tuner.

    Returns:
        The final ranks by target path, or None if they were final already.

    Raises:
        StepError: Before the first step, when no score means anything.
    """
    training = training_of(tuner)
    if training.phase.is_final:
        return None
    if tuner.steps == 0:
        raise StepError("no step was taken yet, so every score is 0; call finish() after training")
    return _allocate(tuner, training, training.schedule.final_allocation)


def _make_all_live_(training: Training) -> None:
    """Make every triplet live, at the first step: a loaded adapter may come with masks."""
    for layer in training.layers:
        layer.set_mask(torch.ones_like(layer.mask), rank=len(layer.mask))
    training.in_force = training.schedule.initial


def _warn_if_nothing_is_left(tuner: Tuner, training: Training) -> None:
    """Warn, at the first step, if an earlier training has removed from memory all that could be pruned.

    Not when attaching: a resumed training has nothing left either once it has shrunk, and then it has a later step.
    """
    config, schedule = config_of(tuner), training.schedule
    whole = training.resolved.init_rank * sum(costs_of(config, training.layers))
    if schedule.initial <= schedule.target < whole:
        warnings.warn(
            f"adapter {tuner.name!r}: nothing is left to prune, because an earlier training removed the other triplets "
            f"from memory: the budget is {schedule.initial} from the start, and the ranks stay as they are. To prune "
            "anew, wrap the model again; to keep pruned triplets in memory, set shrink to False",
            TunerkitWarning,
            stacklevel=3,
        )


def _measure_(tuner: Tuner, training: Training, step: int) -> None:
    """Update the averages of every weight that has a gradient; an unused layer keeps its averages.

    The averages rest from T − t_f on, as in both public codes. The first step is averaged in any case: without it, the
    scores would be 0.
    """
    resting = training.schedule.is_final(step) and training.phase is not Phase.WAITING
    if training.phase.is_final or resting:
        return
    config = config_of(tuner)
    pieces = tuner.pieces(weights_of(training.layers))
    training.stacks = on_devices_of(pieces.values, training.stacks)
    restart = training.phase is Phase.RESTARTING
    left_out = smooth_(
        pieces.values,
        pieces.grads,
        training.stacks,
        beta1=config.beta1,
        beta2=config.beta2,
        restart=restart,
        total_=(lambda bad: pieces.sum_([bad], "which gradients are finite")) if pieces.are_cut else None,
    )
    training.gradients.add_(seen=sum(grad is not None for grad in pieces.grads), left_out=left_out)
    training.phase = Phase.AVERAGING


def _allocate(tuner: Tuner, training: Training, due: Allocation) -> dict[str, int]:
    """Keep the triplets with the highest scores and mask the others; the new ranks."""
    config, bounds = config_of(tuner), training.bounds
    layers = training.layers = layers_of(tuner)
    scores, lams = _scores_and_lams(tuner, training)
    tuner.agree_(scores, "the scores")
    masks = allocate(
        scores,
        due.keep,
        costs=costs_of(config, layers) if config.budget_unit == "parameters" else None,
        minimum=bounds.minimum,
        maximum=bounds.maximum,
        # Where nothing moves λ, a λ at 0 stays there, whatever the averages remember.
        lams=None if training.resolved.train_lambda else lams,
    )
    found = read_back(training.gradients.left_out, scores, masks)
    _judge_(tuner, training, due, found)
    for layer, mask, rank in zip(layers, masks, found.ranks, strict=True):
        layer.set_mask(mask, rank=rank)
    _apply_masks_(tuner, layers)
    training.in_force = due.keep
    if training.resolved.exact_svd:
        _re_parametrise_(tuner, training, scores)
    if due.final:
        _settle_(tuner, training)
    return tuner.ranks()


def _scores_and_lams(tuner: Tuner, training: Training) -> tuple[list[Tensor], list[Tensor]]:
    """The score (r,) of each triplet and λ (r,), by layer, whole in each process."""
    layers = training.layers
    weights = weights_of(layers)
    pieces = tuner.pieces(weights)
    if not pieces.are_cut:
        return triplet_scores(training.stacks), [layer.lam for layer in layers]
    shapes = [weight.shape for weight in weights]
    scores = partial_scores(training.stacks, shapes, pieces.starts)
    every = slice(Part.LAM, None, len(Part))
    lams = placed_lams(pieces.values[every], shapes[every], pieces.starts[every])
    pieces.sum_([*scores, *lams], "the scores")
    return scores, lams


def _apply_masks_(tuner: Tuner, layers: Sequence[SvdLayer]) -> None:
    """Zero the λ of masked triplets, as far as this process holds them."""
    pieces = tuner.pieces([layer.lam for layer in layers])
    apply_masks_(pieces.values, pieces.cut([layer.mask for layer in layers]))


def _judge_(tuner: Tuner, training: Training, due: Allocation, found: Readback) -> None:
    """Refuse or warn of scores that say nothing."""
    training.gradients.judge_(tuner.name, found.left_out)
    if not found.any_score and due.keep < training.in_force:
        warnings.warn(
            f"adapter {tuner.name!r}: every score is 0, so triplets are kept by their position; the gradients are 0 or "
            "too small for fp32 (scale the loss up)",
            TunerkitWarning,
            stacklevel=3,
        )


def _re_parametrise_(tuner: Tuner, training: Training, scores: Sequence[Tensor]) -> None:
    """Make P Λ Q the SVD of ΔW. The averages belong to the old triplets, so they restart at the next step."""
    with tuner.whole() as outside:  # the optimizer may know others than the whole ones
        copies = copies_in(optimizer_of(tuner), map(outside, weights_of(training.layers)))
        if not copies:
            to_svd_form_(training.layers, scores, total=training.resolved.init_rank)
            # Unlike hardware may choose other signs, and averaged gradients would then belong to other triplets.
            tuner.agree_(weights_of(training.layers), "the decomposed weights")
    if copies:
        warnings.warn(
            f"adapter {tuner.name!r}: the optimizer keeps weights of its own ({', '.join(copies)}), so P, Λ and Q are "
            "left as they are at allocations; to say so set exact_svd=False, train_lambda=False, init_rank and alpha",
            TunerkitWarning,
            stacklevel=3,
        )
        return
    training.phase = Phase.RESTARTING


def _settle_(tuner: Tuner, training: Training) -> None:
    """The ranks are final: free the averages, and the dead triplets where their shapes may change."""
    training.stacks = []
    shrunk = config_of(tuner).shrink and shrink_layers_(tuner, training.layers)
    training.phase = Phase.FINAL_SHRUNK if shrunk else Phase.FINAL_MASKED
    training.sizes = [len(layer.lam) for layer in training.layers]
