"""Checks of adapters of several methods at one target: merging is right, or it is refused."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import SkipTest

from torch import nn

import tunerkit
from tunerkit.testing.cases import Case, assert_same
from tunerkit.testing.checks.probing import fill_, require_delta

_HINT = (
    "set reads_output = True in the adapter's class if its forward uses the values of y for more than adding to it, "
    "and reads_weight = True if it reads the base layer's weight"
)


def check_stacked_first(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> str:
    """With an adapter of each installed method on top, merging keeps the output, or is refused in words."""
    return _check(case, method, config, first=True)


def check_stacked_second(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> str:
    """On top of an adapter of each installed method, merging keeps the output, or is refused in words."""
    return _check(case, method, config, first=False)


def _check(case: Case, method: str, config: Mapping[str, object], *, first: bool) -> str:
    require_delta(method)
    done = []
    for other, model in _stacks(case, method, config, first):
        adapted = case.output(model)
        order = f"{method} below {other}" if first else f"{method} on top of {other}"
        try:
            tunerkit.merge(model)
        except tunerkit.AdapterError:
            done.append(f"{other} (refused)")
            continue
        assert_same(case.output(model), adapted, f"{order}, merged against adapted", _HINT)
        done.append(other)
    if not done:
        raise SkipTest("no other installed method adapts this model")
    return "with " + ", ".join(done)


def _stacks(case: Case, method: str, config: Mapping[str, object], first: bool) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name of each other method, and a model with adapters of both that add something."""
    plain = {name: value for name, value in case.settings.items() if name in ("targets", "exclude", "layers")}
    for other, info in tunerkit.methods().items():
        if info.error is not None:
            continue
        mine, theirs = (method, {**plain, **config, "train_modules": ()}), (other, plain)
        model = case.build()
        try:
            for name, (each, settings) in zip("ab", (mine, theirs) if first else (theirs, mine), strict=True):
                tunerkit.wrap(model, each, settings, adapter=name, seed=0)
        except (tunerkit.ConfigError, tunerkit.TargetError):
            continue  # a method that needs other settings or targets
        yield other, fill_(model, 0.03).eval()
