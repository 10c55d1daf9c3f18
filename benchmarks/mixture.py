"""Quality of adapters on a small mixture of experts: ``python -m benchmarks.mixture FOLDER``.

A mixture of 1.7 million parameters (three blocks, width 128, eight experts of which two are active) is trained here
from scratch on WordNet's definitions, as a language model. Then it is adapted to two tasks: a definition's field among
41, and the sentiment of a movie sentence. Each contender has a rate of three, chosen on validation rows with the first
seed; the head is trained in full by all. What is made is kept in FOLDER, so that an interrupted call goes on.
"""

import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tunerkit_experts
import typer
from torch import Tensor

import tunerkit
from benchmarks.quality.packages import cache_folder
from benchmarks.quality.sources import Examples, glosses, rated

WORDS, LENGTH, BATCH, STEPS = 2048, 40, 32, 1200
TRAIN, VALIDATION, TEST, EPOCHS = 2000, 500, 2000, 3
RATES = (2e-3, 8e-3, 2e-2)
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # the 97.5 % quantile of Student's t for so many seeds
TASKS = {"field": glosses("field"), "sentiment": rated("movieReviewSnippets_GroundTruth.txt", neutral=False)}
ATTENTION, EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "experts"]
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdaLoRA, layers and experts": ("adalora", {"target_rank": 2, "init_rank": 3, "targets": EVERYWHERE}),
    "LoRA, layers and experts": ("lora", {"rank": 2, "targets": EVERYWHERE}),
    "LoRA, attention alone": ("lora", {"rank": 12, "targets": ATTENTION}),
    "LoRA, rank / active experts": ("lora", {"rank": 4, "rank_pattern": {"*.stacks.*": 2}, "targets": EVERYWHERE}),
}


def tokenizer_in(folder: Path, texts: Sequence[str]) -> Any:
    """A byte-pair tokenizer of the texts."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    place = folder / "tokenizer.json"
    if not place.exists():
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = ["[PAD]", "[UNK]", "[BOS]", "[EOS]"]
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=WORDS, special_tokens=special))
        tokenizer.save(str(place))
    return Tokenizer.from_file(str(place))


def batch_of(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """Ids with the first and the last token, padded on the right."""
    ids = [[2, *each.ids[: LENGTH - 2], 3] for each in tokenizer.encode_batch(list(texts))]
    longest = max(map(len, ids))
    padded = torch.tensor([each + [0] * (longest - len(each)) for each in ids])
    return {"input_ids": padded, "attention_mask": (padded != 0).long()}


def config_of(**more: Any) -> Any:
    """The mixture."""
    from transformers import Qwen3MoeConfig

    sizes: dict[str, Any] = {
        **{"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "num_experts": 8},
        **{"num_experts_per_tok": 2, "mlp_only_layers": [], "vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 2},
        **{"eos_token_id": 3, "output_router_logits": True, "router_aux_loss_coef": 0.01},
    }
    return Qwen3MoeConfig(**sizes, **more)


def base_in(folder: Path, tokenizer: Any, texts: Sequence[str]) -> Path:
    """The folder of the mixture, trained on the texts."""
    from transformers import Qwen3MoeForCausalLM

    place = folder / "base"
    if place.exists():
        return place
    torch.manual_seed(0)
    model, rng = Qwen3MoeForCausalLM(config_of()).train(), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.05)
    for step in range(STEPS):
        batch = batch_of(tokenizer, rng.sample(texts, BATCH))
        labels = batch["input_ids"].masked_fill(batch["input_ids"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 200 == 0 or step == STEPS - 1:
            print(f"base, step {step}: loss {loss.item():.2f}", flush=True)
    model.save_pretrained(place)
    return place


def rows_of(task: str, cache: Path) -> tuple[Examples, Examples, Examples]:
    """Training, validation and test rows; the split is fixed."""
    rows = TASKS[task](cache)
    order = random.Random(0).sample(range(len(rows)), TRAIN + VALIDATION + TEST)
    bounds = (slice(TRAIN), slice(TRAIN, TRAIN + VALIDATION), slice(TRAIN + VALIDATION, None))
    train, validation, test = (rows.take(order[bound]) for bound in bounds)
    return train, validation, test


def run(folder: Path, task: str, name: str, rate: float, seed: int) -> dict[str, float]:
    """Adapt the mixture to a task: accuracies, and the adapter's parameters."""
    from transformers import Qwen3MoeForSequenceClassification

    place = folder / f"{task}-{name}-{rate}-{seed}.json".replace(" / ", " per ")
    if place.exists():
        found: dict[str, float] = json.loads(place.read_text())
        return found
    began = time.process_time()
    tokenizer = tokenizer_in(folder, ())
    train, validation, test = rows_of(task, cache_folder())
    names = sorted({*train.labels, *validation.labels, *test.labels})
    torch.manual_seed(seed)
    model: Any = Qwen3MoeForSequenceClassification.from_pretrained(folder / "base", num_labels=len(names))
    method, settings = CONTENDERS[name]
    total = EPOCHS * (TRAIN // BATCH)
    tunerkit.wrap(model, method, {**settings, "train_modules": ["score"]}, seed=seed)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=rate)
    tunerkit.attach(model, optimizer, total_steps=total)
    warm = max(1, total // 16)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm, (total - step) / (total - warm))
    )
    rng = random.Random(seed)
    model.train()
    for _ in range(EPOCHS):
        order = rng.sample(range(TRAIN), TRAIN)
        for at in range(0, TRAIN - BATCH + 1, BATCH):
            chosen = train.take(order[at : at + BATCH])
            labels = torch.tensor([names.index(label) for label in chosen.labels])
            model(**batch_of(tokenizer, chosen.texts), labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    model.eval()
    result = {
        "validation": accuracy(model, tokenizer, validation, names),
        "test": accuracy(model, tokenizer, test, names),
        "parameters": parameters_of(tunerkit.tuner(model)),
        "seconds": round(time.process_time() - began),
    }
    place.write_text(json.dumps(result))
    print(task, name, rate, seed, result, flush=True)
    return result


def parameters_of(tuner: Any) -> int:
    """The live parameters of an adapter: P's column and Q's row of each live triplet, of each expert."""
    experts, total = tunerkit_experts.ranks(tuner), 0
    for target in tuner.targets:
        rank = sum(experts[target.path]) if target.path in experts else tuner.ranks()[target.path]
        total += rank * (target.module.in_features + target.module.out_features)
    return total


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, rows: Examples, names: Sequence[str]) -> float:
    """The share of rows that get their label, in percent."""
    right = 0
    for at in range(0, len(rows), 100):
        chosen = rows.take(range(at, min(at + 100, len(rows))))
        logits = model(**batch_of(tokenizer, chosen.texts)).logits
        right += sum(names[i] == label for i, label in zip(logits.argmax(-1).tolist(), chosen.labels, strict=True))
    return 100 * right / len(rows)


def main(
    folder: Annotated[Path, typer.Argument(help="Where the base and the results are kept.")],
    seeds: Annotated[int, typer.Option(help="How many.", min=2, max=5)] = 2,
) -> None:
    """Print each contender's mean test accuracy, and the differences to LoRA everywhere with 95 % intervals."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [*TASKS["field"](cache_folder()).texts]
    base_in(folder, tokenizer_in(folder, texts), texts)
    for task in TASKS:
        tests: dict[str, list[float]] = {}
        for name in CONTENDERS:
            first = {rate: run(folder, task, name, rate, 0) for rate in RATES}
            rate = max(RATES, key=lambda each: first[each]["validation"])
            found = [run(folder, task, name, rate, seed) for seed in range(seeds)]
            tests[name] = [each["test"] for each in found]
            print(f"{task}: {name}: {statistics.mean(tests[name]):.1f} at {rate}, {found[0]['parameters']} parameters")
        for name, own in tests.items():
            gaps = [one - other for one, other in zip(own, tests["LoRA, layers and experts"], strict=True)]
            half = STUDENT[seeds] * statistics.stdev(gaps) / seeds**0.5
            print(f"{task}: {name} - LoRA: {statistics.mean(gaps):+.1f} ± {half:.1f}")


if __name__ == "__main__":
    typer.run(main)
