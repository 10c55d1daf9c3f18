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
    print(tunerkit.tuner(model))    # what the adapter is, and how far it is
    tunerkit.save(model, "out")

`tunerkit.methods()` says which methods are installed. Errors are in `tunerkit.errors`. Authors of plugins import from
`tunerkit.plugin`.
"""

import ast
import importlib
import pkgutil
import sys
import warnings
from typing import Any, Final

import pluggy

from tunerkit.extras import elsewhere

__version__ = "0.1.0"
__all__ = [
    *("wrap", "attach", "save", "load", "merge", "unmerge", "unwrap", "disabled", "export", "from_folder"),
    *("tuner", "adapters", "active", "activate", "freeze", "thaw", "rename", "delete", "trainable_parameters"),
    *("param_groups", "calibrate", "no_sync", "reference", "rounding", "save_state", "load_state", "grow_"),
    *("method", "methods", "structure", "unstructure", "register", "unregister", "TunerkitError", "TunerkitWarning"),
]
hookimpl = pluggy.HookimplMarker(__name__)


# All names, and the module of each; for a module that is public itself, an empty text. Type checkers read the stub too.
_STUB: Final = ast.parse(pkgutil.get_data(__name__, "__init__.pyi") or b"")
_IMPORTS: Final = [each for each in _STUB.body if isinstance(each, ast.ImportFrom) and each.level]
_PLACES: Final = {"plugin": "", **{name.name: each.module or "" for each in _IMPORTS for name in each.names}}


def find(name: str) -> Any:
    """Import the module of a name when it is first used: torch takes seconds, and the command's help needs none."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{elsewhere(name)}")
    place = _PLACES[name]
    module = importlib.import_module(f".{place or name}", __name__)
    return getattr(module, name) if place else module


def __getattr__(name: str) -> Any:
    caller = sys._getframe(1)
    try:
        found = find(name)
    except AttributeError as error:
        # It loses its text in `from tunerkit import name`, which asks through that function of Python's.
        if elsewhere(name) and caller.f_code.co_name == "_handle_fromlist":
            raise ImportError(*error.args) from None
        raise
    if name in __all__ or not _PLACES[name]:
        return globals().setdefault(name, found)
    # ``from tunerkit import X`` asks twice, first from inside the import system. Nothing is kept: each use warns.
    if caller.f_globals.get("__name__") != "importlib._bootstrap":
        home = f"{__name__}.{'errors' if _PLACES[name] == 'errors' else 'plugin'}"
        text = f"tunerkit.{name} will be removed in version 0.3; write: from {home} import {name}"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
    return found


def __dir__() -> list[str]:
    return sorted({"errors", "plugin", *__all__, *(name for name in globals() if name.startswith("__"))})
