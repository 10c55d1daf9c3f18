"""The bytes of a safetensors file: as the library writes them, with its metadata in order."""

from pathlib import Path

import safetensors.torch
import torch
from packaging.version import Version
from torch import nn

from tunerkit.serialization.safetensors_file import _DTYPES, bytes_of, plain, read, write


def test_a_file_has_the_bytes_that_the_library_writes(tmp_path: Path) -> None:
    """Of every dtype it knows, of tensors without values, tied and transposed ones; and reading gives them back."""
    base = torch.arange(24).reshape(4, 6)
    tensors = {
        name: (base / 8 if dtype.is_floating_point else base).to(dtype)
        for name, dtype in _DTYPES.items()
        if name != "C64" and not (Version(safetensors.__version__) < Version("0.8") and name.endswith("FNUZ"))
    }
    tensors |= {"a": base.T, "b": base[1:, ::2], "c": base, "d": torch.empty(0, 3), "e": torch.tensor(3.0)}
    write(path := tmp_path / "x.safetensors", plain(tensors), {"k": "v"})
    expected = safetensors.torch.save({name: tensor.clone().contiguous() for name, tensor in tensors.items()})
    assert _data_of(path.read_bytes()) == _data_of(expected)
    found, metadata = read(path, lambda metadata, names: None)
    assert metadata == {"k": "v"}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(tensors[name].double(), each.double()) for name, each in found.items())
    assert all(tensors[name].dtype == each.dtype and tensors[name].shape == each.shape for name, each in found.items())


def _data_of(content: bytes) -> bytes:
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_writing_copies_no_tensor_that_is_on_the_cpu_and_contiguous() -> None:
    """A file may be as large as the memory that is left: of an embedding and a head that are trained in full."""
    tensor, spread = torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(3, 2).T
    found = plain({"a": nn.Parameter(tensor), "b": spread})
    assert found["a"].data_ptr() == tensor.data_ptr()
    assert not found["a"].requires_grad
    assert [bytes(bytes_of(found[name])) for name in "ab"] == [tensor.numpy().tobytes(), spread.numpy().tobytes()]
