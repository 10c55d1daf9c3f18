"""Checks of dropout: a setting that has it in its name drops something, and keeps the mean."""

from contextlib import suppress
from unittest import SkipTest

import attrs
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit import hooks
from tunerkit.errors import ConfigError, TargetError
from tunerkit_testing.cases import Trial
from tunerkit_testing.checks.probing import Call, calls_of, filled, seeded, shared_in, tiled

_SHARE, _SAMPLES, _ROWS = 0.5, 32, 64
# The mean over the samples, as a share of what eval mode adds. Unscaled dropout has 0.5, one that is scaled twice 2.
_LEAST, _MOST = 0.75, 1.33


@torch.no_grad()
def check_dropout(trial: Trial) -> str:
    """A setting with dropout in its name drops something in training, nothing in eval mode, and keeps the mean."""
    done = []
    for name in dropout_settings(trial.method):
        with suppress(ConfigError, TargetError):  # this setting may exclude another one
            model = filled(trial.but(**{name: _SHARE}))
            shared, dots = shared_in(tunerkit.tuner(model)), torch.zeros(2, dtype=torch.float64)
            for call in calls_of(model, trial):
                if call.base.lends:  # its output is computed from the delta, where nothing can be dropped
                    continue
                with tunerkit.disabled(model):
                    large = tiled(call, _ROWS)
                    plain = large.run()
                parts: list[nn.Module] = [call.adapter] if shared is None else [call.adapter, shared]
                dots += _compared(large, plain, parts, name)
            if dots.any():
                done.append(f"{name}: a mean of {_checked(dots, name):.2f} times what eval mode adds")
    if not done:
        raise SkipTest("the method has no setting with dropout in its name, or no target at which it can drop")
    return "; ".join(done)


def _compared(call: Call, plain: Tensor, parts: list[nn.Module], name: str) -> Tensor:
    """Return the products of what eval mode adds with the mean of what training adds, and with itself."""
    added = call.run() - plain
    assert torch.equal(seeded(lambda _: call.run(), call.module, 2) - plain, added), (
        f"{call.path}: with {name}={_SHARE}, two forwards in eval mode differ; drop only while self.training is true"
    )
    for part in parts:
        part.train()
    drawn = torch.stack([seeded(lambda _: call.run(), call.module, seed) - plain for seed in range(_SAMPLES)])
    for part in parts:
        part.eval()
    assert not torch.equal(drawn[0], drawn[1]), (
        f"{call.path}: with {name}={_SHARE}, two forwards in training mode are equal; drop that share of x in forward "
        "(add_low_rank(..., dropout=...) does), or leave the setting out"
    )
    mean, eval_adds = drawn.mean(0).double(), added.double()
    return torch.stack([(mean * eval_adds).sum(), eval_adds.square().sum()]).cpu()


def _checked(dots: Tensor, name: str) -> float:
    share = float(dots[0] / dots[1])
    assert _LEAST <= share <= _MOST, (
        f"with {name}={_SHARE}, an adapter adds on average {share:.2f} times in training what it adds in eval mode; "
        f"divide what is kept by 1 - {name}, as torch.nn.functional.dropout does"
    )
    return share


def without_dropout(trial: Trial) -> Trial:
    """Return the trial with each setting of dropout at 0, where the method allows that."""
    for name in dropout_settings(trial.method):
        with suppress(ConfigError):  # it may not be 0
            without = trial.but(**{name: 0.0})
            without.structured()
            trial = without
    return trial


def dropout_settings(method: str) -> list[str]:
    """Return the names of the settings that have dropout in their names."""
    fields = attrs.fields(hooks.registry.get(method).config)
    return [field.name for field in fields if "dropout" in field.name and field.type is float]
