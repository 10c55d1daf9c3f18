"""Tensors of a file that do not fit what its header says are refused before a model is changed."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tunerkit
from tests.support.adapter_files import assert_refused, rewritten
from tests.support.toys import Toys
from tunerkit.errors import ConfigError, FileError

pytestmark = pytest.mark.filterwarnings("ignore:.*running statistics")


def test_every_misfit_of_tensors_is_named_at_once(toys: "Toys", saved: Path, tmp_path: Path) -> None:
    """One error lists missing, unexpected and misshapen tensors, and nothing is loaded."""

    def change(fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        del tensors["conv.adapter.a"], tensors["head.2.copy.bias"]
        tensors["layers.0.adapter.b"] = torch.ones(3, 3)
        tensors["layers.1.bias"] = torch.ones(2)
        tensors["conv.adapter.c"] = torch.ones(1)
        tensors["stray"] = torch.ones(1)

    text = assert_refused(
        toys, rewritten(saved, tmp_path / "x.safetensors", change), FileError, "does not fit its own header"
    )
    for words in (
        "missing: conv.adapter.a", "missing: head.2.copy.bias", "unexpected: conv.adapter.c", "unexpected: stray",
        "at layers.0: ", "at layers.1: ",
    ):  # fmt: skip
        assert words in text


@pytest.mark.parametrize("rank", [3, 10**7, 10**12, 2**63 - 1, 2**63, 10**99, 10**400])
def test_a_small_file_cannot_ask_for_much_memory(toys: "Toys", saved: Path, tmp_path: Path, rank: int) -> None:
    """A config that asks for more than the file has is refused, a huge one before a plugin makes such tensors."""

    def change(fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        fields["config"]["rank"] = rank

    error, words = (FileError, "needs a tensor of") if rank < 2**64 else (ConfigError, "expected an int of 64 bits")
    words = "(?s)does not fit its own.*at conv: .*at layers.0: .*at layers.1: " if rank == 3 else words
    assert_refused(toys, rewritten(saved, tmp_path / "x.safetensors", change), error, words)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int32, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("name", ["conv.adapter.a", "head.2.copy.weight", "layers.0.bias"])
def test_tensors_of_another_kind_are_refused(
    toys: "Toys", saved: Path, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    """Integers, booleans, complex numbers and 8-bit floats are no weights in float32: they are not cast."""

    def change(fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.ones_like(tensors[name]).to(dtype)

    words = rf"{name} is {str(dtype).removeprefix('torch.')}, expected float32"
    assert_refused(toys, rewritten(saved, tmp_path / "x.safetensors", change), FileError, words)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_in_another_precision_are_loaded(toys: "Toys", tmp_path: Path, dtype: torch.dtype) -> None:
    """A model may be converted before it is saved; the adapter is loaded in the precision that its config names."""
    model = toys.trained()
    for slot in tunerkit.tuner(model).adapters().values():
        slot.to(dtype)
    loaded = tunerkit.load(toys.net(), tunerkit.save(model, tmp_path))
    assert {p.dtype for p in tunerkit.tuner(loaded).parameters()} == {torch.float32}
    assert torch.allclose(loaded(toys.x()), toys.trained()(toys.x()), rtol=0.1, atol=0.1)


def test_values_that_overflow_in_this_model_are_refused(toys: "Toys", saved: Path, tmp_path: Path) -> None:
    """A head that was trained in float32 may be too large for a base in float16."""

    def change(fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["head.2.copy.weight"][0, 0] = 1e30

    path = rewritten(saved, tmp_path / "x.safetensors", change)
    assert_refused(toys, path, FileError, r"too large for the precision .*: head\.2\.copy\.weight", toys.net().half())
    assert tunerkit.load(toys.net(), path).head[2].tunerkit.default.copy.weight.max() == 1e30
