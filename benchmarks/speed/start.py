"""Part `start`: the time to wrap, save, load and merge, and to select the targets of a large model."""

import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import peft
from torch import nn

import tunerkit
from benchmarks.speed import contenders as who
from benchmarks.speed.models import Workload, hollow_llama, small_llama
from benchmarks.speed.settings import Settings
from benchmarks.speed.statistics import Pairs, middle, one_kind, ratio
from benchmarks.speed.tables import Row, estimated
from benchmarks.speed.timing import Call, Times, interleave
from tunerkit.hooks import gather_knowledge, registry
from tunerkit.targets import scan, select

PART = "start"
# Each contender and the one it is compared with. AdaLoRA is saved and loaded after its last allocation.
AGAINST = {
    who.PEFT_LORA: None,
    who.PEFT_LORA_AGAIN: who.PEFT_LORA,
    who.LORA: who.PEFT_LORA,
    who.PEFT_ADALORA_FINAL: None,
    who.ADALORA_SHRUNK: who.PEFT_ADALORA_FINAL,
}
LIMITS = {"wrap": 0.5, "load": 0.5, "save": 1.0}
OURS = (who.LORA, who.ADALORA_SHRUNK)


def measure(settings: Settings) -> list[Row]:
    """All measurements at one number of layers; target selection only, in a model of the 70B shape."""
    workload = small_llama(settings.start_blocks, settings, hidden=settings.start_hidden)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = {
            "wrap": time_wrap(workload, settings),
            "save": time_save(workload, settings, Path(folder)),
            "load": time_load(workload, settings, Path(folder)),
            "merge": time_merge(workload, settings),
        }
    rows = [row for what, times in runs.items() for row in _rows(workload.name, what, times, settings)]
    return [*rows, selection_row("llama-70b", settings)]


def selection_row(shape: str, settings: Settings) -> Row:
    """The processor time of finding the default targets: the scan of the whole model and the selection."""
    model, knowledge, lora = hollow_llama(shape, settings.select_blocks), gather_knowledge(), registry.get("lora")

    def choose() -> None:
        select(scan(model, knowledge), targets=None, method=lora)

    times = interleave(
        {who.LORA: choose}, rounds=settings.pairs, seed=settings.seed, warmup=1, clock=_processor_seconds
    )
    found = middle(1e3 * times[who.LORA], one_kind(settings.pairs), seed=settings.seed)
    return estimated(PART, shape, who.LORA, "select, ms", found)


def _processor_seconds(call: Call) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def time_wrap(workload: Workload, settings: Settings) -> dict[str, Times]:
    """The time to put adapters into a fresh model."""
    fresh: dict[str, nn.Module] = {}

    def prepare(name: str) -> None:
        fresh[name] = workload.model()

    return _timed(lambda name: who.wrap(name, fresh[name], workload, settings), settings, prepare)


def time_save(workload: Workload, settings: Settings, folder: Path) -> dict[str, Times]:
    """The time to write the adapter. The files stay in ``folder`` for `time_load`."""
    trained = {name: _trained(name, workload, settings) for name in AGAINST}
    return _timed(lambda name: save(trained[name], folder / name), settings)


def time_load(workload: Workload, settings: Settings, folder: Path) -> dict[str, Times]:
    """The time to load the adapter onto a fresh base model."""
    fresh: dict[str, nn.Module] = {}

    def prepare(name: str) -> None:
        fresh[name] = workload.model()

    return _timed(lambda name: load(name, fresh[name], folder / name), settings, prepare)


def time_merge(workload: Workload, settings: Settings) -> dict[str, Times]:
    """The time to merge, in models that share no weights; unmerging is not timed."""
    trained = {name: _trained(name, workload, settings, separate=True) for name in AGAINST}
    merged: set[str] = set()

    def prepare(name: str) -> None:
        if name in merged:
            unmerge(trained[name])
        merged.add(name)

    return _timed(lambda name: merge(trained[name]), settings, prepare)


def save(model: nn.Module, folder: Path) -> None:
    """Ours or PEFT's."""
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(str(folder))
    else:
        tunerkit.save(model, folder)


def load(name: str, base: nn.Module, folder: Path) -> nn.Module:
    """Ours or PEFT's; neither for training."""
    if name in OURS:
        return tunerkit.load(base, folder)
    loaded: nn.Module = peft.PeftModel.from_pretrained(base, str(folder))
    return loaded


def merge(model: nn.Module) -> None:
    """Ours or PEFT's."""
    model.merge_adapter() if isinstance(model, peft.PeftModel) else tunerkit.merge(model)


def unmerge(model: nn.Module) -> None:
    """Ours or PEFT's."""
    model.unmerge_adapter() if isinstance(model, peft.PeftModel) else tunerkit.unmerge(model)


def _trained(name: str, workload: Workload, settings: Settings, *, separate: bool = False) -> nn.Module:
    contender = who.build(name, workload.apart() if separate else workload, settings)
    contender.step()
    return contender.model


def _timed(
    call: Callable[[str], object], settings: Settings, prepare: Callable[[str], None] | None = None
) -> dict[str, Times]:
    # The default binds each name: a closure would see the last one.
    calls = {name: (lambda name=name: call(name)) for name in AGAINST}
    return interleave(calls, rounds=settings.pairs, seed=settings.seed, warmup=1, before_each=prepare)


def _rows(where: str, what: str, times: Mapping[str, Times], settings: Settings) -> list[Row]:
    kinds = one_kind(settings.pairs)
    rows = []
    for name, other in AGAINST.items():
        rows.append(estimated(PART, where, name, f"{what}, ms", middle(1e3 * times[name], kinds, seed=settings.seed)))
        if other is not None:
            found = ratio(Pairs(top=times[name], bottom=times[other], kinds=kinds), seed=settings.seed)
            limit = LIMITS.get(what) if name in OURS else None
            rows.append(estimated(PART, where, name, f"{what} / PEFT's", found, limit))
    return rows
