"""Reading: an adapter comes back with its scale, and wrong files are refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import pytest
import torch

import tunerkit
from plugins.gguf.tests.base_files import LINEAR, causal_lm, meta_lm, randomize, write_all
from tests.support.pipes import pipe
from tunerkit.plugin import factors_of
from tunerkit_gguf.reading import read, sniff

pytest.importorskip("tunerkit_lora", reason="the adapters are LoRA")

EVERYWHERE = [*LINEAR, "embed_tokens", "lm_head"]
IDS = torch.tensor([[3, 5, 7, 9, 40, 2, 11]])
VALUES: Mapping[str, object] = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0}
NAME = "blk.0.ffn_up.weight"
TENSORS: Mapping[str, Any] = {
    f"{NAME}.lora_a": np.ones((2, 32), np.float32), f"{NAME}.lora_b": np.ones((40, 2), np.float32)
}  # fmt: skip


def file_of(
    place: Path,
    values: Mapping[str, object] = VALUES,
    tensors: Mapping[str, Any] = TENSORS,
    architecture: str = "llama",
) -> Path:
    """A file with any metadata and tensors."""
    writer = gguf.GGUFWriter(place, architecture)
    for name, value in values.items():
        kinds: Any = {str: writer.add_string, float: writer.add_float32, list: writer.add_array, int: writer.add_uint32}
        kinds[type(value)](name, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    write_all(writer)
    return place


def trained(model_type: str = "llama") -> Any:
    model = tunerkit.wrap(
        causal_lm(model_type),
        "lora",
        {"rank": 4, "alpha": 3.0, "targets": EVERYWHERE, "rank_pattern": {"v_proj": 7, "o_proj": 1, "embed_tokens": 5}},
    )
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_what_was_written_is_read_as_it_was(model_type: str, tmp_path: Path) -> None:
    """The model computes the same, each target has its rank, and a second file adds the same as the first."""
    model = trained(model_type)
    file = tunerkit.export(model, tmp_path / "one.gguf", format="gguf")
    other = tunerkit.load(causal_lm(model_type), file).eval()
    with torch.no_grad():
        torch.testing.assert_close(other(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    assert tunerkit.tuner(other).ranks() == tunerkit.tuner(model).ranks()
    again = tunerkit.export(other, tmp_path / "two", format="gguf") / "adapter.gguf"
    one, two = (read(each, meta_lm(model_type)).factors for each in (file, again))
    assert one.keys() == two.keys()
    for path, product in one.items():
        torch.testing.assert_close(two[path].p @ two[path].q, product.p @ product.q, rtol=1e-5, atol=1e-5)


def test_training_goes_on_with_the_scale_of_llama_cpp(tmp_path: Path) -> None:
    """It is alpha / r at each target, and a and b are the file's own."""
    model = tunerkit.load(causal_lm(), file_of(tmp_path / "a.gguf"), trainable=True)
    (adapter,) = tunerkit.tuner(model).adapters().values()
    assert adapter.scale == 4.0
    assert torch.equal(adapter.get_parameter("b"), torch.ones(40, 2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tunerkit.attach(model, optimizer)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(adapter.get_parameter("b"), torch.ones(40, 2))


def test_without_alpha_nothing_is_scaled(tmp_path: Path) -> None:
    """llama.cpp takes a missing alpha as 0, and 0 as no scale."""
    values = {name: value for name, value in VALUES.items() if name != "adapter.lora.alpha"}
    model = tunerkit.load(causal_lm(), file_of(tmp_path / "a.gguf", values))
    (product,) = factors_of(tunerkit.tuner(model)).values()
    assert torch.equal(product.p @ product.q, torch.full((40, 32), 2.0))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_other_types_of_numbers_are_read(kind: str, tmp_path: Path) -> None:
    """Those that llama.cpp's converter writes."""
    chosen = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for name, value in VALUES.items():
        writer.add_float32(name, value) if isinstance(value, float) else writer.add_string(name, str(value))
    # b has rows of 2, which Q8_0 cannot hold: llama.cpp's converter leaves such tensors in F16 too.
    a, b = (np.random.default_rng(0).standard_normal(each.shape).astype(np.float32) for each in TENSORS.values())
    writer.add_tensor(f"{NAME}.lora_a", gguf.quants.quantize(a, chosen), raw_dtype=chosen)
    writer.add_tensor(f"{NAME}.lora_b", b.astype(np.float16))
    write_all(writer)
    (own,) = read(tmp_path / "a.gguf", causal_lm()).tensors.values()
    torch.testing.assert_close(own["a"], torch.from_numpy(a), rtol=1e-2, atol=2e-2)


def test_an_adapter_is_recognised_by_its_first_bytes(tmp_path: Path) -> None:
    """A file or the folder around it; not a whole model, another file, or nothing."""
    (tmp_path / "folder").mkdir()
    file_of(tmp_path / "folder" / "adapter.gguf")
    file_of(tmp_path / "model.gguf", {"general.type": "model"})
    (tmp_path / "text.gguf").write_text("general.type adapter")
    assert sniff(tmp_path / "folder")
    assert sniff(tmp_path / "folder" / "adapter.gguf")
    assert not any(sniff(tmp_path / name) for name in ("model.gguf", "text.gguf", "missing", ".", "a\0b"))
    with pipe(tmp_path / "pipe.gguf") as path, mock.patch.object(Path, "open", side_effect=AssertionError):
        assert not sniff(path)  # without opening it, which would wait


def test_reading_needs_no_weights(tmp_path: Path) -> None:
    """The model may be on the meta device."""
    file = tunerkit.export(trained(), tmp_path / "a.gguf", format="gguf")
    found = read(file, meta_lm())
    assert found.tensors["model.embed_tokens"]["a"].shape == (5, 48)
    assert not any(tensor.is_meta for own in found.tensors.values() for tensor in own.values())


def test_norms_are_left_out_and_said_so(tmp_path: Path) -> None:
    """llama.cpp ignores them too."""
    tensors = {**TENSORS, "blk.0.attn_norm.weight": np.ones(32, np.float32)}
    with pytest.warns(tunerkit.TunerkitWarning, match="1 norms are left out, as in llama.cpp"):
        tunerkit.load(causal_lm(), file_of(tmp_path / "a.gguf", tensors=tensors))


A, B = TENSORS.values()


@pytest.mark.parametrize(
    ("values", "tensors", "said"),
    [
        ({"general.type": "model"}, TENSORS, "general.type is 'model'.*whole model"),
        ({"adapter.type": "dora"}, TENSORS, "adapter.type is 'dora'"),
        ({"adapter.lora.alpha": -1.0}, TENSORS, "adapter.lora.alpha is -1.0"),
        ({"adapter.lora.alpha": float("nan")}, TENSORS, "adapter.lora.alpha is nan"),
        ({"adapter.lora.alpha": "8"}, TENSORS, "adapter.lora.alpha is '8'"),
        ({"adapter.alora.invocation_tokens": [1, 2]}, TENSORS, "adapter.alora.invocation_tokens"),
        ({}, {}, "no tensors"),
        ({}, {f"{NAME}.lora_a": A}, f"lacks {NAME}.lora_b"),
        ({}, {f"{NAME}.lora_b": B}, f"lacks {NAME}.lora_a"),
        ({}, {**TENSORS, "blk.0.ffn_up.weight.magnitude": B}, "has the tensor.*magnitude"),
        ({}, {f"{NAME}.lora_a": A[:1], f"{NAME}.lora_b": B}, r"lora_a \(1, 32\) and lora_b \(40, 2\)"),
        ({}, {f"{NAME}.lora_a": A, f"{NAME}.lora_b": B[:, 0].copy()}, r"lora_b \(40,\)"),
        ({}, {f"{NAME}.lora_a": A, f"{NAME}.lora_b": B * np.float32("nan")}, "NaN"),
        ({}, {f"{NAME}.lora_a": A.astype(np.int32), f"{NAME}.lora_b": B}, "write it as f32 or f16"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)  # fmt: skip
def test_a_wrong_file_is_refused_by_name(
    values: Mapping[str, object], tensors: Mapping[str, Any], said: str, tmp_path: Path
) -> None:
    """One error with the key; the model is as it was."""
    file, model = file_of(tmp_path / "adapter.gguf", {**VALUES, **values}, tensors), causal_lm()
    with pytest.raises(tunerkit.errors.FileError, match=f"(?s)adapter.gguf.*{said}"):
        tunerkit.load(model, file) if sniff(file) else read(file, model)
    assert not tunerkit.adapters(model)


@pytest.mark.parametrize(
    ("tensors", "architecture", "said"),
    [
        (TENSORS, "qwen2", "general.architecture is 'qwen2'.*'llama'"),
        ({name.replace("blk.0", "blk.9"): each for name, each in TENSORS.items()}, "llama", "blk.9.ffn_up.weight"),
        ({f"{NAME}.lora_a": A[:, :30].copy(), f"{NAME}.lora_b": B}, "llama", "mlp.up_proj"),
        ({"blk.0.attn_q.weight.lora_a": A, "blk.0.attn_q.weight.lora_b": B[:36]}, "llama", "36 rows.*4 heads"),
    ],
    ids=["architecture", "layer", "shape", "heads"],
)  # fmt: skip
def test_an_adapter_of_another_model_is_refused(
    tensors: Mapping[str, Any], architecture: str, said: str, tmp_path: Path
) -> None:
    """Named as such, with what differs."""
    file = file_of(tmp_path / "a.gguf", tensors=tensors, architecture=architecture)
    with pytest.raises(tunerkit.errors.BaseMismatchError, match=f"(?s)another base model.*{said}"):
        tunerkit.load(causal_lm(), file)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    """At each byte of its metadata, and within its tensors."""
    whole = file_of(tmp_path / "whole.gguf").read_bytes()
    cut, model = tmp_path / "cut.gguf", causal_lm()
    for length in (*range(0, 500), len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(tunerkit.errors.FileError, match=r"cut\.gguf"):
            read(cut, model)
