"""Whole trainings of a language model beside TRL and PEFT: ``python -m benchmarks.whole FOLDER [--model MODEL]``.

Each contender trains the same rows in a process of its own: CPU seconds less those of the imports, peak memory in MiB,
and the loss on the same held-out rows, by one function that is not counted. ``trl`` has its defaults, and ``tuned`` its
checkpointing off and batches grouped by length. ``but NAME`` is the command without one saving. Without a model, one
with the shapes of SmolLM2-135M and random weights is made, and the rows are random words.
"""

import json
import math
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

RANK, BATCH, SEED, HELD_OUT = 8, 8, 0, 48
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TRAINING = {"learning_rate": 2e-4, "per_device_train_batch_size": BATCH, "num_train_epochs": 1, "seed": SEED}
OURS: dict[str, dict[str, Any]] = {
    **{"tunerkit": {}, "in 2 GiB": {"memory": 2.0}},
    "but checkpointing": {"training": {"gradient_checkpointing": True}},
    "but grouping": {"training": {"train_sampling_strategy": "random"}},
    "but loss": {"loss": "trl"},
}
CONTENDERS = (*OURS, "trl", "tuned")


def make_model(folder: Path) -> None:
    """Save a model with SmolLM2-135M's shapes, whose tokens are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    words = ["<pad>", "</s>", *(f"w{number}" for number in range(49150))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    kept = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<pad>")
    kept.save_pretrained(folder)
    set_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def make_rows(data: str, count: int) -> list[dict[str, str]]:
    """Rows of few frequent words: sentences of about 20; or answers of one word in seven, after prompts."""
    draw = random.Random(SEED)

    def text(mean: float) -> str:
        length = min(120, max(3, round(draw.lognormvariate(math.log(mean), 0.5))))
        return " ".join(f"w{min(4000, int(draw.paretovariate(0.7)))}" for _ in range(length)) + " "

    means = {"text": 20.0} if data == "sentences" else {"prompt": 36.0, "completion": 6.0}
    return [{name: text(mean) for name, mean in means.items()} for _ in range(count)]


def train_ours(name: str, model: Path, folder: Path) -> Any:
    """Train by the command's own function, then load what it wrote."""
    from rich.console import Console

    import tunerkit
    from tunerkit_cli.recipes.recipe import Recipe
    from tunerkit_cli.running.run import run

    more = {**OURS[name], "training": {**TRAINING, **OURS[name].get("training", {})}}
    paths = {"model": model, "data": folder / "train.jsonl", "eval_data": folder / "eval.jsonl", "out": folder / name}
    more |= {"config": {"rank": RANK, "alpha": 2 * RANK, "targets": TARGETS}} | {k: str(v) for k, v in paths.items()}
    run(Recipe(task="causal-lm", method="lora", **more), Console(), overwrite=True)
    yield
    yield tunerkit.from_folder(folder / name)[0]


def train_trl(name: str, model: Path, folder: Path) -> Any:
    """Train as TRL's and PEFT's own pages do."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    own: dict[str, Any] = {**TRAINING, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    if name == "tuned":
        own |= {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}
    files = {part: str(folder / f"{part}.jsonl") for part in ("train", "eval")}
    rows = load_dataset("json", data_files=files, cache_dir=str(folder / "cache"))
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        SFTConfig(str(folder / name), **own),
        **{f"{part}_dataset": rows[part] for part in files},
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    yield
    yield trainer.model


def one(name: str, model: Path, folder: Path) -> dict[str, float]:
    """Train one contender in this process."""
    import datasets  # noqa: F401  # what both need, before the clock starts
    import peft  # noqa: F401
    import torch
    import trl.trainer.sft_trainer  # noqa: F401
    from transformers import AutoTokenizer

    import tunerkit_cli.running.run  # noqa: F401

    began = time.process_time()
    training = (train_ours if name in OURS else train_trl)(name, model, folder)
    next(training)
    seconds, peak = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    trained, tokenizer, found = next(training).eval(), AutoTokenizer.from_pretrained(model), []
    for row in map(json.loads, (folder / "eval.jsonl").read_text().splitlines()):
        ids = torch.tensor([tokenizer("".join(row.values()) + tokenizer.eos_token)["input_ids"]])
        with torch.no_grad():
            logits = trained(input_ids=ids).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        found.append(each[max(0, len(tokenizer(row.get("prompt", ""))["input_ids"]) - 1) :])
    return {"seconds": round(seconds, 1), "peak": round(peak), "loss": round(float(torch.cat(found).mean()), 4)}


def main(
    folder: Annotated[Path, typer.Argument(help="Where models and runs are written.")],
    model: Annotated[Path | None, typer.Option(help="A language model.")] = None,
    data: Annotated[str, typer.Option(help="sentences or answers.")] = "sentences",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 24,
    contender: Annotated[str, typer.Option(help="Which, between commas.")] = ",".join(CONTENDERS),
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print a line for each contender."""
    base = model or folder / "model"
    if only is not None:
        return print("RESULT", json.dumps(one(only, base, folder / data)))
    (folder / data).mkdir(parents=True, exist_ok=True)
    if not base.exists():
        make_model(base)
    rows = make_rows(data, steps * BATCH + HELD_OUT)
    for part, chosen in (("train", rows[HELD_OUT:]), ("eval", rows[:HELD_OUT])):
        (folder / data / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    for name in contender.split(","):
        own = [sys.executable, "-m", "benchmarks.whole", str(folder), "--data", data, "--model", str(base)]
        done = subprocess.run([*own, "--only", name], capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        print(f"{name:18}", lines[-1][7:] if lines else done.stderr[-2000:], flush=True)


if __name__ == "__main__":
    typer.run(main)
