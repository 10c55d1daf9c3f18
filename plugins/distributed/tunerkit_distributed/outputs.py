"""The tensors in a model's output."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in ``output``: itself, or those in mappings, sequences and dataclasses, nested in any way."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):  # first: outputs of transformers are dataclasses too
        yield from tensors_in(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for each in output:
            yield from tensors_in(each)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        yield from tensors_in([getattr(output, field.name, None) for field in dataclasses.fields(output)])
