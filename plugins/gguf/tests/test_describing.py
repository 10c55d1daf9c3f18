"""What ``tunerkit show`` says of a GGUF file, without a model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tunerkit
from plugins.gguf.tests.test_reading import NAME, TENSORS, VALUES, A, B, file_of
from tunerkit_gguf.describing import describe

HUB = "https://huggingface.co/org/Tiny-Llama"


def pair(rank: int, kind: Any = np.float32) -> tuple[Any, Any]:
    return np.ones((rank, 32), kind), np.ones((40, rank), kind)


def test_a_description_says_what_the_file_holds(tmp_path: Path) -> None:
    """Ranks by llama.cpp's names, the transposed embedding's too; base, alpha, architecture and types of numbers."""
    halves = {
        "blk.1.attn_q.weight": pair(3, np.float16),
        "token_embd.weight": (np.ones((48, 5), np.float32), B[:, [0] * 5]),
    }
    more = {f"{name}.lora_{half}": each for name, (a, b) in halves.items() for half, each in (("a", a), ("b", b))}
    values = {**VALUES, "general.base_model.0.name": "Tiny Llama", "general.base_model.0.repo_url": HUB}
    tensors = {**TENSORS, **more, "blk.0.attn_norm.weight": np.ones(32, np.float32)}
    found = describe(file_of(tmp_path / "adapter.gguf", values, tensors))
    assert (found.method, found.base, found.model_class) == ("lora", "org/Tiny-Llama", "")
    assert found.ranks == {"blk.0.ffn_up": 2, "blk.1.attn_q": 3, "token_embd": 5}
    assert found.settings == {
        "alpha": 8.0, "dtype": "f16, f32", "architecture": "llama", "base_name": "Tiny Llama"
    }  # fmt: skip
    assert describe(tmp_path) == found


@pytest.mark.parametrize("url", ["", "https://example.org/org/name", "https://huggingface.co/org"])
def test_a_base_that_cannot_be_loaded_is_not_named(url: str, tmp_path: Path) -> None:
    """A title is no name on the hub."""
    values = {**VALUES, "general.base_model.0.name": "Tiny Llama", "general.base_model.0.repo_url": url}
    found = describe(file_of(tmp_path / "a.gguf", values))
    assert (found.base, found.settings["base_name"]) == ("", "Tiny Llama")


def test_the_command_shows_it(tmp_path: Path) -> None:
    """As lines and as JSON."""
    pytest.importorskip("typer", reason="the command needs the extra [cli]")
    from tests.support.train_command import command, succeeded

    file = file_of(tmp_path / "a.gguf")
    lines = succeeded("show", file).output
    assert "gguf" in lines
    assert "2 at each of 1 targets" in lines
    told = json.loads(succeeded("show", file, "--json").output)
    assert (told["format"], told["method"], told["ranks"]) == ("gguf", "lora", {"blk.0.ffn_up": 2})
    assert told["size"] == file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    done = command("show", file)
    assert done.exit_code == 2
    assert "ends after the file's" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("values", "tensors", "said"),
    [
        ({"adapter.type": "dora"}, TENSORS, "adapter.type is 'dora'"),
        ({"adapter.lora.alpha": -1.0}, TENSORS, "adapter.lora.alpha is -1.0"),
        ({}, {}, "no tensors"),
        ({}, {f"{NAME}.lora_a": A}, f"lacks {NAME}.lora_b"),
        ({}, {f"{NAME}.lora_a": A[:1], f"{NAME}.lora_b": B}, r"lora_a \(1, 32\) and lora_b \(40, 2\)"),
    ],
    ids=["method", "alpha", "empty", "half", "shapes"],
)
def test_a_wrong_file_is_refused(
    values: Mapping[str, object], tensors: Mapping[str, Any], said: str, tmp_path: Path
) -> None:
    """As by reading."""
    with pytest.raises(tunerkit.errors.FileError, match=rf"(?s)a\.gguf.*{said}"):
        describe(file_of(tmp_path / "a.gguf", {**VALUES, **values}, tensors))


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    """Within its tensors too, although none is read."""
    whole, cut = file_of(tmp_path / "whole.gguf").read_bytes(), tmp_path / "cut.gguf"
    for length in (*range(0, len(whole), 17), len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(tunerkit.errors.FileError, match=r"cut\.gguf"):
            describe(cut)
