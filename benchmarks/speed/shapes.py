"""The command ``python -m benchmarks.speed.shapes``: steps at six shapes, on a machine's processors, of two checkouts.

All contenders of all checkouts take one step in each round. Each checkout has a process of its own.
"""

import enum
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Any

import attrs
import numpy as np
import torch
import typer
from rich.console import Console
from transformers import LlamaModel

from benchmarks.speed import contenders as who, machine
from benchmarks.speed.models import LLAMA_TARGETS, Workload, llama_config, workload
from benchmarks.speed.settings import Settings
from benchmarks.speed.statistics import Estimate, Pairs, geometric_mean, one_kind, ratio
from benchmarks.speed.timing import Times, orders

HERE = Path(__file__).resolve().parents[2]
RANK, TARGET_RANK = 12, 8
NAMES = (who.FLOOR, who.PEFT_LORA, who.PEFT_ADALORA, who.LORA, who.ADALORA_GAMMA, who.ADALORA_SHRUNK)
OURS = NAMES[3:]
BUSY = 0.3  # load of a machine above which no limit is called met
WIDE = 1024


@attrs.frozen
class Shape:
    """A Llama, 4 times as wide inside, and its batch."""

    layers: int
    hidden: int
    batch: int
    tokens: int
    targets: tuple[str, ...] = LLAMA_TARGETS

    @property
    def name(self) -> str:
        some = "" if self.targets == LLAMA_TARGETS else ", q, k, v"
        return f"{self.layers}x{self.hidden}, {self.batch} x {self.tokens}{some}"


SHAPES = (
    Shape(6, 384, 16, 64),
    Shape(12, 256, 8, 64),
    Shape(4, 1024, 2, 128),
    Shape(12, 384, 32, 26),
    Shape(4, 1024, 2, 128, LLAMA_TARGETS[:3]),
    Shape(24, 512, 4, 64),
)
# By contender: the limit of its overhead beside PEFT LoRA's, at layers as wide as `WIDE` and at narrower ones.
LIMITS = {who.LORA: (0.6, 0.85), who.ADALORA_GAMMA: (0.75, 0.95), who.ADALORA_SHRUNK: (0.6, 0.6)}
STEPS = {f"step, {name}": name for name in OURS}  # columns of whole steps beside PEFT LoRA's
STEP_LIMIT = 0.97  # of AdaLoRA's


def build(shape: Mapping[str, Any], dtype: str, rounds: int, names: Sequence[str] = NAMES) -> dict[str, who.Contender]:
    """The contenders of a shape, which share the base. AdaLoRA allocates at every step."""
    own = Shape(**{**shape, "targets": tuple(shape["targets"])})
    settings = attrs.evolve(
        Settings(), pairs=rounds, warmup=8, delta_t=1, init_rank=RANK, target_rank=TARGET_RANK, batch=own.batch
    )
    torch.manual_seed(settings.seed)
    body = LlamaModel(llama_config(own.hidden, 4 * own.hidden, own.layers, max(1, own.hidden // 64), own.hidden // 64))
    size = (own.batch, own.tokens, own.hidden)
    base: Workload = workload(own.name, body, own.targets, size, settings.seed)
    if dtype != "float32":
        narrow = getattr(torch, dtype)
        base = attrs.evolve(base, base=base.base.to(narrow), x=base.x.to(narrow), autocast=narrow)
    return who.build_all(names, base, settings)


class Worker:
    """One checkout's process."""

    def __init__(self, checkout: Path, threads: int, capability: str) -> None:
        chosen = {} if capability == "native" else {"ATEN_CPU_CAPABILITY": capability}
        own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **chosen}
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(checkout)]
        self.checkout = checkout
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **own}
        )

    def ask(self, **request: Any) -> Any:
        """Send a request and wait for the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # its end is seen in the answer
            print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise ValueError(f"the process of {self.checkout} ended; it says why above")
        return json.loads(answer)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def time_shape(
    shape: Shape, checkouts: Mapping[str, Path], threads: int, capability: str, dtype: str, rounds: int, warmup: int = 4
) -> dict[str, list[float]]:
    """Seconds of each contender of each checkout in each round, by "contender @ checkout"."""
    with ExitStack() as stack:
        workers = {label: stack.enter_context(Worker(path, threads, capability)) for label, path in checkouts.items()}
        for worker in workers.values():
            worker.ask(shape=attrs.asdict(shape), dtype=dtype, rounds=rounds + warmup)
        places = {f"{name} @ {label}": (worker, name) for label, worker in workers.items() for name in NAMES}
        found: dict[str, list[float]] = {place: [] for place in places}
        for order in itertools.islice(orders(list(places), 0), warmup + rounds):
            for worker in workers.values():
                worker.ask(collect=True)
            for place in order:
                worker, name = places[place]
                found[place].append(worker.ask(step=name))
        return {place: times[warmup:] for place, times in found.items()}


def ratios(times: Mapping[str, Sequence[float]], label: str) -> dict[str, Pairs]:
    """Of each contender: overhead and whole step beside PEFT LoRA's of the same process."""
    own: dict[str, Times] = {name: np.array(times[f"{name} @ {label}"]) for name in NAMES}
    floor, peer, kinds = own[who.FLOOR], own[who.PEFT_LORA], one_kind(len(own[who.FLOOR]))
    found = {name: Pairs(own[name] - floor, peer - floor, kinds) for name in (who.PEFT_ADALORA, *OURS)}
    return {**found, **{column: Pairs(own[name], peer, kinds) for column, name in STEPS.items()}}


def table(files: Sequence[Path]) -> list[str]:
    """Ratios of each measured place, and the geometric mean of each kind of run, with their intervals."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    columns = (who.PEFT_ADALORA, *OURS, *STEPS)
    lines = [f"| processor | shape | checkout | {' | '.join(columns)} |", f"|---|---|---|{'---:|' * len(columns)}"]
    means: dict[tuple[str, str], list[dict[str, Pairs]]] = {}
    for run in runs:
        for label in run["checkouts"]:
            found = ratios(run["times"], label)
            means.setdefault((run["kind"], label), []).append(found)
            cells = [_told(ratio(found[column], seed=0), _limit(column, run)) for column in columns]
            kind = run["kind"] + (f" (busy: load {run['load']})" if run["load"] > BUSY else "")
            lines.append(f"| {kind} | {run['shape']} | {label} | {' | '.join(cells)} |")
    for (kind, label), each in means.items():
        several = [geometric_mean([own[column] for own in each], seed=0) for column in columns]
        cells = [_told(found, None) if found.value > 0 else "" for found in several]  # no logarithm of a gain
        lines.append(f"| {kind} | geometric mean of {len(each)} | {label} | {' | '.join(cells)} |")
    return lines


def _limit(column: str, run: Mapping[str, Any]) -> float | None:
    if run["load"] > BUSY:
        return None
    wide, narrow = LIMITS.get(column, (None, None))
    if column in STEPS:
        return STEP_LIMIT if STEPS[column] == who.ADALORA_GAMMA else None
    return wide if run["hidden"] >= WIDE else narrow


def _told(found: Estimate, limit: float | None) -> str:
    mark = "" if limit is None else f", {'met' if found.high <= limit else 'missed'} (≤ {limit:g})"
    value, low, high = (f"{own:.3g}" if own else "≤ 0" for own in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]{mark}"


class Dtype(enum.StrEnum):
    """The dtype of a base; a narrow one runs under autocast."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


_NONE: list[Path] = []
_THREADS, _CAPABILITIES, _DTYPES, _NUMBERS = [1, 2], ["native", "avx2"], [Dtype.FLOAT32], [*range(len(SHAPES))]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    against: Annotated[list[Path], typer.Option(help="Further checkouts, to be timed in the same rounds.")] = _NONE,
    threads: Annotated[list[int], typer.Option(min=1)] = _THREADS,
    capability: Annotated[list[str], typer.Option(help="native, or a value of ATEN_CPU_CAPABILITY.")] = _CAPABILITIES,
    dtype: Annotated[list[Dtype], typer.Option(help="Of the base; adapters are fp32.")] = _DTYPES,
    rounds: Annotated[int, typer.Option(min=2)] = 80,
    shape: Annotated[list[int], typer.Option(min=0, max=len(SHAPES) - 1, help="Numbers of shapes, from 0.")] = _NUMBERS,
    out: Annotated[Path, typer.Option(help="The folder for times and table.")] = Path("out/shapes"),
) -> None:
    """Time what is not in the folder yet, and write the table of all that is there."""
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]  # before the first: later ones see what this command itself does
    checkouts = {"now": HERE, **{path.resolve().name: path.resolve() for path in against}}
    for own, number, flags, chosen in itertools.product(capability, threads, dtype, shape):
        kind = f"{own}, {number} thread{'s' * (number > 1)}, {flags}"
        path = out / f"{own}-{number}-{flags}-{chosen}.json"
        if path.exists():
            continue
        which = SHAPES[chosen]
        try:
            times = time_shape(which, checkouts, number, own, flags, rounds)
        except ValueError as problem:
            print(f"benchmarks.speed.shapes: {problem}", file=sys.stderr)
            raise typer.Exit(2) from None
        facts = {"kind": kind, "shape": which.name, "hidden": which.hidden, "load": round(load, 2)}
        facts |= {"processor": machine.processor(), "torch": torch.__version__, "rounds": rounds}
        path.write_text(json.dumps({**facts, "checkouts": [*checkouts], "times": times}), encoding="utf-8")
        console.print(f"{path.name}: {sum(map(sum, times.values())):.0f} s", highlight=False)
    lines = table(sorted(out.glob("*.json")))
    (out / "shapes.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
