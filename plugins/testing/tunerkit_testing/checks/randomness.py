"""Checks of random numbers: the user's are left alone, a seed means the same in every process, and dropout drops."""

import random
import sys
from collections.abc import Callable
from contextlib import suppress
from unittest import SkipTest
from unittest.mock import patch

import attrs
import numpy
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit import hooks
from tunerkit.errors import ConfigError, TargetError
from tunerkit_testing.cases import STEPS, Trial, assert_same
from tunerkit_testing.checks.probing import Call, calls_of, filled, in_training, saved, tiled, without_copies
from tunerkit_testing.checks.start import assert_same_start
from tunerkit_testing.small import trainable

_SEED, _STEPS = 20_141_222, 3


def check_random_state(trial: Trial) -> None:
    """No hook and no forward seeds torch's random state, or uses those of Python and NumPy: they are the user's.

    So are torch's global settings, such as the mode of gradients, the default dtype and the number of threads.
    """
    base, again = trial.build(), trial.build()
    _assert_unseeded("building adapters", lambda: tunerkit.wrap(base, trial.method, trial.settings))
    model = filled(trial)
    calls = calls_of(model, trial)
    for training in (True, False):

        def forwards(training: bool = training) -> None:
            for call in calls:
                call.adapter.train(training)
                call.run()

        _assert_unseeded("forward", forwards)
    if hooks.has_delta(trial.method):
        _assert_unseeded("the delta", lambda: tunerkit.unmerge(tunerkit.merge(model)))
    model = without_copies(trial)
    _assert_unseeded_steps(model, trial)
    path = trial.folder / "out"
    _assert_unseeded("saving", lambda: tunerkit.save(model, path))
    _assert_unseeded("loading", lambda: tunerkit.load(again, path))


def _assert_unseeded_steps(model: nn.Module, trial: Trial) -> None:
    if not (trained := trainable(model)):
        return  # another check is about it
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    _assert_unseeded("attaching", lambda: tunerkit.attach(model, optimizer, total_steps=STEPS))
    for _ in range(_STEPS):
        loss = trial.loss(model)
        if not loss.requires_grad:
            return
        loss.backward()
        _assert_unseeded("a step", optimizer.step)
        optimizer.zero_grad()


def _assert_unseeded(what: str, run: Callable[[], object]) -> None:
    torch.manual_seed(_SEED)
    before, usual = (random.getstate(), numpy.random.get_state(legacy=False)), _settings()
    with suppress(Exception):  # other checks are about it
        run()
    others = [name for name, value in _settings().items() if value != usual[name]]
    assert not others, (
        f"{what} changes torch's {' and '.join(others)}, which is the user's and holds for all that runs here; "
        "set such a thing for a block alone, as `with torch.no_grad():` does"
    )
    assert torch.initial_seed() == _SEED, (
        f"{what} sets the seed of torch's random state, which is the user's: what is drawn later repeats itself, and "
        "the seed of wrap has no effect; call no torch.manual_seed, and draw from torch's random state or from a "
        "torch.Generator of your own"
    )
    after = random.getstate(), numpy.random.get_state(legacy=False)
    assert repr(after) == repr(before), (
        f"{what} uses the random state of Python or NumPy, which is the user's, and which no seed of wrap sets; draw "
        "from torch's random state or from a torch.Generator of your own"
    )


def _settings() -> dict[str, object]:
    """Return the settings of torch that hold in the whole process or thread, by name."""
    return {
        "mode of gradients": torch.is_grad_enabled(),
        "mode of inference": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "number of threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "precision of matrix products": torch.get_float32_matmul_precision(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "detection of anomalies": torch.is_anomaly_enabled(),
    }


def check_other_process(trial: Trial) -> None:
    """In a process in which ``hash`` gives other numbers for text, a seed gives the same adapter, and files load."""
    model = filled(trial)
    expected, path = trial.output(model), saved(model, trial.folder)
    with patch("builtins.hash", _other_hash):
        again = trial.wrapped()
        loaded = tunerkit.load(trial.build(), path).eval()
    where = "in a process with another PYTHONHASHSEED"
    hint = (
        "hash() of text is another number in each process: seed with zlib.crc32(path.encode()), or with a number that "
        "is saved"
    )
    assert_same_start(trial.wrapped(), again, f"{where}; {hint}")
    assert_same(trial.output(loaded), expected, f"loaded {where}", hint)


_hash = hash


def _other_hash(value: object) -> int:
    """What ``hash`` returns in another process. Classes that define `__hash__` keep theirs: dicts need it to stay."""
    if sys._getframe(1).f_code.co_name == "__hash__" or not _has_text(value):
        return _hash(value)
    return _hash(("another process", value))


def _has_text(value: object) -> bool:
    if isinstance(value, tuple | frozenset):
        return any(map(_has_text, value))
    return isinstance(value, str | bytes)


# --- Dropout ----------------------------------------------------------------------------------------------------------

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
            dots = torch.zeros(2, dtype=torch.float64)
            for call in calls_of(model, trial):
                if call.base.lends:  # its output is computed from the delta, where nothing can be dropped
                    continue
                with tunerkit.disabled(model):
                    large = tiled(call, _ROWS)
                    plain = large.run()
                dots += _compared(large, plain, model, name)
            if dots.any():
                done.append(f"{name}: a mean of {_checked(dots, name):.2f} times what eval mode adds")
    if not done:
        raise SkipTest("the method has no setting with dropout in its name, or no target at which it can drop")
    return "; ".join(done)


def _compared(call: Call, plain: Tensor, model: nn.Module, name: str) -> Tensor:
    """Return the products of what eval mode adds with the mean of what training adds, and with itself."""
    added = call.run() - plain
    assert torch.equal(call.seeded(2) - plain, added), (
        f"{call.path}: with {name}={_SHARE}, two forwards in eval mode differ; drop only while self.training is true"
    )
    with in_training(call, model):
        drawn = torch.stack([call.seeded(seed) - plain for seed in range(_SAMPLES)])
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
