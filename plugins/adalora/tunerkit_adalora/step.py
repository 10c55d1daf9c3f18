"""AdaLoRA's part of an optimizer step: importance, budget, allocation, masks."""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import compress
from operator import attrgetter, is_not, mul

import torch
from torch import Tensor, nn

from tunerkit.errors import warn
from tunerkit.plugin import StepError, Tuner
from tunerkit_adalora.allocator import mask_, spend_
from tunerkit_adalora.followers import warn_of_average
from tunerkit_adalora.importance import Part, on_devices_of, smooth_, stacks_of, triplet_scores
from tunerkit_adalora.orthogonality import add_gradient_
from tunerkit_adalora.partial_scores import partial_scores, placed_lams
from tunerkit_adalora.phase import FINAL, Phase
from tunerkit_adalora.preconditions import refuse_other_ranks, refuse_sharded
from tunerkit_adalora.svd_layer import weights_of
from tunerkit_adalora.training import Training, layers_of, training_of

# Faster than comprehensions, since each step checks all weights.
_GRAD, _IS_THERE = attrgetter("grad"), partial(is_not, None)


def before_step(tuner: Tuner, grad_scale: Tensor | None) -> Iterable[nn.Parameter] | None:
    """Add the regularizer's gradient, multiplied by the scale of the gradients, once per step.

    Args:
        tuner: The tuner whose optimizer steps.
        grad_scale: The scale of the gradients (0-d), or None.

    Returns:
        The λ of all layers if the optimizer must not update them, else None.

    Raises:
        StepError: The weights were sharded or resized after attaching.
    """
    training = tuner.state if isinstance(tuner.state, Training) else training_of(tuner)
    config, weights = training.config, weights_of(training.layers)
    lams = weights[Part.LAM :: len(Part)]
    if set(map(type, weights)) - {nn.Parameter}:
        refuse_sharded(tuner, weights)
    if [*map(Tensor.numel, lams)] != training.sizes:
        refuse_other_ranks(tuner.name)
    if not tuner.engine.is_shared:  # no step replaces the weights, and the search is as slow as the rest of this hook
        training.weights = weights
    if config.gamma > 0:
        with tuner.whole(gradients=True):
            whole = [layer.weights for layer in training.layers]
            pairs = [(each.p, each.q) for each in whole]
            add_gradient_(pairs, gamma=config.gamma, form=config.orthogonality, grad_scale=grad_scale)
    return None if training.resolved.train_lambda else lams


def after_step(tuner: Tuner, step: int) -> dict[str, int] | None:
    """Run the paper's algorithm after an optimizer step: importance, budget, allocation, masks.

    Between allocations, the optimizer may update a masked λ. Once the ranks are final, the mask is applied after every
    step.

    The averages are updated for every weight with a gradient; an unused layer or expert keeps its averages. Updates end
    at T − t_f, as in both public implementations. The first step is always averaged, since scores would be 0 otherwise.

    Args:
        tuner: The tuner whose weights were just updated.
        step: The step's number, from 1.

    Returns:
        The new ranks by target path if an allocation was due, else None.
    """
    training = tuner.state if isinstance(tuner.state, Training) else training_of(tuner)
    config, phase, previous, training.last_step = training.config, training.phase, training.last_step, step
    if phase in FINAL:
        if phase is Phase.FINAL_MASKED:
            mask_(tuner, training.layers, training.weights or weights_of(training.layers))
        return None
    if phase is Phase.WAITING:
        _make_all_live_(training)
        _warn_if_nothing_is_left(tuner, training)
        if training.resolved.exact_svd:
            warn_of_average(tuner, training.schedule.final_step)
    due = training.schedule.allocation(previous, step)  # budget: b(t), if an allocation is due
    found, training.weights, pieces = training.weights or weights_of(training.layers), [], None
    if not training.schedule.is_final(step) or phase is Phase.WAITING:  # importance: Ī and Ū (Eq. 8-10)
        weights: Sequence[Tensor] = found
        grads: Sequence[Tensor | None] = [*map(_GRAD, weights)]
        if tuner.engine.gives_pieces:
            pieces = tuner.pieces(found)
            weights, grads = pieces.values, pieces.grads
        count = training.gradients
        count.averaged += 1
        count.seen += sum(compress(training.matrices, map(_IS_THERE, grads)))
        training.running = on_devices_of(weights, training.running)
        left_out = smooth_(
            weights,
            grads,
            training.running,
            beta1=config.beta1,
            beta2=config.beta2,
            restart=phase is Phase.RESTARTING,
            total_=(lambda bad: pieces.sum_([bad], "which gradients are finite"))
            if pieces is not None and pieces.are_cut
            else None,
        )
        count.left_out = count.left_out.to(left_out.device) + left_out
        training.phase = Phase.AVERAGING
    if due is None:
        return None
    if tuner.engine.gives_pieces:
        return spend_(tuner, training, due, found, *_scores_and_lams(tuner, training))
    return spend_(
        tuner, training, due, found, triplet_scores(stacks_of(training.running))
    )  # scores (Eq. 11-13), masks (Eq. 6)


def finish(tuner: Tuner) -> dict[str, int] | None:
    """Make the final allocation now, unless it has been made.

    Args:
        tuner: The tuner.

    Returns:
        The final ranks by target path, or None if they were final already.

    Raises:
        StepError: No step was taken yet, so all scores are 0.
    """
    training = training_of(tuner)
    if training.phase.is_final:
        return None
    if tuner.steps == 0:
        raise StepError("no step was taken yet, so every score is 0; call finish() after training")
    training.layers = layers_of(tuner)
    due, weights = training.schedule.final_allocation, weights_of(training.layers)
    return spend_(tuner, training, due, weights, *_scores_and_lams(tuner, training))


def _make_all_live_(training: Training) -> None:
    """Make every triplet live at the first step, since a loaded adapter may have masks."""
    for layer in training.layers:
        layer.set_mask(torch.ones_like(layer.mask), rank=layer.mask.numel())
    training.in_force = training.schedule.initial


def _warn_if_nothing_is_left(tuner: Tuner, training: Training) -> None:
    """Warn at the first step if an earlier training has removed all prunable triplets from memory.

    It cannot warn at attaching: a resumed training, which may have removed them itself, loads its state later.
    """
    schedule = training.schedule
    whole = training.resolved.init_rank * sum(map(mul, training.costs, training.matrices[:: len(Part)]))
    if schedule.initial <= schedule.target < whole:
        warn(
            f"adapter {tuner.name!r}: nothing is left to prune, because an earlier training removed the other triplets "
            f"from memory: the budget is {schedule.initial} from the start, and the ranks stay as they are. To prune "
            "anew, wrap the model again; to keep pruned triplets in memory, set shrink to False"
        )


def _scores_and_lams(tuner: Tuner, training: Training) -> tuple[list[Tensor], list[Tensor]]:
    """Return the scores (r,), or (E, r), and the λ of each layer, for the full weights even if they are sharded."""
    weights = weights_of(training.layers)
    pieces = tuner.pieces(weights)
    if not pieces.are_cut:
        return triplet_scores(stacks_of(training.running)), [layer.lam for layer in training.layers]
    shapes = [weight.shape for weight in weights]
    scores = partial_scores(stacks_of(training.running), shapes, pieces.starts)
    every = slice(Part.LAM, None, len(Part))
    lams = placed_lams(pieces.values[every], shapes[every], pieces.starts[every])
    pieces.sum_([*scores, *lams], "the scores")
    return scores, lams
