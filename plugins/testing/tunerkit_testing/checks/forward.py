"""Checks of an adapter's forward: it reads its arguments, adds something, and leaves no trace."""

from collections.abc import Mapping
from functools import partial
from unittest import SkipTest

import torch
from torch import Tensor, nn

import tunerkit
from tunerkit.errors import PluginError
from tunerkit.layers import torch_private
from tunerkit_testing.blaming import changed, told
from tunerkit_testing.cases import TOLERANCE, Trial, assert_base_untouched, assert_same
from tunerkit_testing.checks.probing import (
    Call,
    calls_of,
    copy_state,
    drawing,
    fill_,
    filled,
    in_training,
    meanwhile,
    movable,
    outliving,
    seeded,
    trained_parameters,
    unregistered,
)
from tunerkit_testing.checks.randomness import without_dropout


def check_forward_runs(trial: Trial) -> None:
    """At each target, forward and its gradients can be computed from the model's own input, in both modes.

    Meanwhile no parameter of the base is written into, not even for a moment.
    """
    model = trial.wrapped()
    own = trained_parameters(tunerkit.tuner(model))
    for noted in calls_of(model, trial):
        if noted.base.lends:  # the adapter's forward is never called there
            continue
        for training in (True, False):
            noted.adapter.train(training)
            call, moved = movable(noted, own)
            what, versions = "forward", _versions(call.module)
            try:
                output = call.run()
                _assert_unwritten(call, versions)
                if moved and output.requires_grad:
                    what = "the backward of forward"
                    torch.autograd.grad(output.sum(), [*moved.values()], allow_unused=True)
            except (PluginError, AssertionError):
                raise
            except Exception as error:
                raise AssertionError(f"{call.path}: {what} raised {told(error)}; {_shapes(call)}") from error


def _versions(module: nn.Module) -> dict[str, int | None]:
    return {
        name: torch_private.version(parameter)
        for name, parameter in torch_private.own_parameters(module).items()
        if parameter is not None
    }


def _assert_unwritten(call: Call, before: Mapping[str, int | None]) -> None:
    written = [name for name, version in _versions(call.module).items() if version != before.get(name)]
    assert not written, (
        f"{call.path}: forward wrote into the base's {' and '.join(written)}, which other adapters, other threads and "
        "the disabled model read; base.dense() gives W, of which compute new tensors"
    )


def _shapes(call: Call) -> str:
    """Return what an author needs to see why shapes do not fit."""
    own = ", ".join(f"{name} {tuple(p.shape)}" for name, p in call.adapter.named_parameters()) or "no parameters"
    x = tuple(call.x.shape) if isinstance(call.x, Tensor) else type(call.x).__name__
    base = call.base
    return (
        f"the layer is a {type(base.module).__name__} from {base.in_features} to {base.out_features} features, x is "
        f"{x}, and the adapter has {own}"
    )


def check_forward_keeps_the_base(trial: Trial) -> None:
    """Running the model forward and backward changes no tensor of the base."""
    model = trial.wrapped()
    trial.start_training(model)
    trial.loss(model).backward()
    trial.output(model.eval())
    assert_base_untouched(
        model, trial.case, "only read base.dense() and base.matrix() in forward, do not write to them"
    )


@torch.no_grad()
def check_inputs_unwritten(trial: Trial) -> None:
    """An adapter's forward writes into neither ``x`` nor ``y``."""
    model = filled(trial)
    for call in calls_of(model, trial):
        if call.base.lends:  # the adapter's forward is never called there
            continue
        with tunerkit.disabled(model):
            y = call.run()
        x = call.x
        before = {"x": x.clone() if isinstance(x, Tensor) else x, "y": y.clone()}
        call.adapter(call.base, x, y)
        for name, tensor in (("x", x), ("y", y)):
            same = torch.equal(tensor, before[name]) if isinstance(tensor, Tensor) else True
            assert same, (
                f"{call.path}: forward changed {name} in place; compute a new tensor (autograd and the base model "
                "still need the old one), or call tunerkit.plugin.add_low_rank, which knows when it may overwrite y"
            )


def check_no_hidden_state(trial: Trial) -> None:
    """Two forwards are equal, in both modes, and a forward changes no attribute and no tensor of an adapter.

    Once its tensors are others, also by ``.data``, it computes what a new adapter computes with them.
    """
    model = fill_(trial.wrapped())
    trial.start_training(model)
    adapters = tunerkit.tuner(model).adapters()
    before = {path: _attributes(adapter) for path, adapter in adapters.items()}
    lasting = outliving(model)
    for mode in (partial(trial.start_training, model), partial(model.train, False)):
        mode()
        first, second = seeded(trial.loss, model), seeded(trial.loss, model)
        assert torch.equal(first, second), (
            f"{meanwhile(lasting, model)}the same input gives two losses, which differ by "
            f"{float((first - second).abs()):.3g}; forward must depend on its arguments and on parameters and "
            "buffers alone"
        )
    for path, adapter in adapters.items():
        others = changed(before[path], _attributes(adapter))
        assert not others, (
            f"{path}: forward changed {', '.join(others)} of the adapter; a forward that keeps something is compiled "
            "again at every call, and wrong under checkpointing. Change such values in a step hook"
        )
    _assert_nothing_remembered(model, trial)


def _assert_nothing_remembered(model: nn.Module, trial: Trial) -> None:
    before, lasting = trial.output(model), outliving(model)
    for number, parameter in enumerate(trained_parameters(tunerkit.tuner(model)).values()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data = parameter.data + 0.1 * noise.to(parameter)
    found, fresh = trial.output(model), trial.wrapped().eval()
    copy_state(model, fresh)
    worst = float((found - trial.output(fresh)).abs().max())
    assert worst <= TOLERANCE * float(before.abs().max()), (
        f"{meanwhile(lasting, model)}in eval mode, an adapter whose parameters changed since its last forward computes "
        f"what differs by {worst:.3g} from what a new one computes with the same tensors; keep nothing that is "
        "computed from weights from one forward to the next: neither train() nor a version counter tells every change, "
        "such as that of .data"
    )


def _attributes(adapter: nn.Module) -> dict[str, object]:
    """Copy an adapter's tensors, and what it holds beyond a plain module's attributes; other modules are left out."""
    own = (*adapter.named_parameters(), *adapter.named_buffers())
    return {**{name: tensor.detach().clone() for name, tensor in own}, **dict(unregistered(adapter))}


@torch.no_grad()
def check_same_in_training(trial: Trial) -> None:
    """Without dropout, an adapter adds the same in training mode as in eval mode."""
    model = filled(without_dropout(trial))
    random = []
    for call in calls_of(model, trial):
        expected, _ = drawing(call)
        with in_training(call, model):
            found, drew = drawing(call)
        if drew:
            random.append(call.path)
            continue
        hint = "scale what forward adds by the same factor in training mode and in eval mode"
        assert_same(found, expected, f"{call.path}: training mode against eval mode", hint)
    if random:
        raise SkipTest(
            f"in training mode, forward draws random numbers at {random[0]!r}; if that is dropout, use that word in "
            "the name of its setting, which this check sets to 0"
        )


def check_same_in_inference(trial: Trial) -> None:
    """Under ``torch.no_grad`` and ``torch.inference_mode``, an adapter adds what it adds with gradients."""
    model = filled(trial)
    hint = "ask neither torch.is_grad_enabled() nor torch.is_inference_mode_enabled() for what to compute"
    for call in calls_of(model, trial):
        expected = call.run().detach()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = call.run()
            assert_same(found, expected, f"{call.path}: in torch.{mode.__name__} against with gradients", hint)


@torch.no_grad()
def check_output_dtype(trial: Trial) -> None:
    """An adapted layer's output has the dtype and shape of the base's, on bases in fp32, bf16 and fp64."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        narrow = trial.in_dtype(dtype)
        model = filled(narrow)
        for call in calls_of(model, narrow):
            found = call.run()
            with tunerkit.disabled(model):
                expected = call.run()
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), (
                f"{call.path}: on a base in {dtype} the output is {found.dtype} {tuple(found.shape)} instead of "
                f"{expected.dtype} {tuple(expected.shape)}; end forward with y + added.to(y.dtype)"
            )
