"""The row about installed plugins that break: distributions in a temporary site folder, beside one that works."""

import importlib
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import tunerkit
from tests.faults.harness import Fault
from tests.faults.isolation import in_fork
from tests.faults.plugin_breaks import BREAKS, HEAD, METHOD, Break
from tests.faults.subjects import LONGEST_MESSAGE, Subject, net, output
from tunerkit import hooks
from tunerkit_testing import small
from tunerkit_testing.toy_methods import LowRankPlugin, ShiftPlugin

GOOD = HEAD + METHOD.replace('"broken"', '"good"')


def broken_plugins(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Install a broken plugin beside a good one, and use every method."""
    del subject
    for number in range(count):
        chance = random.Random(f"broken plugins/{number}")
        broken = BREAKS[number % len(BREAKS)]
        # The broken one may be found first or last, and may say that it wants to be asked first.
        first = chance.random() < 0.5
        site = folder / f"site-{number}"
        install(site, "tunerkit-good", "good", GOOD)
        install(site, "aaa-broken" if first else "zzz-broken", "broken", broken.text)
        outcome = in_fork(lambda b=broken, s=site: _used(b, s))  # type: ignore[misc]
        yield Fault(f"{number}: {broken.name}, found {'first' if first else 'last'}", outcome)


def install(site: Path, distribution: str, entry: str, text: str) -> None:
    """Install a distribution of one module: its files, its metadata and its entry point."""
    module = distribution.replace("-", "_")
    info = site / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{module}.py").write_text(text)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[tunerkit]\n{entry} = {module}\n")
    (info / "RECORD").write_text(f"{module}.py,,\n{info.name}/METADATA,,\n{info.name}/entry_points.txt,,\n")


def _used(broken: Break, site: Path) -> str:
    """Use all methods in this process, where the plugins are installed."""
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    hooks.registry.reset()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        installed = tunerkit.methods()
        for plugin in (LowRankPlugin(), ShiftPlugin()):
            tunerkit.register(plugin)
        for method in ("good", "toy-low-rank", "toy-shift"):
            wrong = _works(method, site)
            if wrong:
                return f"method {method!r} does not work: {wrong}"
    wrong = _listed(broken, installed)
    if wrong:
        return wrong
    if broken.during == "anybody":
        return "" if _is_named(" ".join(str(one.message) for one in told)) else "no warning names the plugin"
    return "" if broken.during == "import" else _own_failure(broken, site)


def _listed(broken: Break, installed: Any) -> str:
    errors = [info.error for info in installed.values() if info.error is not None]
    if broken.during != "import":
        return f"its import is said to fail: {errors[0][:200]}" if errors else ""
    if not errors:
        return "methods() does not say that the plugin is broken"
    longest = max(map(len, errors))
    return f"methods() has an error of {longest} characters" if longest > LONGEST_MESSAGE else ""


def _is_named(text: str) -> bool:
    return "broken" in text


def _works(method: str, site: Path) -> str:
    """Wrap, train, allocate, save, load, merge and unwrap with a method that is not broken."""
    try:
        model = tunerkit.wrap(net(), method, {"targets": ["0", "2"]}, seed=0)
        optimizer = torch.optim.SGD(small.trainable(model), lr=0.1)
        tunerkit.attach(model, optimizer, total_steps=3)
        small.train(model.train(), optimizer, 3)
        tuner = tunerkit.tuner(model)
        hooks.ranks_changed(tuner, tuner.history, step=3, budget=2, ranks={"0": 1, "2": 1})
        expected = output(model)
        tunerkit.save(model, site / method)
        if not torch.equal(output(tunerkit.load(net(), site / method)), expected):
            return "the loaded adapter gives other outputs"
        tunerkit.unwrap(tunerkit.merge(model))
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def _own_failure(broken: Break, site: Path) -> str:
    """Use the broken method until it fails. The error is ours and names the plugin, or what it answered was allowed."""
    try:
        _use(site)
    except tunerkit.TunerkitError as error:
        if len(str(error)) > LONGEST_MESSAGE:
            return f"a message of {len(str(error))} characters"
        return "" if _is_named(str(error)) else f"the error does not name the plugin: {str(error)[:200]}"
    except BaseException as error:
        notes = " ".join(getattr(error, "__notes__", ()))
        if isinstance(error, Exception) and _is_named(notes):
            return ""  # the plugin's own exception, with a note that says whose it is
        return f"{type(error).__name__}, which is no TunerkitError: {str(error)[:200]}"
    return "nothing was refused"


def _use(site: Path) -> None:
    """Use everything that asks the plugin of a method."""
    model = tunerkit.wrap(net(), "broken", {"targets": ["0", "2"]}, seed=0)
    output(model)
    optimizer = torch.optim.SGD(small.trainable(model), lr=0.1)
    tunerkit.attach(model, optimizer, total_steps=3)
    small.train(model.train(), optimizer, 3)
    tuner = tunerkit.tuner(model)
    tuner.budget(2)
    tuner.finish()
    tunerkit.save(model, site / "own")
    tunerkit.save_state(model, site / "own")
    tunerkit.load_state(model, site / "own")
    tunerkit.merge(tunerkit.load(net(), site / "own"))
