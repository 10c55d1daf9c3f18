"""Files of adapters that tests change, and the check that loading one is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, settings
from torch import nn

import tunerkit
from tests.support.toys import Toys
from tunerkit.serialization.header import digest

in_place = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_refused(
    toys: "Toys", path: Path, error: type[Exception], words: str = "", base: nn.Module | None = None
) -> str:
    """Check that loading ``path`` raises this error with ``words``, and leaves base and random state unchanged."""
    base = toys.net() if base is None else base
    before, state = toys.snapshot(base), torch.random.get_rng_state()
    with pytest.raises(error, match=words) as caught:
        tunerkit.load(base, path)
    assert toys.same(toys.snapshot(base), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    return str(caught.value)


def rewritten(path: Path, to: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """A file with a valid digest but changed fields or tensors."""
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()["tunerkit"])
    change(fields, tensors)
    text = json.dumps(fields)
    metadata = {"tunerkit": text, "tunerkit.digest": digest(text, tensors)}
    safetensors.torch.save_file(tensors, to, metadata)
    return to


def wrong(**fields: object) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda found, tensors: found.update(fields)


LONG = "x" * 100_000
