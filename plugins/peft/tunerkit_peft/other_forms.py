"""Tensors in another form of PEFT's, such as those of effective convolutions, turned into the form that is declared."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import attrs
import torch
from torch import Tensor

from tunerkit.errors import shown
from tunerkit.plugin import FileError
from tunerkit_peft.declaration import Convert, Declaration
from tunerkit_peft.weights import Turned, Weights

OTHER: Final = "other "  # before the names of parts that the declared form does not have


def as_declared(weights: Weights, names: Declaration) -> Weights:
    """Return the tensors with those of other forms turned into the declared one, once they are asked for.

    Raises:
        FileError: A tensor of such a form is missing, or they do not fit together.
    """
    factors: dict[str, dict[str, str]] = {}
    turned: dict[str, Turned] = {}
    for path, keys in weights.factors.items():
        own = factors[path] = {part: key for part, key in keys.items() if not part.startswith(OTHER)}
        other = {part.removeprefix(OTHER): key for part, key in keys.items() if part.startswith(OTHER)}
        if not other:
            continue
        written = {leaf.name[0]: own[part] for part, leaf in names.tensors.items() if part in own}
        turn = partial(_turned, weights, {**written, **other}, names.others[next(iter(other))])
        try:
            made = turn(shapes_alone=True)  # they are compared before anything is computed
        except (KeyError, RuntimeError) as error:
            key, lacks = next(iter(other.values())), isinstance(error, KeyError)
            problem = f"is there without its {error.args[0]}" if lacks else "does not fit the layer's other tensors"
            raise FileError(f"{weights.file} is damaged or incomplete:\n- {shown(key)} {problem}") from error
        changed = {name: key for name, key in written.items() if name in made}
        turned |= {key: Turned(tuple(made[name].shape), partial(_one, turn, name)) for name, key in changed.items()}
    return attrs.evolve(weights, factors=factors, turned=turned)


def _turned(
    weights: Weights, keys: Mapping[str, str], convert: Convert, *, shapes_alone: bool = False
) -> Mapping[str, Tensor]:
    if shapes_alone:
        return convert({name: torch.empty(weights.shape(key), device="meta") for name, key in keys.items()})
    return convert({name: weights.tensor(key).float() for name, key in keys.items()})


def _one(turn: Callable[[], Mapping[str, Tensor]], name: str) -> Tensor:
    return turn()[name]
