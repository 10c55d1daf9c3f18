"""Memory that is planned before a training, and its measured peak: ``python -m benchmarks.memory``.

Each shape is trained in a process of its own, by a Trainer for six steps in fp32 on a CPU with one thread. The planned
total (`tunerkit_transformers.plan`, on the trained model before its first step) stands beside the growth of the
process's peak since before the model was made: the libraries are loaded, and a tiny model has been trained. The two
numbers of the overhead were fitted on the first shapes of `shapes`; the others are those that it is tested on.
"""

import gc
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import attrs
import torch
import typer

STEPS = 6
TINY: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@attrs.frozen
class Shape:
    """A training: a model, a method, and the shape of its batches: tokens, or the width of square images."""

    make: Callable[[], Any]
    method: str
    rows: int
    size: int
    checkpointing: bool = False


def text(name: str, task: str, **sizes: Any) -> Callable[[], Any]:
    """A language model or a classifier of texts with random weights."""
    import transformers

    config = getattr(transformers, f"{name}Config")(pad_token_id=0, bos_token_id=1, eos_token_id=1, **sizes)
    return lambda: getattr(transformers, f"{name}{task}")(config)


def image(width: int, patch: int, hidden: int, layers: int) -> Callable[[], Any]:
    """A classifier of images."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    heads: dict[str, Any] = {
        "num_attention_heads": hidden // 64,
        "image_size": width,
        "patch_size": patch,
        "num_labels": 10,
    }
    return lambda: ViTForImageClassification(ViTConfig(**sizes, **heads))


def llama(hidden: int, layers: int, words: int, heads: int = 8) -> Callable[[], Any]:
    """A language model of Llama's kind."""
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": 8 * hidden // 3, "num_hidden_layers": layers}
    return text(
        "Llama", "ForCausalLM", num_attention_heads=heads, num_key_value_heads=heads // 2, vocab_size=words, **sizes
    )


def shapes() -> tuple[dict[str, Shape], dict[str, Shape]]:
    """The shapes on which the estimate was fitted, and those that it is tested on."""
    bert: dict[str, Any] = {"intermediate_size": 1536, "num_attention_heads": 12, "vocab_size": 30522}
    fitted = {
        "llama 384 x 6": Shape(llama(384, 6, 16384), "lora", 8, 64),
        "llama 384 x 6, checkpointing": Shape(llama(384, 6, 16384), "lora", 8, 64, True),
        "bert 384 x 4": Shape(
            text("Bert", "ForSequenceClassification", hidden_size=384, num_hidden_layers=4, **bert), "adalora", 16, 64
        ),
        "gpt2 384 x 4": Shape(
            text("GPT2", "LMHeadModel", n_embd=384, n_layer=4, n_head=6, vocab_size=16384), "lora", 4, 96
        ),
    }
    tested = {
        "llama 576 x 8": Shape(llama(576, 8, 32768), "lora", 8, 64),
        "llama 512 x 6, checkpointing": Shape(llama(512, 6, 8192), "adalora", 8, 128, True),
        "bert 384 x 6": Shape(
            text("Bert", "ForSequenceClassification", hidden_size=384, num_hidden_layers=6, **bert), "lora", 16, 128
        ),
        "gpt2 512 x 6": Shape(
            text("GPT2", "LMHeadModel", n_embd=512, n_layer=6, n_head=8, vocab_size=8192), "adalora", 4, 256
        ),
        "vit 384 x 6": Shape(image(128, 8, 384, 6), "lora", 8, 128),
        "llama 576 x 30, as SmolLM2-135M": Shape(llama(576, 30, 49152), "lora", 8, 32),
    }
    return fitted, tested


def rows_of(shape: Shape, model: Any, count: int) -> list[dict[str, Any]]:
    """Rows of random numbers. Of each batch of texts, the first is the longest, and the last has padding."""
    draw = torch.Generator().manual_seed(0)
    if getattr(model.config, "image_size", None):
        size = (count, 3, shape.size, shape.size)
        return [{"pixel_values": each, "labels": 0} for each in torch.rand(size, generator=draw)]
    ids = torch.randint(2, model.config.vocab_size, (count, shape.size), generator=draw)
    lengths = [shape.size - number % shape.rows % 4 for number in range(count)]
    found = [{"input_ids": row[:length].tolist()} for row, length in zip(ids, lengths, strict=True)]
    is_writer = hasattr(model, "lm_head")
    return [{**row, "labels": row["input_ids"] if is_writer else 0} for row in found]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch, padded with 0."""
    if "pixel_values" in rows[0]:
        return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[list[int]], by: int) -> torch.Tensor:
        return torch.tensor([each + [by] * (longest - len(each)) for each in values])

    ids = padded([row["input_ids"] for row in rows], 0)
    labels = [row["labels"] for row in rows]
    return {
        "input_ids": ids,
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": padded(labels, -100) if isinstance(labels[0], list) else torch.tensor(labels),
    }


def train(shape: Shape, folder: Path) -> Any:
    """Make the model and the trainer, plan, and train."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    import tunerkit
    from tunerkit_transformers.memory_plan import plan_of

    model = tunerkit.wrap(shape.make(), shape.method, seed=0)
    own: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "seed": 0}
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=shape.rows,
        max_steps=STEPS,
        gradient_checkpointing=shape.checkpointing,
        **own,
    )
    trainer = Trainer(model, arguments, train_dataset=rows_of(shape, model, STEPS * shape.rows), data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    planned = plan_of(trainer)
    tunerkit.attach(model, trainer)
    trainer.train()
    return planned


def in_kib(name: str) -> int:
    """A number from this process's status: ``VmRSS``, its memory, or ``VmHWM``, the peak of it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measured(shape: Shape) -> tuple[Any, int]:
    """The plan of a training and the growth of the process in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = in_kib("VmRSS")
        planned = train(shape, Path(folder))
        return planned, 1024 * (in_kib("VmHWM") - before)


def main(part: Annotated[str, typer.Option(help="fitted, tested or all.")] = "all") -> None:
    """Print a row for each shape, in MiB."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    fitted, tested = shapes()
    warm = text("Llama", "ForCausalLM", vocab_size=64, **TINY)
    with tempfile.TemporaryDirectory() as folder:
        for method in ("lora", "adalora"):
            train(Shape(warm, method, 4, 32, True), Path(folder))
    heads = ["shape", "method", "batch", "base", "trained", "activations", "overhead", "planned", "measured", "ratio"]
    print("|", " | ".join(heads), "|\n|" + "---|" * len(heads))
    for name, shape in {**({} if part == "tested" else fitted), **({} if part == "fitted" else tested)}.items():
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            planned, grown = measured(shape)
            other = planned.total - planned.base - planned.activations - planned.overhead
            numbers = [planned.base, other, planned.activations, planned.overhead, planned.total, grown]
            cells = [f"{each / 2**20:.0f}" for each in numbers]
            batch = f"{shape.rows} x {shape.size}"
            print(
                "|",
                " | ".join([name, shape.method, batch, *cells, f"{planned.total / grown:.2f}"]),
                "|",
                flush=True,
            )
        finally:
            os._exit(0)


if __name__ == "__main__":
    typer.run(main)
