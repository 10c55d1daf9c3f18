"""Checks of steps that are taken in another way: scaled, accumulated, checkpointed. The result must be the same."""

from collections.abc import Callable
from contextlib import suppress
from unittest import SkipTest

import attrs
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tunerkit
from tunerkit import hooks, injection
from tunerkit.errors import TunerkitError
from tunerkit.plugin import AdapterConfig
from tunerkit_testing.cases import SEED, STEPS, TOLERANCE, Trial
from tunerkit_testing.checks.probing import (
    assert_equal_sets,
    filled,
    gradients,
    largest,
    meanwhile,
    outliving,
    seeded,
    trained_parameters,
    values_of,
    without_copies,
)

_STEPS = 3
_SCALE = 1024.0  # a power of two, so that scaling rounds nothing
_LOUDER = 100.0  # the other training's gradients, so that a trace of them shows
_SHARE = 1e-3  # of the largest movement; gradients that are summed up in another order differ by less
_SAME = 1e-4  # where nothing is computed in another order


def check_grad_scale(trial: Trial) -> None:
    """A fused optimizer that is given scaled gradients and their scale trains the same adapter."""
    if not hooks.implements(hooks.specs.tunerkit_before_step, trial.method):
        raise SkipTest("the method adds no gradients: it does not implement tunerkit_before_step")

    def scaled(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        (seeded(trial.loss, model, step) * _SCALE).backward()
        # As GradScaler sets them before the step of a fused optimizer.
        vars(optimizer).update(grad_scale=torch.tensor(_SCALE), found_inf=torch.tensor(0.0))

    _compare(trial, scaled, "multiply what tunerkit_before_step adds by grad_scale, unless it is None")


def check_accumulation(trial: Trial) -> None:
    """Two micro-batches with half of the loss each train the same adapter as one batch."""
    dtypes = {tensor.dtype for tensor in trial.build().state_dict().values()}
    scale = _SCALE if torch.float16 in dtypes else 1.0  # where small gradients are rounded to multiples of 6e-8
    loss = trial.loss
    trial = trial.on(attrs.evolve(trial.case, loss=lambda model: loss(model) * scale))

    def halves(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        for _ in range(2):
            (seeded(trial.loss, model, step) / 2).backward()

    hint = "add gradients that are not the loss's in tunerkit_before_step, once per step, not in forward or in backward"
    _compare(trial, halves, hint)


def check_trainings_do_not_meet(trial: Trial) -> None:
    """A model that is trained in turns with another one, on the same targets, ends as if it were trained alone.

    The other one has other settings. An adapter also computes what it computed once another one with these settings is
    in its model, which is inactive.
    """
    others: list[tuple[nn.Module, torch.optim.Optimizer]] = []
    different = _other_settings(trial)
    _assert_alone(trial, different)

    def in_turns(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        with torch.random.fork_rng(devices=[]):  # what steps draw is the user's to share
            if not others:  # after the first model is attached, and before its first step
                try:
                    others.append(_another(different))
                except TunerkitError:  # such as a schedule that is longer than this training
                    others.append(_another(trial))
            (seeded(trial.loss, others[0][0], step + STEPS) * _LOUDER).backward()
            others[0][1].step()
            others[0][1].zero_grad()
        seeded(trial.loss, model, step).backward()

    hint = (
        "another model was trained in turns with it: keep what steps remember in tuner.state or in the adapters, the "
        "values of a config in the adapters, and nothing in a class, a module or the plugin, whatever its key"
    )
    _compare(trial, in_turns, hint, _SAME)


@torch.no_grad()
def _assert_alone(trial: Trial, different: Trial) -> None:
    model = filled(trial)
    expected, lasting, (name,) = trial.output(model), outliving(model), injection.tuners_of(model)
    with suppress(TunerkitError):  # of some methods there is one adapter alone
        settings = different.but(train_modules=()).settings
        tunerkit.wrap(model, trial.method, settings, adapter="another", seed=SEED)
        tunerkit.activate(model, [name])
        worst = float((trial.output(model.eval()) - expected).abs().max())
        assert worst <= TOLERANCE * float(expected.abs().max()), (
            f"{meanwhile(lasting, model, name)}with an inactive adapter of other settings in the model, the output "
            f"differs by {worst:.3g}: one config's values are used by another adapter; keep them in the adapter, and "
            "nothing in the base's modules, in a class, in a Python module or in the plugin"
        )


def _other_settings(trial: Trial) -> Trial:
    """Return a trial in which as many numbers and flags of the method as it accepts have other values."""
    found = _changed(trial, Trial.structured)
    try:
        _built(found)
    except Exception:  # such as a rank, or a number of features, that the layers do not have
        found = _changed(trial, _built)
    return found


def _built(trial: Trial) -> object:
    return trial.output(trial.wrapped())


def _changed(trial: Trial, accept: Callable[[Trial], object]) -> Trial:
    config, shared = trial.structured(), {field.name for field in attrs.fields(AdapterConfig)}
    for field in attrs.fields(type(config)):
        value = getattr(config, field.name)
        if field.name in shared or type(value) not in (int, float, bool):
            continue
        # Not in the same proportion: a scale of alpha / rank must be another one too.
        others = [value + 1, value - 1] if "rank" in field.name else [3 * value + 1, value + 1, value / 2, value - 1]
        for other in [not value] if type(value) is bool else map(type(value), others):
            with suppress(Exception):  # as above
                accept(changed := trial.but(**{field.name: other}))
                trial = changed
                break
    return trial


def _another(trial: Trial) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model with another seed, attached to an optimizer of its own."""
    model = tunerkit.wrap(trial.build(), trial.method, trial.settings, seed=SEED + 1)
    trial.start_training(model)
    optimizer = torch.optim.SGD(trained_parameters(tunerkit.tuner(model)).values(), lr=trial.lr / _LOUDER)
    tunerkit.attach(model, optimizer, total_steps=STEPS)
    return model, optimizer


def _compare(
    trial: Trial,
    other: Callable[[nn.Module, torch.optim.Optimizer, int], None],
    hint: str,
    share: float = _SHARE,
) -> None:
    """Assert that another way of computing the gradients of a step leads to the same weights."""

    def plain(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        seeded(trial.loss, model, step).backward()

    start, expected = _trained(trial, plain)
    _, found = _trained(trial, other)
    moved = largest({name: value - start[name] for name, value in expected.items() if value.shape == start[name].shape})
    for name, value in expected.items():
        worst = float((found[name] - value).abs().max()) if value.numel() else 0.0
        assert worst <= share * moved, (
            f"{name} differs by {worst:.3g} after {_STEPS} steps in which weights moved by up to {moved:.3g}; {hint}"
        )


def _trained(
    trial: Trial,
    backward: Callable[[nn.Module, torch.optim.Optimizer, int], None],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights before and after some steps of SGD, which keeps small differences small."""
    model = without_copies(trial)
    tuner = tunerkit.tuner(model)
    start = values_of(trained_parameters(tuner))
    optimizer = torch.optim.SGD(trained_parameters(tuner).values(), lr=trial.lr, fused=True)
    tunerkit.attach(model, optimizer, total_steps=STEPS)
    for step in range(_STEPS):
        backward(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
    return start, values_of(trained_parameters(tuner))


def check_checkpointing(trial: Trial) -> None:
    """With gradient checkpointing, which runs forward again in backward, the gradients are equal."""
    model = without_copies(trial)
    tuner = tunerkit.tuner(model)
    expected = gradients(seeded(trial.loss, model), tuner)
    again = seeded(lambda each: checkpoint(trial.loss, each, use_reentrant=False), model)
    what = (
        "gradients differ under gradient checkpointing; forward must compute the same when it runs a second time, so "
        "it must not change the adapter"
    )
    assert_equal_sets(gradients(again, tuner), expected, 1e-5, what)
