"""Finding the tensors in what models return."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch

from tunerkit_distributed.outputs import tensors_in


@dataclass
class Output:
    """What a model may return."""

    loss: torch.Tensor
    further: Any
    name: str = "output"
    nothing: None = None
    derived: list[torch.Tensor] = field(default_factory=list)
    unset: torch.Tensor = field(init=False)


def test_tensors_are_found_in_nested_outputs() -> None:
    """In mappings, sequences and dataclasses, each once and in order; anything else is passed over."""
    a, b, c, d = (torch.ones(1) for _ in range(4))
    output = Output(a, OrderedDict(x=(b, [c, None]), y={"z": 3}), derived=[d])
    assert [id(each) for each in tensors_in((output, "text", object, Output))] == [id(each) for each in (a, b, c, d)]
    assert [id(each) for each in tensors_in(a)] == [id(a)]
