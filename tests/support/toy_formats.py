"""A toy format for tests and examples: one JSON file with the products of an adapter, in lists."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tunerkit.errors import FileError
from tunerkit.plugin import Factors, Foreign, factors_of

if TYPE_CHECKING:
    from tunerkit.plugin import Tuner

FILE = "toy.json"


def sniff(path: Path) -> bool:
    """Whether there is such a file at ``path`` or in that folder."""
    return path.name == FILE or (path / FILE).is_file()


def read(path: Path, model: nn.Module) -> Foreign:
    """Read the products."""
    place = path if path.name == FILE else path / FILE
    try:
        held = json.loads(place.read_text())
        factors = {
            name: Factors(q=torch.tensor(q).reshape(len(q), -1), p=torch.tensor(p)) for name, (q, p) in held.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FileError(f"{place} is no toy adapter: {error}") from error
    return Foreign(factors)


def write(tuner: "Tuner", path: Path, options: object) -> list[Path]:
    """Write the products."""
    held = {name: (each.q.tolist(), each.p.tolist()) for name, each in factors_of(tuner).items()}
    place = path / FILE
    place.write_text(json.dumps(held))
    return [place]
