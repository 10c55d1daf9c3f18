"""The kit's own cases by name: a small network of torch's layers, and small models of other libraries."""

from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from tunerkit import TunerkitError
from tunerkit.errors import closest
from tunerkit_testing import small
from tunerkit_testing.cases import Case

LIBRARIES = ("transformers", "diffusers", "timm")
_DEFAULT = ("bert", "gpt2", "llama")


def _output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(small.X.clone())
    return found


NETWORK = Case("network", small.net, _output, small.loss_of, {"targets": ("0", "2"), "train_modules": ("4",)})


def of_library(library: str) -> tuple[Case, ...]:
    """Return the cases of a library, without those of a library that is not installed.

    Args:
        library: One of `LIBRARIES`.
    """
    if find_spec(library) is None:
        return ()
    found: tuple[Case, ...] = import_module(f"tunerkit_testing.{library}_cases").CASES
    return found


def default_cases() -> list[Case]:
    """Return a small BERT, GPT-2 and Llama; without transformers the small network."""
    return named(_DEFAULT) if find_spec("transformers") is not None else [NETWORK]


def named(names: Iterable[str | Case]) -> list[Case]:
    """Return cases by their names: ``"network"``, ``"bert"`` and the others that docs/authors/checks.md lists.

    Args:
        names: Their names; a case stays as it is.

    Raises:
        TunerkitError: There is no such case, or its library is not installed.
    """
    return [name if isinstance(name, Case) else _named(name) for name in names]


def _named(name: str) -> Case:
    known: Mapping[str, Case] = {"network": NETWORK} | {
        case.name: case for library in LIBRARIES for case in of_library(library)
    }
    if name not in known:
        hint = closest(name, known) or f"; there are: {', '.join(known)}"
        raise TunerkitError(f"no case named {name!r}{hint}")
    return known[name]
