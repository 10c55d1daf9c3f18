"""Whole trainings beside transformers, TRL and PEFT: ``python -m benchmarks.whole FOLDER --data sentences``.

SmolLM2-135M learns ``sentences``, or answers in ``chats``; all-MiniLM-L6-v2 learns ``classes``.
Models and movie sentences come from packages of PyPI. Each contender trains the same rows, in as many steps of the same
batch, rate and schedule, in a process of its own: CPU seconds less those of the imports, peak memory in MiB, tokens a
second (padding not counted), and the loss on the same held-out rows, by one function that is not timed. ``theirs`` is
`SFTTrainer` or `Trainer` at its defaults, ``tuned`` the same without checkpointing and with batches grouped by length.
``but NAME`` is the command without one saving.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

RANK, BATCH, HELD_OUT = 8, 8, 64
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "value"],
}
RATES = {"llama": 2e-4, "bert": 1e-3}
TRAINING = {"per_device_train_batch_size": BATCH, "num_train_epochs": 1, "warmup_steps": 0.06}
OURS: dict[str, dict[str, Any]] = {
    **{"tunerkit": {}, "in 2 GiB": {"memory": 2.0}},
    "but checkpointing": {"training": {"gradient_checkpointing": True}},
    "but grouping": {"training": {"train_sampling_strategy": "random"}},
    "but loss": {"loss": "trl"},
    "but checkpoints": {"training": {"save_steps": 0.1}},
}
LABELS = ("negative", "positive")


def make_rows(data: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Movie sentences; the shorter of three as an answer to the others; or sentences with their classes."""
    import random

    from tunerkit_cli.assets import cache_folder, demo_sentences

    read = demo_sentences(cache_folder()).rows
    chosen = random.Random(seed).sample(read, 3 * count if data == "chats" else count)
    if data == "classes":
        return [dict(row) for row in chosen]
    texts = [str(row["text"]) for row in chosen]
    if data == "sentences":
        return [{"text": text} for text in texts]
    groups = [sorted(texts[n : n + 3], key=len) for n in range(0, len(texts), 3)]
    asked = "Write a shorter sentence about films in the manner of these:\n"
    said = [({"role": "user", "content": asked + "\n".join(longer)}, shortest) for shortest, *longer in groups]
    return [{"messages": [one, {"role": "assistant", "content": text}]} for one, text in said]


def train_ours(name: str, model: Path, folder: Path, seed: int) -> Iterator[Any]:
    """Train by the command's own function, then load what it wrote."""
    from rich.console import Console

    import tunerkit
    from tunerkit_cli.recipes.recipe import Recipe
    from tunerkit_cli.running.run import run

    task, kind = ("text-classification", "bert") if folder.name == "classes" else ("causal-lm", "llama")
    more = {**OURS[name], "training": {**TRAINING, "seed": seed, **OURS[name].get("training", {})}}
    paths = {"model": model, "data": folder / "train.jsonl", "eval_data": folder / "eval.jsonl", "out": folder / name}
    more |= {"config": {"rank": RANK, "alpha": 2 * RANK, "targets": TARGETS[kind]}} | {
        k: str(v) for k, v in paths.items()
    }
    run(Recipe(task=task, method="lora", **more), Console(), overwrite=True)
    yield
    yield tunerkit.from_folder(folder / name)[0]


def train_theirs(name: str, model: Path, folder: Path, seed: int) -> Iterator[Any]:
    """Train as the pages of transformers, TRL and PEFT do."""
    import transformers
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    is_classes, kind = folder.name == "classes", "bert" if folder.name == "classes" else "llama"
    own: dict[str, Any] = {
        **TRAINING,
        "learning_rate": RATES[kind],
        "seed": seed,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if name == "tuned":
        own |= {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}
    files = {part: str(folder / f"{part}.jsonl") for part in ("train", "eval")}
    rows = load_dataset("json", data_files=files, cache_dir=str(folder / "cache"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS[kind])
    lora.task_type = "SEQ_CLS" if is_classes else "CAUSAL_LM"
    if is_classes:
        rows = rows.map(
            lambda row: {**tokenizer(row["text"]), "labels": LABELS.index(row["label"])},
            remove_columns=["text", "label"],
        )
        transformers.set_seed(seed)
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
        wrapped = get_peft_model(plain, lora)
        trainer: Any = transformers.Trainer(
            wrapped, transformers.TrainingArguments(str(folder / name), **own), processing_class=tokenizer,
            **{f"{part}_dataset": rows[part] for part in files},
        )  # fmt: skip
    else:
        if folder.name == "chats":
            rows = rows.map(
                lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:]},
                remove_columns="messages",
            )
        trainer = SFTTrainer(
            transformers.AutoModelForCausalLM.from_pretrained(model), SFTConfig(str(folder / name), bf16=False, **own),
            **{f"{part}_dataset": rows[part] for part in files}, processing_class=tokenizer, peft_config=lora,
        )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    yield
    yield trainer.model


def loss_of(model: Any, tokenizer: Any, row: dict[str, Any]) -> Any:
    """The losses of a held-out row at what is learned of it."""
    import torch

    if "label" in row:
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits
        return torch.nn.functional.cross_entropy(logits, torch.tensor([LABELS.index(row["label"])]), reduction="none")
    start, text = 1, row.get("text", "") + tokenizer.eos_token
    if "messages" in row:
        asked = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        start = len(tokenizer(asked)["input_ids"])
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")[start - 1 :]


def one(name: str, model: Path, folder: Path, seed: int) -> dict[str, float]:
    """Train one contender in this process."""
    import datasets  # noqa: F401  # what both need, before the clock starts
    import peft  # noqa: F401
    import sklearn.metrics  # noqa: F401  # the command's scores of classifiers
    import torch
    import trl.trainer.sft_trainer  # noqa: F401
    from transformers import AutoTokenizer

    import tunerkit
    import tunerkit_cli.running.run  # noqa: F401

    tunerkit.methods()  # imports the plugins, as importing peft imports its methods

    began = time.process_time()
    training = (train_ours if name in OURS else train_theirs)(name, model, folder, seed)
    next(training)
    seconds, peak = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    trained, tokenizer = next(training).eval(), AutoTokenizer.from_pretrained(model)
    held, rows = (
        list(map(json.loads, (folder / f"{part}.jsonl").read_text().splitlines())) for part in ("eval", "train")
    )
    loss = float(torch.cat([loss_of(trained, tokenizer, row) for row in held]).mean())
    texts = [row.get("text") or tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    return {
        "seconds": round(seconds, 1),
        "peak": round(peak),
        "tokens/s": round(tokens / seconds),
        "loss": round(loss, 4),
    }


def main(
    folder: Annotated[Path, typer.Argument(help="Where rows and runs are written.")],
    data: Annotated[str, typer.Option(help="sentences, chats or classes.")] = "sentences",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 24,
    seeds: Annotated[int, typer.Option(help="How many; contenders of one seed run after each other.")] = 3,
    contender: Annotated[str, typer.Option(help="Which, between commas.")] = ",".join((*OURS, "theirs", "tuned")),
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
) -> None:
    """Print a line for each training, then each contender's medians as ratios to those of ``theirs``."""
    from tunerkit_cli.assets import cache_folder, demo_language_model, demo_model

    model = demo_model(cache_folder()) if data == "classes" else demo_language_model(cache_folder())
    if only is not None:
        return print("RESULT", json.dumps(one(only, model, folder / data, seed)))
    (folder / data).mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contender.split(",")}
    for each_seed in range(seed, seed + seeds):
        rows = make_rows(data, steps * BATCH + HELD_OUT, each_seed)
        for part, chosen in (("train", rows[HELD_OUT:]), ("eval", rows[:HELD_OUT])):
            (folder / data / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        for name, results in found.items():
            own = [sys.executable, "-m", "benchmarks.whole", str(folder), "--data", data, "--seed", str(each_seed)]
            done = subprocess.run([*own, "--only", name], capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
            if not lines:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            results.append(json.loads(lines[-1][7:]))
            print(f"{each_seed} {name:18}", lines[-1][7:], flush=True)
    for name, results in found.items() if "theirs" in found else ():
        pairs = [(each, other) for each, other in zip(results, found["theirs"], strict=True)]
        ratios = {
            key: statistics.median(each[key] / other[key] for each, other in pairs) for key in ("seconds", "peak")
        }
        gap = statistics.mean(each["loss"] - other["loss"] for each, other in pairs)
        print(f"{name:20} seconds {ratios['seconds']:.2f}, peak {ratios['peak']:.2f}, loss {gap:+.4f}")


if __name__ == "__main__":
    typer.run(main)
