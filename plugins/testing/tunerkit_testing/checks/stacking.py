"""Checks of adapters of several methods at one target: merging is right, or it is refused."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Final
from unittest import SkipTest

import attrs

import tunerkit
from tunerkit import hooks
from tunerkit.errors import AdapterError, ConfigError, TargetError
from tunerkit_testing.cases import SEED, Trial, assert_same
from tunerkit_testing.checks.probing import IN_LAYER, adapter_dtypes, fill_, layers_of, require_delta
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import DeclaredPlugin

_TOY: Final = "toy-declared"  # a plain low-rank product, which is right whatever else stands at its target
_HINT: Final = (
    "set reads_output = True in the adapter's class if its forward uses the values of y for more than adding to it, "
    "and reads_weight = True if it reads the base layer's weight"
)


class _Unsuitable(Exception):
    """The methods do not adapt the same targets of this model."""


def check_stacked_first(trial: Trial) -> str:
    """With an adapter of each installed method on top, merging keeps the output, or is refused in words."""
    return _check(trial, first=True)


def check_stacked_second(trial: Trial) -> str:
    """On top of an adapter of each installed method, merging keeps the output, or is refused in words."""
    return _check(trial, first=False)


def _check(trial: Trial, *, first: bool) -> str:
    require_delta(trial.method)
    done: dict[str, None] = {}
    for mine in layers_of(trial):
        for theirs in _others(mine):
            try:
                refused = _merge(mine, theirs) if first else _merge(theirs, mine)
                done[f"{theirs.method} (refused)" if refused else theirs.method] = None
            except _Unsuitable:
                continue
            except Exception as problem:  # another plugin may raise anything
                order = f"{mine.method} below {theirs.method}" if first else f"{mine.method} on top of {theirs.method}"
                kind = "" if isinstance(problem, AssertionError) else f"{type(problem).__name__}: "
                done[_judged(mine, theirs, f"{order} at {mine.case.name}, {kind}{problem}")] = None
    if not done:
        raise SkipTest("no other installed method adapts these layers")
    return "with " + ", ".join(done)


def _others(layer: Trial) -> Iterator[Trial]:
    """Yield a trial of each installed method that has a delta."""
    for other, info in tunerkit.methods().items():
        if info.error is None and hooks.registry.get(other).targets == "weights" and hooks.has_delta(other):
            yield attrs.evolve(layer, method=other, config=IN_LAYER)


def _merge(below: Trial, above: Trial) -> bool:
    """Merge a model with adapters of both that add something, and return whether that was refused.

    Raises:
        AssertionError: The merged model computes something else.
    """
    model = below.build()
    try:
        for name, part in zip("ab", (below, above), strict=True):
            tunerkit.wrap(model, part.method, part.settings, adapter=name, seed=SEED)
    except (ConfigError, TargetError) as problem:
        raise _Unsuitable from problem  # a method that needs other settings or targets
    fill_(model, 0.03).eval()
    adapted = below.output(model)
    try:
        tunerkit.merge(model)
    except AdapterError:
        return True
    assert_same(below.output(model), adapted, "merged against adapted", _HINT, adapters=adapter_dtypes(model))
    return False


def _judged(mine: Trial, theirs: Trial, what: str) -> str:
    """Return a remark if a failed stack is the fault of the other method alone.

    Raises:
        AssertionError: It is the fault of the method that is checked, or it cannot be decided.
    """
    toy = attrs.evolve(mine, method=_TOY, config=IN_LAYER)
    parts = [mine] if mine.method == theirs.method else [mine, theirs]
    with nullcontext() if _TOY in tunerkit.methods() else registered(DeclaredPlugin()):
        guilty = [part.method for part in parts if _fails_beside(part, toy)]
    if guilty and mine.method not in guilty:
        return f"{theirs.method} (its own fault: it fails beside a plain low-rank product too)"
    both = f"{mine.method} and {theirs.method}"
    verdict = {
        0: f"{both} fail only together: each is right beside a plain low-rank product",
        1: f"{mine.method} is the cause: it fails beside a plain low-rank product too",
        2: f"{both} are both wrong: each fails beside a plain low-rank product too",
    }[len(guilty)]
    raise AssertionError(f"{verdict}. {what}")


def _fails_beside(part: Trial, toy: Trial) -> bool:
    for below, above in ((part, toy), (toy, part)):
        try:
            _merge(below, above)
        except _Unsuitable:
            continue
        except Exception:  # as above
            return True
    return False
