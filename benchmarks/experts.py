"""Adapters on stacked experts beside PEFT's ``target_parameters``: ``python -m benchmarks.experts``.

Each number of experts has a language model of two blocks with random weights: 512 tokens, width 256, 512 inside an
expert, four experts a token, rank 8 on both stacks of each block. Time is CPU time of forward and backward on one
thread: in each of ten rounds, the frozen base, tunerkit and PEFT take a step after each other; medians of the rounds'
ratios, with the middle half. Memory is the growth of the process's peak in three steps, each contender in a process of
its own.
"""

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

ROUNDS, TOKENS, WIDTH, INSIDE, ACTIVE, RANK = 10, 512, 256, 512, 4, 8
CONTENDERS = ("frozen", "tunerkit", "peft")


def model_of(experts: int) -> Any:
    """A mixture with random weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1000, hidden_size=WIDTH, intermediate_size=INSIDE, moe_intermediate_size=INSIDE, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, num_experts=experts, num_experts_per_tok=ACTIVE,
        mlp_only_layers=[],
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def step_of(name: str, experts: int) -> Callable[[], None]:
    """A function that runs one forward and backward; the gradient of the embeddings' output is computed by all."""
    model = model_of(experts)
    if name == "tunerkit":
        import tunerkit

        tunerkit.wrap(model, "lora", {"rank": RANK, "targets": ["experts"]})
    elif name == "peft":
        from peft import LoraConfig, get_peft_model

        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules=[], target_parameters=parameters))
    else:
        model.requires_grad_(False)
    model.train()
    ids = torch.randint(0, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    base = model.get_base_model() if name == "peft" else model
    base.enable_input_require_grads()

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    return step


def grown(name: str, experts: int) -> float:
    """MiB by which this process's peak grows in three steps."""
    step = step_of(name, experts)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is counted from here on
    before = _status("VmRSS")
    for _ in range(3):
        step()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """A number of this process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def seconds(step: Callable[[], None]) -> float:
    """CPU seconds of one step."""
    began = time.process_time()
    step()
    return time.process_time() - began


def main(
    experts: Annotated[str, typer.Option(help="Numbers of experts, between commas.")] = "8,64,128",
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print a line for each number of experts: time and memory of a step."""
    torch.set_num_threads(1)
    if only is not None:
        return print("RESULT", json.dumps(grown(only, int(experts))))
    for count in map(int, experts.split(",")):
        steps = {name: step_of(name, count) for name in CONTENDERS}
        for step in steps.values():
            step()
        rounds = [{name: seconds(step) for name, step in steps.items()} for _ in range(ROUNDS)]
        del steps
        memory = {}
        for name in CONTENDERS:
            own = [sys.executable, "-m", "benchmarks.experts", "--experts", str(count), "--only", name]
            done = subprocess.run(own, capture_output=True, text=True, check=True)
            memory[name] = json.loads(next(row[7:] for row in done.stdout.splitlines() if row.startswith("RESULT")))
        print(f"{count} experts", _ratio(rounds, "peft"), _ratio(rounds, "frozen"), sep="; ", end="; ")
        medians = {name: statistics.median(each[name] for each in rounds) for name in CONTENDERS}
        print("ms " + ", ".join(f"{name} {1000 * own:.0f}" for name, own in medians.items()), end="; ")
        print(f"memory / peft's {memory['tunerkit'] / memory['peft']:.2f}", end=" (MiB ")
        print(", ".join(f"{name} {own:.0f}" for name, own in memory.items()) + ")", flush=True)


def _ratio(rounds: list[dict[str, float]], other: str) -> str:
    found = [each["tunerkit"] / each[other] for each in rounds]
    low, middle, high = statistics.quantiles(found, n=4)
    return f"time / {other}'s {middle:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    typer.run(main)
