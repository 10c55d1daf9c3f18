"""Fine-tune a model through small adapters; every method is a plugin.

Five verbs, in the order in which a training uses them:

    wrap(model, method, config)    put adapters into the model and freeze the rest
    attach(model, optimizer)       let the optimizer, or a trainer, drive the adapters
    save(model, path)              write the adapter: one file
    load(base, path)               put a saved adapter into a base model
    merge(model)                   add the adapter to the weights, so that inference costs no more

For example:

    import torch, tunerkit

    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    model = tunerkit.wrap(model, "lora", {"rank": 4, "targets": "re:.*"})
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    tunerkit.attach(model, optimizer, total_steps=10)
    for _ in range(10):
        model(torch.randn(32, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    print(tunerkit.tuner(model))    # the adapter's settings and progress
    tunerkit.save(model, "out")

`tunerkit.methods()` lists the installed methods. Errors are in `tunerkit.errors`. Authors of plugins import from
`tunerkit.plugin`.
"""

import ast
import functools
import importlib
import pkgutil
import sys
import warnings
from typing import TYPE_CHECKING, Any, Final

import pluggy

from tunerkit.extras import VERBS, distribution, elsewhere, install

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__version__ = "0.1.0"
_NAMES: Final = (  # with the verbs that other distributions bring, they are ``__all__``
    *("wrap", "attach", "save", "load", "merge", "unmerge", "unwrap", "disabled", "export", "from_folder"),
    *("tuner", "adapters", "active", "activate", "freeze", "thaw", "rename", "delete", "trainable_parameters"),
    *("param_groups", "no_sync", "reference", "rounding", "save_state", "load_state", "grow_", "methods"),
    *("structure", "unstructure", "register", "unregister", "TunerkitError", "TunerkitWarning"),
)
hookimpl = pluggy.HookimplMarker(__name__)

# The module of each public name, from the stub for type checkers; "" for a public module.
_STUB: Final = ast.parse(pkgutil.get_data(__name__, "__init__.pyi") or b"")
_IMPORTS: Final = [each for each in _STUB.body if isinstance(each, ast.ImportFrom) and each.level]
_PLACES: Final = {"plugin": "", **{name.name: each.module or "" for each in _IMPORTS for name in each.names}}
_GROUP: Final = "tunerkit.verbs"  # entry points: ``calibrate`` is a verb, ``plugin.parameter`` a name for authors
_FACES: Final = ([__name__], [__name__, "plugin"])  # the modules whose `__getattr__` calls `find`


def find(name: str) -> Any:
    """Return a public name. Its module is imported only at the first use, since importing torch takes seconds."""
    if name not in _PLACES:
        return _brought(name)
    place = _PLACES[name]
    module = importlib.import_module(f".{place or name}", __name__)
    return getattr(module, name) if place else module


def _brought(name: str) -> Any:
    """Return a name that another distribution provides. Raises `VerbError`, or `AttributeError` for an unknown name."""
    # Python and notebooks look up names with underscores; `from tunerkit import hooks` calls this before it imports.
    if name.startswith("_") or any(each.name == name for each in pkgutil.iter_modules(__path__)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tunerkit.errors import VerbError, error_text  # at first use, as all names

    entries = (name, f"plugin.{name}")
    if _points().keys().isdisjoint(entries):
        _points.cache_clear()  # its distribution may have been installed since
    points = [point for entry in entries for point in _points().get(entry, ())]
    whose = [f"{point.dist.name} {point.dist.version}" for point in points if point.dist is not None]
    known = next((entry for entry in entries if entry in VERBS), None)
    if len(points) > 1:
        raise _error(f"tunerkit.{name} comes from both {' and '.join(whose)}; keep one of them", VerbError)
    if not points and known is not None:
        extra = VERBS[known]
        text = f"tunerkit.{known} comes with {distribution(extra)}, which is not installed: {install(extra)}"
        raise _error(text, VerbError)
    if not points:
        text = f"module {__name__!r} has no attribute {name!r}{elsewhere(name)}"
        raise _error(text, AttributeError) if elsewhere(name) else AttributeError(text)
    try:
        return points[0].load()
    except (Exception, SystemExit) as error:
        text = f"tunerkit.{points[0].name} of {whose[0]} cannot be loaded: {error_text(error)}; install another version"
        raise _error(text, VerbError) from error


@functools.cache
def _points() -> dict[str, list["EntryPoint"]]:
    """Return `_GROUP`'s entry points by name; if a distribution is installed twice, the first on the path counts."""
    from importlib.metadata import distributions  # `import tunerkit` alone does without it

    found: dict[str, list[EntryPoint]] = {}
    seen = set[str]()
    for each in distributions():
        try:
            points = each.entry_points.select(group=_GROUP)
            name = each.name if points else ""
        except Exception:  # `tunerkit.methods` lists distributions that cannot be read
            continue
        for point in points if name not in seen else ():
            found.setdefault(point.name, []).append(point)
        seen.add(name)
    return found


def _error(text: str, kind: type[AttributeError]) -> Exception:
    """Return ``kind(text)``; during ``from tunerkit import x`` an `ImportError`, whose text Python does not replace."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[:2] in _FACES:
        frame = frame.f_back
    return ImportError(text) if frame.f_code.co_name == "_handle_fromlist" else kind(text)


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return [*_NAMES, *sorted(verb for verb in _points() if verb.isidentifier() and verb not in _PLACES)]
    found, place = find(name), _PLACES.get(name)
    if name in _NAMES or place == "" or (place is None and name in _points()):
        return globals().setdefault(name, found)
    # ``from tunerkit import X`` calls this twice, first from the import system. Not cached, so that each use warns.
    if sys._getframe(1).f_globals.get("__name__") != "importlib._bootstrap":
        home = f"{__name__}.{'errors' if place == 'errors' else 'plugin'}"
        text = f"tunerkit.{name} will be removed in version 0.3; write: from {home} import {name}"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
    return found


def __dir__() -> list[str]:
    names = {"errors", "plugin", *__getattr__("__all__")}
    return sorted({*names, *(name for name in globals() if name.startswith("__"))})
