"""Records of runs, as `tunerkit train` writes them, made up for tests."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

MATRICES = (
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
)
WIDTHS = {"intermediate.dense": 384 + 1536, "output.dense": 1536 + 384}
Record = dict[str, Any]


def minimal(task: str = "text-classification", method: str = "adalora", **more: Any) -> Record:
    """A record with nothing but the required keys."""
    return {"version": 1, "task": task, "method": method, **more}


def classifier(layers: int = 6, steps: int = 375, seed: int = 0) -> Record:
    """AdaLoRA on MiniLM: a head-alone baseline, and ranks that shrink from 12 to 8 on average."""
    chance = random.Random(seed)
    paths = [f"bert.encoder.layer.{layer}.{matrix}" for layer in range(layers) for matrix in MATRICES]
    history = shrinking(paths, steps, chance)
    ranks = dict(zip(paths, history[-1]["ranks"], strict=True))
    sizes = {path: rank * (WIDTHS.get(path.split(".", 4)[4], 768) + 1) for path, rank in ranks.items()}
    adapters = sum(sizes.values())
    start, end = 12 * len(paths), sum(ranks.values())
    evaluations = [(1, 0.437, 0.801), (2, 0.381, 0.843), (3, 0.393, 0.8517)]
    logs = [
        {
            "step": step,
            "epoch": round(3 * step / steps, 3),
            "loss": 0.31 + 0.39 * math.exp(-step / 90) + chance.gauss(0, 0.035),
            "learning_rate": 1e-3 * min(step / 22, (steps - step) / (steps - 22)),
            "grad_norm": 1.1 + 0.6 * chance.random() + 0.8 * math.exp(-step / 60),
        }
        for step in range(5, steps + 1, 5)
    ]
    logs += [
        {
            "step": epoch * steps // 3,
            "epoch": float(epoch),
            "eval_loss": loss,
            "eval_accuracy": accuracy,
            "eval_f1": accuracy - 0.002,
            "eval_runtime": 6.1,
            "eval_samples_per_second": 491.8,
        }
        for epoch, loss, accuracy in evaluations
    ]
    logs.append({"step": steps, "epoch": 3.0, "train_loss": 0.41, "train_runtime": 61.2, "total_flos": 1.2e13})
    config: Record = {"targets": None, "target_rank": 8, "init_rank": 12, "alpha": None, "dropout": 0.0, "t_init": 0.1}
    config |= {"t_final": 0.3, "delta_t": 10, "beta1": 0.85, "train_modules": ["classifier"], "min_rank": 0}
    return minimal(
        model={"name": "all-MiniLM-L6-v2", "path": "models/minilm", "class": "BertForSequenceClassification"},
        data={"train": "reviews.csv", "eval": "reviews.csv (a fifth held out)"},
        rows={"train": 4000, "eval": 3000},
        labels=["negative", "positive"],
        metrics={"accuracy": 0.8517, "f1": 0.8512, "loss": 0.3933},
        main_metric="accuracy",
        greater_is_better=True,
        logs=sorted(logs, key=lambda row: float(str(row["step"]))),
        seconds={"train": 251.6, "evaluate": 28.5},
        device="cpu",
        steps=steps,
        parameters={
            "trained": adapters + 770,
            "all": 22_713_986 + adapters,
            "adapters": adapters,
            "copies": 770,
            "biases": 0,
        },
        budget={"start": start, "end": end, "live": end, "unit": "rank"},
        ranks=ranks,
        caps=dict.fromkeys(paths, 12),
        history=history,
        spectrum={path: spectrum(rank, chance) for path, rank in ranks.items() if rank},
        sizes=sizes,
        confusion=[[1268, 227], [218, 1287]],
        baseline={
            "what": "head alone, base frozen",
            "metrics": {"accuracy": 0.699, "f1": 0.6969, "loss": 0.5794},
            "parameters": 770,
            "seconds": 9.1,
        },
        config=config,
        recipe={
            "version": 1,
            "task": "text-classification",
            "data": "reviews.csv",
            "method": "adalora",
            "training": {"num_train_epochs": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 32, "seed": seed},
            "out": "out/demo",
        },
        environment={"python": "3.11.7", "torch": "2.13.0", "transformers": "5.24.0", "tunerkit": "0.1.0"},
    )


def shrinking(paths: Sequence[str], steps: int, chance: random.Random) -> list[Record]:
    """A history of global allocations, from rank 12 everywhere to 8 on average: lower layers and queries lose most."""
    scores = {
        (number, rank): math.exp(0.25 * int(path.split(".")[3]) + 1.1 * chance.random() - 0.9 * ("query" in path))
        * (0.8 + 0.05 * chance.random()) ** rank
        for number, path in enumerate(paths)
        for rank in range(12)
    }
    order = sorted(scores, key=lambda triplet: -scores[triplet])
    changes = []
    for step in (0, *range(steps // 10, steps * 7 // 10, 10), steps):
        progress = min(max((step / steps - 0.1) / 0.6, 0.0), 1.0)
        budget = round((8 + 4 * (1 - progress) ** 3) * len(paths))
        live = [number for number, _ in order[:budget]]
        changes.append({"step": step, "budget": budget, "ranks": [live.count(number) for number in range(len(paths))]})
    return changes


def spectrum(rank: int, chance: random.Random) -> list[float]:
    """Singular values that fall by a factor of up to two each."""
    greatest, fall = 0.2 + chance.random(), 0.55 + 0.35 * chance.random()
    return [greatest * fall**number for number in range(rank)]


def language_model(method: str = "lora") -> Record:
    """LoRA on a causal language model: the ranks are constant, and there are samples."""
    chance = random.Random(1)
    paths = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(30) for name in "qkvo"]
    logs: list[Record] = [
        {
            "step": step,
            "loss": 1.35 + 1.2 * math.exp(-step / 25) + chance.gauss(0, 0.06),
            "learning_rate": 2e-4,
            "mean_token_accuracy": 0.62 - 0.2 * math.exp(-step / 25),
        }
        for step in range(1, 81)
    ]
    logs += [{"step": step, "eval_loss": 1.4 + 0.5 * math.exp(-step / 25)} for step in (20, 40, 60, 80)]
    return minimal(
        "causal-lm",
        method,
        model={"name": "HuggingFaceTB/SmolLM2-135M-Instruct"},
        data={"train": "chats.jsonl"},
        rows={"train": 400, "eval": 50},
        metrics={"loss": 1.42, "perplexity": 4.137},
        main_metric="perplexity",
        greater_is_better=False,
        logs=logs,
        seconds={"train": 212.0},
        steps=80,
        device="cpu",
        parameters={"trained": 460_800, "all": 134_976_000},
        ranks=dict.fromkeys(paths, 4),
        spectrum={path: spectrum(4, chance) for path in paths},
        sizes={path: 4 * (576 + (576 if path[-6] in "qo" else 192)) for path in paths},
        baseline={"what": "base model, untrained", "metrics": {"loss": 1.91, "perplexity": 6.753}},
        samples=[
            {
                "prompt": "What does a lighthouse do?",
                "before": "A lighthouse is a lighthouse is a lighthouse that is a lighthouse.",
                "after": "A lighthouse warns ships of rocks and shows them the way into a harbour.\n\nIts light can be "
                "seen from far away, and its rhythm says which lighthouse it is.",
            },
            {
                "prompt": "Write a function that adds two numbers.",
                "before": "I'm sorry, I can't do that.",
                "after": "def add(a, b):\n    return a + b",
            },
        ],
        recipe={"task": "causal-lm", "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "out": "out/chat"},
    )


def regression() -> Record:
    """A regression with few keys: no baseline, no logs but the evaluations."""
    return minimal(
        "regression",
        "lora",
        model={"path": "models/deberta-small"},
        rows={"train": 800, "eval": 200},
        metrics={"mse": 0.213, "pearson": 0.874},
        main_metric="mse",
        greater_is_better=False,
        steps=75,
    )


def large(entries: int = 10_000) -> Record:
    """224 targets of rank up to 64, and many rows of logs: what the size of a page is tested with."""
    chance = random.Random(2)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    paths = [f"model.layers.{layer}.{name}" for layer in range(32) for name in names]
    ranks = {path: chance.randrange(65) for path in paths}
    logs = [
        {
            "step": step,
            "loss": 1 + 4 * math.exp(-step / 900) + chance.gauss(0, 0.2),
            "learning_rate": 1e-4 * (1 - step / entries),
        }
        for step in range(1, entries + 1)
    ]
    history = [
        {"step": step, "budget": sum(ranks.values()), "ranks": [min(64, rank + 200 - step) for rank in ranks.values()]}
        for step in range(200)
    ]
    return minimal(
        "causal-lm",
        logs=logs,
        ranks=ranks,
        caps=dict.fromkeys(paths, 64),
        history=history,
        spectrum={path: sorted((chance.random() for _ in range(64)), reverse=True) for path in paths},
        sizes={path: rank * 8192 for path, rank in ranks.items()},
        parameters={"trained": 10**8, "all": 8 * 10**9},
        steps=entries,
    )


def without(record: Mapping[str, Any], *keys: str) -> Record:
    """The record without some keys."""
    return {key: value for key, value in record.items() if key not in keys}
