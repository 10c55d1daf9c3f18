"""Checks of large batches: each sample has the output and the gradients that it has in a small batch."""

from collections.abc import Mapping
from unittest import SkipTest

import torch
from torch import Tensor, nn

import tunerkit
from tunerkit_testing.blaming import told
from tunerkit_testing.cases import Trial, assert_same
from tunerkit_testing.checks.probing import (
    Call,
    calls_of,
    drawing,
    filled,
    movable,
    random_like,
    tiled,
    trained_parameters,
)
from tunerkit_testing.checks.randomness import without_dropout

_SAMPLES = 1000
_SHARE = 1e-4  # of the largest value: a method may compute in fp32, and a sum over many rows is rounded
_HINT = (
    "compute each sample alone in forward, and check the backward of any torch.autograd.Function of your own with "
    "large batches"
)


def check_large_batch(trial: Trial) -> str:
    """In a batch of 1000 samples, each adds to output and gradients what it adds in a small batch."""
    wide = without_dropout(trial).in_fp64()
    model = filled(wide)
    own, most = trained_parameters(tunerkit.tuner(model)), 0
    for call in calls_of(model, wide):
        if not call.is_plain:
            continue
        call.adapter.train()
        output, drew = drawing(call)
        if drew or not output.requires_grad or len(output) != len(call.x):  # no samples, or they differ each time
            continue
        large = tiled(call, _SAMPLES)
        times = len(large.x) // len(call.x)
        small, found, most = _found(call, own, 1), _found(large, own, times), max(most, len(large.x))
        for name, expected in small.items():
            each = found[name].unflatten(0, (times, -1)) if name in (_OUTPUT, _INPUT) else found[name] / times
            worst = float((each - expected).abs().max())
            assert worst <= _SHARE * float(expected.abs().max()), (
                f"{call.path}: in a batch of {len(large.x)} samples, {times} times the same {len(call.x)}, "
                f"{name.replace(f'{call.path}: ', '')} differs per sample by {worst:.3g}; {_HINT}"
            )
        _assert_alone(call, small[_OUTPUT])
    if not most:
        raise SkipTest("at each target forward draws random numbers, or is given more than one tensor")
    return f"{most} samples"


@torch.no_grad()
def check_row_by_row(trial: Trial) -> str:
    """In eval mode a target gives a sample alone what it gives it in a batch; a linear layer does so for each token.

    A linear layer is called with samples (2, 3, in) too, and with the same six rows as (6, in). How x and y lie in
    memory makes no difference. An empty batch gives an empty output.
    """
    model = filled(trial)
    found = 0
    for call in calls_of(model, trial):
        if not call.is_plain or len(output := call.run()) != len(call.x):
            continue
        found += 1
        hint = "compute each sample alone in forward"
        assert_same(call.with_input(call.x[:1]).run(), output[:1], f"{call.path}: the first sample alone", hint)
        _assert_any_layout(call, output)
        if not _is_linear(call):
            continue
        rows = random_like(torch.empty(6, call.x.shape[-1])).to(call.x)
        expected = call.with_input(rows).run()
        folded = call.with_input(rows.unflatten(0, (2, 3))).run().flatten(0, 1)
        hint = "compute on the last dimension, dim=-1: what stands before it are samples and tokens, which must not mix"
        assert_same(folded, expected, f"{call.path}: x of shape (2, 3, in) against its rows as (6, in)", hint)
        samples = call.with_input(rows.unflatten(0, (2, 3)))
        _assert_any_layout(samples, samples.run())
        _assert_empty(call.with_input(rows[:0]))
    if not found:
        raise SkipTest("each target is given more than one tensor, or has no samples")
    return f"{found} targets"


def _assert_any_layout(call: Call, y: Tensor) -> None:
    """Assert that an adapter computes the same from tensors whose first two dimensions lie in memory the other way."""
    if call.base.lends or call.x.ndim < 2 or y.ndim < 2:
        return
    expected, hint = call.adapter(call.base, call.x, y.clone()), "use reshape or flatten in place of view and strides"
    other = [
        tensor.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1) for tensor in (call.x, y)
    ]
    where = f"{call.path}: with x {tuple(call.x.shape)} and y {tuple(y.shape)} that are not contiguous"
    try:
        found = call.adapter(call.base, *other)
    except Exception as error:
        raise AssertionError(f"{where}, forward raised {told(error)}; {hint}") from error
    assert_same(found, expected, where, hint)


def _assert_empty(call: Call) -> None:
    try:
        rows = len(call.run())
    except Exception as error:
        raise AssertionError(
            f"{call.path}: with an empty batch, x {tuple(call.x.shape)}, forward raised {told(error)}; a part of a "
            "batch may be empty, as for an expert without tokens"
        ) from error
    assert not rows, (
        f"{call.path}: with an empty batch the output has {rows} rows; compute each sample alone in forward"
    )


def _is_linear(call: Call) -> bool:
    return isinstance(call.base.module, nn.Linear) or type(call.base.module).__name__ == "Conv1D"


_OUTPUT, _INPUT = "the output", "the gradient for the layer's input"


def _found(call: Call, own: Mapping[str, Tensor], times: int) -> dict[str, Tensor]:
    """Return the output, and the gradients of a weighted sum of it, with the same weights for each repetition."""
    call, moved = movable(call, own)
    output = call.run()
    weights = random_like(output[: len(output) // times]).repeat(times, *[1] * (output.ndim - 1))
    given = torch.autograd.grad((output * weights).sum(), [*moved.values()], allow_unused=True, materialize_grads=True)
    return {_OUTPUT: output.detach(), **{f"the gradient for {name}": g for name, g in zip(moved, given, strict=True)}}


@torch.no_grad()
def _assert_alone(call: Call, expected: Tensor) -> None:
    """Assert that samples do not depend on others in their batch."""
    others = call.x.flip(0) * (-3 if call.x.is_floating_point() else 1)
    found = call.with_input(torch.cat([call.x, others])).run()[: len(expected)]
    worst = float((found - expected).abs().max())
    assert worst <= _SHARE * float(expected.abs().max()), (
        f"{call.path}: the output for a sample differs by {worst:.3g} with the other samples in its batch; {_HINT}"
    )
