"""What is no adapter, or a damaged one: one error that names file and key."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tunerkit
import tunerkit_serving as serving
from plugins.serving.tests.serving_folders import paths, random_folder, write
from tunerkit_serving import ENGINES, Severity, check, read, read_folder, read_gguf

gguf = pytest.importorskip("gguf", reason="it writes the files")
Q = "blk.0.attn_q.weight"
PAIR = {f"{Q}.lora_a": (4, 16), f"{Q}.lora_b": (16, 4)}


def changed(**settings: Any) -> Callable[[Path], object]:
    return lambda path: random_folder(path, **settings)


def text(content: str) -> Callable[[Path], object]:
    def made(path: Path) -> None:
        random_folder(path)
        (path / "adapter_config.json").write_text(content)

    return made


def without(name: str) -> Callable[[Path], object]:
    def made(path: Path) -> None:
        random_folder(path)
        (path / name).unlink()

    return made


def damaged(path: Path) -> None:
    random_folder(path)
    (path / "adapter_model.safetensors").write_bytes(b"{}")


def pickled(path: Path) -> None:
    random_folder(path)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")


def half(path: Path) -> None:
    random_folder(path)
    save_file({f"base_model.model.{paths()[0]}.lora_A.weight": torch.zeros(8, 16)}, path / "adapter_model.safetensors")


def skewed(path: Path) -> None:
    write(path, {paths()[0]: (torch.zeros(8, 16), torch.zeros(16, 4))}, {}, r=8, lora_alpha=8)


def empty(path: Path) -> None:
    write(path, {}, {"norm.weight": torch.zeros(2)}, r=8, lora_alpha=8)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda path: None, "no such folder or file"),
        (lambda path: path.mkdir(), "expected a PEFT folder with adapter_config.json, or a GGUF file"),
        (text("{"), "adapter_config.json: it cannot be read as JSON"),
        (text("[" * 100_000), "adapter_config.json: it cannot be read as JSON"),
        (text("[1]"), "expected a mapping of settings, got [1]"),
        (changed(r="8"), "adapter_config.json: r: expected a number above 0, got '8'"),
        (changed(r=True), "r: expected a number above 0, got True"),
        (changed(r=8.0), "r: expected a number above 0, got 8.0"),
        (changed(lora_alpha=0), "lora_alpha: expected a number above 0, got 0"),
        (changed(lora_alpha=float("nan")), "lora_alpha: expected a number above 0, got nan"),
        (changed(modules_to_save=5), "modules_to_save: expected a list of names or null, got 5"),
        (changed(modules_to_save="score"), "modules_to_save: expected a list of names or null, got 'score'"),
        (changed(use_rslora="yes"), "use_rslora: expected true or false, got 'yes'"),
        (changed(rank_pattern=[1]), "rank_pattern: expected a mapping of patterns to numbers, got [1]"),
        (changed(alpha_pattern={"q": "1"}), "alpha_pattern: 'q': expected a number above 0, got '1'"),
        (without("adapter_model.safetensors"), "adapter_model.safetensors: no such file"),
        (pickled, "adapter_model.bin is a pickle: save it with PEFT as safetensors"),
        (damaged, "it is not a file of safetensors"),
        (half, "model.layers.0.self_attn.q_proj has no lora_B; both halves are needed"),
        (skewed, "has A of shape (8, 16) and B of shape (16, 4); expected (r, in) and (out, r)"),
        (empty, "it has no tensor of LoRA"),
    ],
)
def test_bad_folders_are_named(made: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    """One `FileError` with the file, the key, what was got and what to do."""
    made(tmp_path / "adapter")
    with pytest.raises(tunerkit.errors.FileError) as refused:
        read(tmp_path / "adapter")
    assert words in str(refused.value)
    assert str(tmp_path / "adapter") in str(refused.value)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("q_proj[", "is not a regular expression"),
        ("(?R)", "is not a regular expression"),
        ("q(?=_(?<!x)p)_proj", "is not supported in files"),
        ("a" * 2000 + "+", "the limit is 1000"),
    ],
)
def test_bad_patterns_are_named(pattern: str, words: str, tmp_path: Path) -> None:
    """Malformed, unsupported and endless patterns are a `FileError` too, and the pattern is named."""
    names = [f"model.{number}.{'a' * 60}" for number in range(4)]
    folder = read_folder(random_folder(tmp_path, names=names, rank_pattern={pattern: 2}))
    with pytest.raises(tunerkit.errors.FileError, match="rank_pattern") as refused:
        check(folder, [ENGINES["sglang"]])
    assert words in str(refused.value)


def test_tunerkits_own_file_is_to_be_exported(tmp_path: Path) -> None:
    """The message has the command."""
    (tmp_path / "adapter.safetensors").write_bytes(b"")
    for path in (tmp_path, tmp_path / "adapter.safetensors"):
        with pytest.raises(
            tunerkit.errors.FileError, match=r"export it first: tunerkit convert .* --to peft --out .*-peft"
        ):
            read(path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("vlm", "--for: no engine 'vlm'; known: vllm, sglang, llama.cpp, ollama, mlx, tgi; did you mean 'vllm'?"),
        (" , ", "--for: no engine named; known: vllm"),
    ],
)
def test_unknown_engines_are_named(names: str, words: str) -> None:
    """With the closest names."""
    with pytest.raises(tunerkit.errors.ConfigError) as refused:
        serving.chosen(names)
    assert words in str(refused.value)


def test_engines_have_other_names_and_are_asked_once() -> None:
    """LoRAX has TGI's rules."""
    assert [engine.name for engine in serving.chosen("lorax, llamacpp,TGI")] == ["tgi", "llama.cpp"]


def gguf_file(path: Path, shapes: Mapping[str, tuple[int, ...]], **metadata: Any) -> Path:
    """Write a GGUF adapter with tensors of zeros."""
    settings = {"type": "adapter", "kind": "lora", "alpha": 8.0} | metadata
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(settings["type"])
    writer.add_string("adapter.type", settings["kind"])
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("some.numbers", [1, 2, 3])
    if settings["alpha"] is not None:
        writer.add_float32("adapter.lora.alpha", settings["alpha"])
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_header_of_gguf_is_read(tmp_path: Path) -> None:
    """Metadata, and shapes in GGUF's own order; arrays are skipped."""
    adapter = read_gguf(gguf_file(tmp_path / "a.gguf", PAIR))
    assert (adapter.architecture, adapter.alpha, dict(adapter.ranks)) == ("llama", 8.0, {Q: 4})
    assert adapter.tensors[f"{Q}.lora_a"] == ((16, 4), "F32")
    assert adapter.metadata["tokenizer.ggml.tokens"] == 2


@pytest.mark.parametrize("engine", ["llama.cpp", "ollama"])
@pytest.mark.parametrize(
    ("shapes", "metadata", "severity", "words"),
    [
        (PAIR, {}, "fine", "GGUF adapter for llama, 1 tensors, rank 4, alpha 8"),
        (PAIR, {"type": "model"}, "refused", "general.type='model'"),
        (PAIR, {"kind": "ia3"}, "refused", "adapter.type='ia3'"),
        (PAIR | {"blk.0.attn_v.weight": (4, 4)}, {}, "refused", "blk.0.attn_v.weight"),
        ({f"{Q}.lora_a": (4, 16)}, {}, "refused", f"{Q} (half a pair)"),
        ({f"{Q}.lora_a": (16, 4), f"{Q}.lora_b": (16, 4)}, {}, "refused", f"{Q} (lora_a (4, 16), lora_b (4, 16))"),
        ({"token_embd.weight.lora_a": (32, 4), "token_embd.weight.lora_b": (16, 4)}, {}, "fine", "1 tensors, rank 4"),
        (PAIR | {"output_norm.weight": (4,)}, {}, "fine", "1 tensors, rank 4"),
        (PAIR, {"alpha": 0.0}, "ignored", "adapter.lora.alpha=0.0"),
        (PAIR, {"alpha": None}, "ignored", "adapter.lora.alpha=None"),
        (PAIR | {"v.weight.lora_a": (2, 8), "v.weight.lora_b": (8, 2)}, {}, "fine", "ranks 2 to 4"),
    ],
)
def test_the_rules_for_gguf(engine: str, shapes: Any, metadata: Any, severity: str, words: str, tmp_path: Path) -> None:
    """llama.cpp and Ollama, which runs llama.cpp, refuse and scale the same files."""
    findings = check(read(gguf_file(tmp_path / "a.gguf", shapes, **metadata)), [ENGINES[engine]])
    assert [finding.severity.value for finding in findings if words in finding.key][:1] == [severity]
    assert (findings[0].severity is Severity.REFUSED) == (severity == "refused")


def test_other_engines_read_no_gguf(tmp_path: Path) -> None:
    """They say so, with the command that writes a folder."""
    adapter = read(gguf_file(tmp_path / "a.gguf", PAIR))
    findings = check(adapter, serving.chosen("vllm,sglang,mlx,tgi"))
    assert [finding.severity for finding in findings] == [Severity.REFUSED] * 4
    assert all("--to peft" in str(finding.mend) for finding in findings)


@pytest.mark.parametrize(
    "content",
    [
        b"GGUF",
        b"GGUF" + struct.pack("<I", 1),
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 40),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 5) + b"ab",
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 99),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"\xff" + struct.pack("<I", 0),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 9, 1),
        b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"a" + struct.pack("<I", 99),
    ],
)
def test_damaged_gguf_files_are_named(content: bytes, tmp_path: Path) -> None:
    """Cut off, too large or meaningless: one `FileError`."""
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(tunerkit.errors.FileError, match="its GGUF header cannot be read"):
        read(tmp_path / "a.gguf")


def test_every_cut_of_a_gguf_header_is_named(tmp_path: Path) -> None:
    """Whatever is missing at its end, there is no other exception."""
    whole = gguf_file(tmp_path / "whole.gguf", PAIR).read_bytes()
    end = whole.index(b"lora_b") + len(b"lora_b") + 24
    cut = tmp_path / "cut.gguf"
    for length in range(4, end, 3):
        cut.write_bytes(whole[:length])
        with pytest.raises(tunerkit.errors.FileError):
            read(cut)


def test_settings_of_peft_that_are_null_are_defaults(tmp_path: Path) -> None:
    """Older versions of peft write null for patterns."""
    folder = random_folder(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"rank_pattern": None, "alpha_pattern": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert check(read_folder(folder), [ENGINES["sglang"]])[0].severity is Severity.FINE
