"""What converting an adapter of a large Llama costs: ``python -m benchmarks.convert``. No weights of a base exist.

Each conversion runs in a process of its own, which first converts a small adapter: that imports everything. Then its
memory and its CPU seconds are counted.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import attrs
import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

import tunerkit
from tunerkit import serialization

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@attrs.frozen
class Size:
    """The shapes of a Llama, by default those of 8 billion parameters, and the rank of its adapter."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    key_heads: int = 8
    inner: int = 14336
    vocabulary: int = 128256
    rank: int = 8


SMALL = Size(layers=1, hidden=16, heads=2, key_heads=2, inner=32, vocabulary=32, rank=2)


@attrs.frozen
class Cost:
    """What one conversion cost.

    Attributes:
        name: The formats.
        seconds: CPU seconds of the conversion, after all imports.
        whole: CPU seconds of the process up to its end, imports and the small conversion included.
        memory: The greatest memory above that after the imports, in bytes.
        adapter: The bytes of the adapter that was read.
    """

    name: str
    seconds: float
    whole: float
    memory: int
    adapter: int


def write_base(folder: Path, size: Size) -> Path:
    """Write the config of a Llama; there are no weights."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        intermediate_size=size.inner,
        vocab_size=size.vocabulary,
    ).save_pretrained(folder)
    return folder


def write_adapter(folder: Path, size: Size, base: Path) -> Path:
    """Write a random LoRA of the queries and the values of each layer, as PEFT writes it."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    outs = {"q_proj": size.hidden, "v_proj": size.hidden * size.key_heads // size.heads}
    tensors = {}
    for layer in range(size.layers):
        for name, out in outs.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(size.rank, size.hidden, generator=generator)
            tensors[f"{place}.lora_B.weight"] = torch.randn(out, size.rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": size.rank,
        "lora_alpha": size.rank,
        "target_modules": [*outs],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def convert(source: Path, to: str, out: Path, base: Path) -> None:
    """Convert as ``tunerkit convert`` does."""
    from tunerkit_transformers.base_choice import choose_base
    from tunerkit_transformers.bases import skeleton

    model = skeleton(choose_base(str(source), base=str(base), task=None))
    serialization.open_unloaded(model, source)
    if to == "tunerkit":
        tunerkit.save(model, out)
    else:
        tunerkit.export(model, out, to)


def measured(source: Path, to: str, out: Path, base: Path) -> dict[str, Any]:
    """Convert a small adapter, then this one, and return the seconds and bytes of the second conversion."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        small = write_base(folder / "base", SMALL)
        adapter = write_adapter(folder / "peft", SMALL, small)
        convert(adapter, "tunerkit", folder / "own", small)
        convert(folder / "own", "peft", folder / "again", small)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = time.process_time()
    convert(source, to, out, base)
    return {"seconds": time.process_time() - start, "memory": _memory("VmHWM") - before, "whole": time.process_time()}


def _memory(field: str) -> int:
    """A value of the process in bytes: ``VmRSS``, what it holds, or ``VmHWM``, the most that it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def costs(size: Size, folder: Path) -> list[Cost]:
    """Measure three conversions: PEFT to PEFT, PEFT to tunerkit, tunerkit to PEFT."""
    base = write_base(folder / "base", size)
    adapter = write_adapter(folder / "peft", size, base)
    own = folder / "own"
    return [
        measure("PEFT to PEFT, uniform", [adapter, "peft", folder / "uniform", base]),
        measure("PEFT to tunerkit", [adapter, "tunerkit", own, base]),
        measure("tunerkit to PEFT, uniform", [own, "peft", folder / "back", base]),
    ]


def measure(name: str, arguments: Sequence[object]) -> Cost:
    """Measure one conversion in a new process; ``arguments`` are the adapter, the format, the new folder, the base."""
    command = [sys.executable, "-m", "benchmarks.convert", "--child", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    source = Path(str(arguments[0]))
    return Cost(name=name, adapter=sum(file.stat().st_size for file in source.glob("*.safetensors")), **found)


def table(found: Sequence[Cost]) -> Table:
    """The costs as a table."""
    drawn = Table("conversion", "CPU s", "CPU s with imports", "adapter, MB", "memory, MB", "memory / adapter")
    for each in found:
        drawn.add_row(
            each.name,
            f"{each.seconds:.2f}",
            f"{each.whole:.2f}",
            f"{each.adapter / 1e6:.1f}",
            f"{each.memory / 1e6:.1f}",
            f"{each.memory / each.adapter:.2f}",
        )
    return drawn


@app.command()
def run(
    child: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    is_child: Annotated[bool, typer.Option("--child", hidden=True)] = False,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the Llama.")] = Size().layers,
    rank: Annotated[int, typer.Option(min=1, help="The adapter's rank.")] = Size().rank,
) -> None:
    """Measure the CPU seconds and the memory of three conversions."""
    if is_child and child:
        source, to, out, base = child
        print(json.dumps(measured(Path(source), to, Path(out), Path(base))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        Console().print(table(costs(attrs.evolve(Size(), layers=layers, rank=rank), Path(scratch))))


if __name__ == "__main__":
    app()
