"""The importance of weights and of triplets: sensitivity, uncertainty, score (section 3.2 of the paper).

Flat lists of weights contain P (out, r), λ (r,) and Q (r, in) of the first layer, then of the second, and so on. The
weights of a stack of E matrices, such as experts, have E as their first dimension. Each of its matrices is averaged and
scored like a layer of its own.

The averages of all weights on a device are in one tensor, ordered by the weights' shapes. So a step takes three
operations for each distinct shape, to collect weights and gradients, and about fifteen for everything else.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import IntEnum
from functools import partial
from itertools import accumulate
from operator import attrgetter, is_not

import attrs
import torch
from torch import Tensor

# Faster than comprehensions, since each step checks all weights.
_DEVICE, _IS_THERE = attrgetter("device"), partial(is_not, None)
# Up to here, copying gradients into one tensor takes less time than multiplying by each.
_SMALL = 1 << 20
# Values in a row. Matrices begin with a row of their own, so a short row wastes less memory; the flags of whether
# values are finite have one value for each row, so a long one takes less time.
_ROW = 64


class Part(IntEnum):
    """P, λ or Q of a layer; the value is the position among the three."""

    P = 0
    LAM = 1
    Q = 2


# The dimensions of P, λ and Q of one matrix.
_DIMS = (2, 1, 2)


@attrs.frozen(eq=False)
class Stack:
    """The running averages Ī and Ū (Eq. 9, 10) of weights of one shape.

    Attributes:
        members: Indices of the weights in the flat list. All are the same `Part` of different layers.
        sensitivity: Ī, (count, *shape), where shape begins with E for a stack of matrices.
        uncertainty: Ū, (count, *shape).
    """

    members: tuple[int, ...]
    sensitivity: Tensor
    uncertainty: Tensor

    @property
    def part(self) -> Part:
        """Which part of their layers the weights are: P, λ or Q."""
        return Part(self.members[0] % len(Part))


@attrs.frozen(eq=False)
class Averages:
    """The running averages of all weights of one dtype on one device, in one tensor each.

    Attributes:
        stacks: The averages by shape, as views.
        sensitivity: Ī, (rows, 64). Each matrix begins a new row, and the rest of its last row is 0.
        uncertainty: Ū, in the same layout.
        places: The place of each matrix among those of the flat list, in the order of the rows; int64 (matrices,).
        rows: The number of rows of each matrix; int64 (matrices,).
        shared: A number for P, λ and Q of the same matrix of a stack, above 0; 0 for a layer's own matrices. Int64
            (matrices,); None without stacks.
    """

    stacks: list[Stack]
    sensitivity: Tensor
    uncertainty: Tensor
    places: Tensor
    rows: Tensor
    shared: Tensor | None


def new_averages(weights: Sequence[Tensor]) -> list[Averages]:
    """Return averages for the first step: zeros, in `average_dtype`.

    Args:
        weights: The flat list.

    Returns:
        The averages, by dtype and device.
    """
    groups: dict[tuple[torch.dtype, torch.device], dict[tuple[int, torch.Size], list[int]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for index, weight in enumerate(weights):
        groups[weight.dtype, weight.device][index % len(Part), weight.shape].append(index)
    counts = [1] * len(weights)  # of matrices
    for by_shape in groups.values():
        for (_, shape), members in by_shape.items():
            count = _first(members[0], shape).numel()
            for index in members:
                counts[index] = count
    places = [0, *accumulate(counts)]
    return [_new(by_shape, places, *kind) for kind, by_shape in groups.items()]


def _new(
    by_shape: Mapping[tuple[int, torch.Size], list[int]],
    places: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Averages:
    """Return new averages, all 0. ``places[i]`` is the index of weight i's first matrix among the matrices of all."""
    shapes = [(tuple(members), shape) for (_, shape), members in by_shape.items()]
    matrices: list[tuple[int, int, torch.Size]] = []
    rows: list[int] = []
    for members, shape in shapes:
        own = [(i, number, shape) for i in members for number in range(places[i + 1] - places[i])]
        matrices += own
        rows += [_rows(_one(members[0], shape))] * len(own)
    mean = torch.zeros(sum(rows), _ROW, dtype=average_dtype(dtype), device=device)
    spread = torch.zeros_like(mean)
    views = [[weights for weights, _ in _by_shape(average, shapes)] for average in (mean, spread)]
    stacks = [Stack(members, *both) for (members, _), *both in zip(shapes, *views, strict=True)]
    at = torch.tensor([places[index] + number for index, number, _ in matrices])
    return Averages(stacks, mean, spread, at.to(device), torch.tensor(rows).to(device), _shared(matrices, device))


def _shared(matrices: Sequence[tuple[int, int, torch.Size]], device: torch.device) -> Tensor | None:
    """Return `Averages.shared` for (index of the weight, number in its stack, shape of the weight) of each matrix."""
    numbers: dict[tuple[int, int], int] = {}
    found = [
        numbers.setdefault((index // len(Part), number), len(numbers) + 1)
        if len(shape) > _DIMS[index % len(Part)]
        else 0
        for index, number, shape in matrices
    ]
    return torch.tensor(found).to(device) if numbers else None


def _first(index: int, shape: torch.Size) -> torch.Size:
    """Return the dimensions of the stack, (E,), of a weight with this index in the flat list; () for one matrix."""
    return shape[: -_DIMS[index % len(Part)]]


def _one(index: int, shape: torch.Size) -> torch.Size:
    """Return the shape of one matrix of a weight with this index in the flat list."""
    return shape[-_DIMS[index % len(Part)] :]


def _rows(shape: torch.Size) -> int:
    return -(-shape.numel() // _ROW)


def _by_shape(rows: Tensor, shapes: Sequence[tuple[Sequence[int], torch.Size]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield two views of ``rows`` for each shape: the weights (count, *shape), and the unused ends of the rows."""
    kinds = []
    for members, shape in shapes:
        dims = _DIMS[members[0] % len(Part)]
        one = shape[-dims:]
        kinds.append(((len(members), *shape[:-dims]), one, _rows(one)))
    parts = rows.split([math.prod(first) * of_one for first, _, of_one in kinds])
    for part, (first, one, of_one) in zip(parts, kinds, strict=True):
        each = part.view(*first, of_one * _ROW)
        yield each[..., : one.numel()].unflatten(-1, one), each[..., one.numel() :]


def average_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the averages of weights of ``dtype``: fp32 or wider.

    A score is a product of two averages of small numbers. In fp16 it would underflow, and every triplet would look
    unimportant.
    """
    return torch.promote_types(dtype, torch.float32)


def stacks_of(averages: Sequence[Averages]) -> list[Stack]:
    """Split the averages by shape.

    Args:
        averages: The averages.

    Returns:
        One stack for each part, shape, dtype and device, as views that may be written to.
    """
    return [stack for each in averages for stack in each.stacks]


def unstack(stacks: Sequence[Stack]) -> tuple[list[Tensor], list[Tensor]]:
    """Split the stacks by weight.

    Args:
        stacks: The averages.

    Returns:
        Ī and Ū of each weight in the order of the flat list, as views that may be written to.
    """
    sensitivity: dict[int, Tensor] = {}
    uncertainty: dict[int, Tensor] = {}
    for stack in stacks:
        sensitivity.update(zip(stack.members, stack.sensitivity.unbind(), strict=True))
        uncertainty.update(zip(stack.members, stack.uncertainty.unbind(), strict=True))
    return [sensitivity[i] for i in range(len(sensitivity))], [uncertainty[i] for i in range(len(uncertainty))]


def on_devices_of(weights: Sequence[Tensor], averages: list[Averages]) -> list[Averages]:
    """Move the averages to the devices of their weights, since a model may be moved after attaching.

    Args:
        weights: The flat list.
        averages: The averages.

    Returns:
        The same averages if no weight has moved, else new ones with the same values.
    """
    devices = {*map(_DEVICE, weights), *(each.sensitivity.device for each in averages)}
    if len(devices) == 1 or all(
        weights[index].device == stack.sensitivity.device for stack in stacks_of(averages) for index in stack.members
    ):
        return averages
    moved = new_averages(weights)
    for new, old in zip(unstack(stacks_of(moved)), unstack(stacks_of(averages)), strict=True):
        for average, value in zip(new, old, strict=True):
            average.copy_(value)
    return moved


@torch.no_grad()
def smooth_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    averages: Sequence[Averages],
    *,
    beta1: float,
    beta2: float,
    restart: bool = False,
    total_: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Update the running averages in place with a step's weights and gradients.

    Eq. 8:  I = |w · ∂L/∂w|;  Eq. 9:  Ī ← β1 Ī + (1 − β1) I;  Eq. 10:  U = |I − Ī|,  Ū ← β2 Ū + (1 − β2) U,
    with the new Ī in Eq. 10.

    A matrix keeps its averages if it has no gradient, or if any element of its I is not finite. A matrix of a stack
    also keeps them if the gradients of its P, λ and Q are all exactly 0, as those of an expert without tokens. The host
    does not wait for the device.

    Args:
        weights: P (out, r), λ (r,), Q (r, in) of the first layer, then of the second, and so on.
        grads: The weights' gradients.
        averages: The weights' averages, from `new_averages`.
        beta1: β1.
        beta2: β2.
        restart: Whether to set Ī and Ū of the averaged weights to 0 first.
        total_: Sums a vector over the processes in place, if the weights are sharded: a matrix is left out in all
            processes if I of any shard is not finite. None if the weights are not sharded. Stacks cannot be sharded.

    Returns:
        The number of matrices left out because I was not finite; 0-d int64, on the first weight's device.
    """
    if not weights:
        return torch.zeros((), dtype=torch.int64)
    moved: list[list[Tensor]] = [[] for _ in averages]
    currents = [_importance(weights, grads, each, own) for each, own in zip(averages, moved, strict=True)]
    complete = all(map(_IS_THERE, grads))
    there = [None if complete else _with_gradient(grads, each) for each in averages]
    if any(moved):
        there = [_and_used(*of_each) for of_each in zip(there, moved, averages, strict=True)]
    owners = [torch.repeat_interleave(each.rows, output_size=len(each.sensitivity)) for each in averages]
    bad = [_are_bad(*of_each) for of_each in zip(currents, owners, there, averages, strict=True)]
    if total_ is not None:
        bad = _in_any(bad, averages, weights, total_)
    for each, current, own, has, skipped in zip(averages, currents, owners, there, bad, strict=True):
        used = skipped.logical_not() if has is None else has > skipped
        _average_(each, current, used.index_select(0, own).unsqueeze(1), beta1, beta2, restart)
    counts = [skipped.count_nonzero().to(weights[0].device) for skipped in bad]
    return counts[0] if len(counts) == 1 else torch.stack(counts).sum()


def triplet_scores(stacks: Sequence[Stack]) -> list[Tensor]:
    """Score each triplet: s(λ_i) + mean s(P_·i) + mean s(Q_i·), with s = Ī·Ū (Eq. 11-13).

    Args:
        stacks: The averages of all layers.

    Returns:
        One tensor (r,), or (E, r), for each layer: views of one tensor, on the device of the first stack.
    """
    if not stacks:
        return []
    device = stacks[0].sensitivity.device
    scores: dict[Part, dict[int, Tensor]] = {part: {} for part in Part}
    for stack in stacks:
        score = stack.sensitivity * stack.uncertainty
        if stack.part is Part.P:
            score = score.mean(dim=-2)
        elif stack.part is Part.Q:
            score = score.mean(dim=-1)
        scores[stack.part].update(zip(stack.members, score.to(device).unbind(), strict=True))
    of_layers = {part: [found[index] for index in sorted(found)] for part, found in scores.items()}
    p, lam, q = (torch.cat([score.flatten() for score in of_layers[part]]) for part in Part)
    flat = torch.split(lam + (p + q), [score.numel() for score in of_layers[Part.LAM]])
    shapes = [score.shape for score in of_layers[Part.LAM]]
    return [own if len(shape) == 1 else own.view(shape) for own, shape in zip(flat, shapes, strict=True)]


def _importance(
    weights: Sequence[Tensor], grads: Sequence[Tensor | None], averages: Averages, moved: list[Tensor]
) -> Tensor:
    """Return I = |w · ∂L/∂w| (Eq. 8) in the layout of the averages; 0 for a weight without a gradient.

    If there are stacks, append to ``moved`` which matrices have a gradient that is not 0: bool, in the order of the
    rows.
    """
    current = torch.empty_like(averages.sensitivity)
    shapes = [(stack.members, stack.sensitivity.shape[1:]) for stack in averages.stacks]
    for (members, shape), (part, rest) in zip(shapes, _by_shape(current, shapes), strict=True):
        own = [weights[index] for index in members]
        given = [grad for index in members if (grad := grads[index]) is not None]
        if len(given) < len(members):
            nothing = torch.zeros_like(own[0])
            given = [nothing if (grad := grads[index]) is None else grad for index in members]
        if rest.numel():  # `stack` into a strided output would copy the gradients one by one
            rest.zero_()
            part.copy_(torch.stack(given))
        else:
            torch.stack(given, out=part)
        if averages.shared is not None:
            of_one = len(_one(members[0], shape))
            moved.append(part.flatten(-of_one).any(-1).flatten())
        if part.numel() > _SMALL:
            torch._foreach_mul_(list(part.unbind()), own)
        else:
            part.mul_(torch.stack(own))
    return current.abs_()


def _and_used(has_gradient: Tensor | None, moved: Sequence[Tensor], averages: Averages) -> Tensor | None:
    """Return which matrices have a gradient, without those of a stack whose P, λ and Q all have a gradient of 0."""
    if averages.shared is None:
        return has_gradient
    own = torch.cat(list(moved))
    any_part = torch.zeros(len(own) + 1, device=own.device)
    any_part.scatter_reduce_(0, averages.shared, own.to(any_part), "amax")
    used = (any_part.index_select(0, averages.shared) > 0) | (averages.shared == 0)
    return used if has_gradient is None else used & has_gradient


def _with_gradient(grads: Sequence[Tensor | None], averages: Averages) -> Tensor:
    """Return which matrices belong to a weight with a gradient, bool (matrices,)."""
    members = [index for stack in averages.stacks for index in stack.members]
    sizes: list[int] = []
    for stack in averages.stacks:
        sizes += [_first(stack.members[0], stack.sensitivity.shape[1:]).numel()] * len(stack.members)
    # Not built from a list, whose copy to the device would make the host wait.
    there = torch.ones_like(averages.places, dtype=torch.bool)
    if absent := [flag for flag, index in zip(there.split(sizes), members, strict=True) if grads[index] is None]:
        torch._foreach_zero_(absent)
    return there


def _are_bad(importance: Tensor, owners: Tensor, has_gradient: Tensor | None, averages: Averages) -> Tensor:
    """Return which matrices have a gradient and an I with non-finite values: bool (matrices,).

    ``owners`` maps each row to its matrix; int64 (rows,).

    I is tested rather than the gradient: a non-finite gradient makes I non-finite (0·∞ is NaN), and the product may
    overflow. I is never negative, so its maximum is enough: NaN propagates, and is not below infinity.
    """
    largest = importance.new_zeros(len(averages.places))
    largest.scatter_reduce_(0, owners, importance.amax(dim=1), "amax")
    bad = (largest < torch.inf).logical_not_()
    return bad if has_gradient is None else bad & has_gradient


def _in_any(
    bad: Sequence[Tensor], averages: Sequence[Averages], weights: Sequence[Tensor], total_: Callable[[Tensor], None]
) -> list[Tensor]:
    """Return, for each of ``averages``, which matrices are bad in any process; their order may differ by process."""
    device = weights[0].device
    together = torch.zeros(sum(len(each.places) for each in averages), device=device)
    for each, own in zip(averages, bad, strict=True):
        together.index_copy_(0, each.places.to(device), own.to(together))
    total_(together)
    return [(together > 0).index_select(0, each.places.to(device)).to(each.places.device) for each in averages]


def _average_(averages: Averages, current: Tensor, used: Tensor, beta1: float, beta2: float, restart: bool) -> None:
    """Update the averages by Eq. 9 and 10, in the rows where ``used`` is true.

    Args:
        averages: The averages, (rows, columns).
        current: I of this step, (rows, columns); it is overwritten.
        used: bool, (rows, 1).
        beta1: β1.
        beta2: β2.
        restart: Whether to set the averages of the ``used`` rows to 0 before.
    """
    mean, spread = averages.sensitivity, averages.uncertainty
    # A weight that is left out has pace 0: x + 0 · (y − x) is x, bit for bit, if y is finite.
    current.nan_to_num_(nan=0.0, posinf=0.0)
    if restart:
        left_out = used.logical_not()
        mean.mul_(left_out)
        spread.mul_(left_out)
    pace = _pace(used, beta1, mean.dtype)
    mean.lerp_(current, pace)
    current.sub_(mean).abs_()
    spread.lerp_(current, pace if beta1 == beta2 else _pace(used, beta2, mean.dtype))


def _pace(used: Tensor, beta: float, dtype: torch.dtype) -> Tensor:
    """Return 1 − β for ``used`` rows and 0 for the others, (rows, 1), in ``dtype``."""
    return used * (1 - beta) if dtype == torch.get_default_dtype() else used.to(dtype) * (1 - beta)
