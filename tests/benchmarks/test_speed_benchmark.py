"""The benchmark of speed and memory: its instruments on known costs, and a short run of each part."""

import collections
import functools
import gc
import itertools
import json
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import attrs
import numpy as np
import pytest
import torch

for _module in ("peft", "transformers", "typer", "rich", "tunerkit_lora", "tunerkit_adalora"):
    pytest.importorskip(_module, reason=f"the benchmark needs {_module}")

from rich.console import Console  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import tunerkit  # noqa: E402
from benchmarks.speed import (  # noqa: E402
    __main__ as command,
    allocator,
    compiled,
    contenders,
    gpu,
    growth,
    operations,
    shapes,
    small,
    start,
    statistics,
    steps,
    timing,
)
from benchmarks.speed.counting import Waits, count  # noqa: E402
from benchmarks.speed.models import encoder  # noqa: E402
from benchmarks.speed.settings import Settings, Size, read_sizes  # noqa: E402
from benchmarks.speed.storages import held_bytes, peak_bytes  # noqa: E402
from benchmarks.speed.tables import Row, to_json, to_markdown  # noqa: E402
from benchmarks.speed.timing import Call, interleave, orders  # noqa: E402

CPU = torch.device("cpu")
long = pytest.mark.skipif(os.environ.get("TUNERKIT_LONG") != "1", reason="compiles for half a minute: TUNERKIT_LONG=1")
TINY = Settings(
    sizes=read_sizes("1x16"),
    pairs=2,
    warmup=1,
    batch=2,
    tokens=4,
    init_rank=4,
    target_rank=2,
    blocks=(1, 2),
    growth_blocks=(1,),
    start_blocks=1,
    select_blocks=1,
    start_hidden=16,
    small_rows=(1,),
    small_widths=(16,),
    delta_t=2,
    backend="eager",
)
# What must be shown, by part: the measures and their limits.
LIMITS: dict[str, set[tuple[str, float]]] = {
    "steps": {(steps.RATIO, 1.0), (steps.RATIO, 0.85)},
    "operations": {
        ("forward and backward, per layer", 22.0),
        (operations.MASK_STEP, 400.0),
        (operations.OTHER_STEP, 150.0),
        ("host waits, mask step", 1.0),
    },
    "allocator": set(),
    "memory": {("beyond, share of trained", 2.04), ("beyond, share of trained", 0.001)},
    "start": {("wrap / PEFT's", 0.5), ("load / PEFT's", 0.5), ("save / PEFT's", 1.0)},
    "small": {
        *((f"{measure} / {contenders.PEFT_LORA}'s", limit) for measure, limit in (("median", 0.95), ("largest", 1.05))),
        (f"median / {contenders.PEFT_LORA}'s", 1.2),
        (f"median / {contenders.PEFT_ADALORA_BARE}'s", 0.95),
    },
    "compile": {("graph breaks", 0.0), (compiled.RATIO, 0.9)},
    "growth": set(),
    "alternatives": set(),
    "profile": set(),
}


@pytest.fixture(autouse=True)
def _forget_compiled() -> Any:
    yield
    torch.compiler.reset()


@contextmanager
def call_clock() -> Iterator[None]:
    """Replace the benchmark's clocks by one that counts calls of functions inside what `interleave` times."""
    # A busy machine changes nothing, and more work takes more calls. Counting all calls would slow a compiler down.
    calls = itertools.count(1)
    fake = types.SimpleNamespace(perf_counter=lambda: next(calls) * 1e-6, process_time=lambda: next(calls) * 1e-6)

    def seconds(call: Call) -> float:
        began = next(calls)
        sys.setprofile(lambda *event: next(calls) and None)
        try:
            call()
        finally:
            sys.setprofile(None)
        return (next(calls) - began) * 1e-6

    with pytest.MonkeyPatch.context() as patch:
        for module in (allocator, compiled, growth, start):
            patch.setattr(module, "time", fake)
        for timed in (interleave, steps.time_steps, small.added):
            patch.setitem(cast(dict[str, Any], timed.__kwdefaults__), "clock", seconds)
        patch.setattr(timing, "time", None)  # whoever reads the real clock all the same fails
        yield


@functools.cache
def short_run(part: str) -> list[Row]:
    with call_clock():
        return command.PARTS[part](TINY)


def rounds(typical: float, *, of: int = 60, seed: int = 0) -> statistics.Floats:
    return typical * np.random.default_rng(seed).normal(1, 0.05, of)


# Statistics


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_interval_of_a_ratio_holds_the_ratio(true: float) -> None:
    """Two noisy series have typical values of a known ratio; the interval is narrow and contains it."""
    pairs = statistics.Pairs(rounds(true * 2, seed=1), rounds(2, seed=2), statistics.one_kind(60))
    found = statistics.ratio(pairs, seed=0)
    assert found.low <= true <= found.high
    assert found.low <= found.value <= found.high <= 1.1 * found.low


def test_an_interval_of_the_mean_covers_as_often_as_it_says() -> None:
    """Over 200 experiments, the 95 % interval misses the true ratio in about one of twenty."""
    held = 0
    for seed in range(200):
        pairs = statistics.Pairs(rounds(1, seed=2 * seed), rounds(1, seed=2 * seed + 1), statistics.one_kind(60))
        found = statistics.ratio(pairs, seed=seed, draws=400)
        held += found.low <= 1 <= found.high
    assert 180 <= held <= 199


def test_a_geometric_mean_of_ratios_is_that() -> None:
    """Ratios of 1/2 and 2 without noise give 1, with an interval of zero width."""
    kinds = statistics.one_kind(10)
    several = [statistics.Pairs(np.full(10, r), np.ones(10), kinds) for r in (0.5, 2.0)]
    found = statistics.geometric_mean(several, seed=0, draws=50)
    assert attrs.astuple(found) == pytest.approx((1.0, 1.0, 1.0))


def test_expensive_rounds_count_by_their_share() -> None:
    """One round in ten costs 11 instead of 1: the typical value is 2, which neither a median nor outliers give."""
    kinds = np.array([0] * 9 + [1])
    values = np.where(kinds == 1, 11.0, 1.0)
    assert statistics.typical(values, kinds) == pytest.approx(2.0)
    assert statistics.typical(np.where(np.arange(10) == 0, 100.0, values), kinds) == pytest.approx(2.0)


def test_an_overhead_below_the_floor_keeps_no_yardstick() -> None:
    """If noise makes the denominator 0 or less, the ratio is infinite and misses every limit."""
    pairs = statistics.Pairs(np.ones(4), np.full(4, -1.0), statistics.one_kind(4))
    found = statistics.ratio(pairs, seed=0, draws=20)
    assert found.high == np.inf
    assert not Row("p", "w", "n", "m", found.value, found.low, found.high, limit=1e9).passed


# Timing


@pytest.mark.parametrize("count", [4, 5, 8])
def test_everyone_stands_equally_often_at_each_place_and_behind_each_other(count: int) -> None:
    """In each design; the order is the same for a seed, and reshuffled for the next design."""
    length, times = (count, 1) if count % 2 == 0 else (2 * count, 2)
    names = [f"{number}" for number in range(count)]
    found = list(itertools.islice(orders(names, seed=1), 3 * length))
    for first in range(0, 3 * length, length):
        design = found[first : first + length]
        assert all([each[place] for each in design].count(name) == times for place in range(count) for name in names)
        pairs = collections.Counter(pair for each in design for pair in itertools.pairwise(each))
        assert pairs == {pair: times for pair in itertools.permutations(names, 2)}
    assert found[:length] != found[length : 2 * length]
    again, other = (list(itertools.islice(orders(names, seed), 3 * length)) for seed in (1, 2))
    assert found == again != other


def test_rounds_are_timed_after_the_warmup_with_garbage_collection_off() -> None:
    """Every call runs warmup + rounds times and the last rounds are kept. At the end gc is on again, also on errors."""
    seen: list[bool] = []

    def one_second(call: Call) -> float:
        call()
        return 1.0

    found = interleave({"a": lambda: seen.append(gc.isenabled())}, rounds=3, seed=0, warmup=2, clock=one_second)
    assert found["a"].tolist() == [1.0] * 3
    assert seen == [False] * 5
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 / 0}, rounds=1, seed=0)
    assert gc.isenabled()


# Counts


def test_operations_are_counted_one_by_one() -> None:
    """A product, its transpose and a foreach call over many tensors: three operations, of which one is a view."""
    a = torch.ones(2, 3)

    def known() -> None:
        a @ a.transpose(0, 1)
        torch._foreach_mul([a, a, a], 2.0)

    found = count(known)
    assert dict(found.calls) == {"aten.transpose.int": 1, "aten.mm.default": 1, "aten._foreach_mul.Scalar": 1}
    assert (found.total, found.kernels) == (3, 2)


def test_backward_is_counted_with_forward() -> None:
    """The derivative of the square takes additional operations."""
    x = torch.ones(3, requires_grad=True)
    forward = count(lambda: x.square().sum()).total
    assert count(lambda: x.square().sum().backward()).total > forward == 2


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x[0] > 0), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.tolist(), 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: torch.repeat_interleave(x.long()), 1),
        (lambda x: torch.repeat_interleave(x.long(), output_size=3), 0),
        (lambda x: x[torch.tensor([0, 1])], 0),
        (lambda x: torch.where(x > 0, x, 0.0), 0),
    ],
)
def test_what_waits_for_a_device_is_counted(call: Any, waits: int) -> None:
    """Reading a value, a list or the indices of a mask waits; torch.where and integer indexing do not."""
    x = torch.ones(3)
    with Waits() as found:
        call(x)
    assert found.total == waits


# Bytes


def test_the_peak_counts_what_lives_at_once() -> None:
    """Two of three temporaries of 4 kB are live at a time; views and in-place results need no memory."""
    x = torch.ones(1000)

    def known() -> None:
        y = x + 1
        z = y * 2
        del y
        z.view(10, 100).add_(1)
        torch.exp(z)

    assert peak_bytes(known, CPU) == 8000


def test_the_peak_knows_what_backward_needs() -> None:
    """The exponential saves its result for backward: in a chain of three, all three results are live."""
    x = torch.ones(1000, requires_grad=True)
    assert peak_bytes(lambda: x.exp().exp().exp(), CPU) == 12000
    assert peak_bytes(lambda: x.detach().exp().exp().exp(), CPU) == 8000


def test_held_bytes_are_those_of_living_tensors() -> None:
    """A tensor counts while anything references it; a view of it costs nothing."""
    before = held_bytes()
    hidden = {"somewhere": [torch.ones(1000)]}
    hidden["somewhere"].append(hidden["somewhere"][0][:10])
    assert held_bytes() - before == 4000
    hidden.clear()
    assert held_bytes() == before


# Contenders


def test_contenders_share_the_frozen_weights_and_nothing_else() -> None:
    """One base in memory serves all, so caches are equally warm for each; training doesn't change it."""
    workload = encoder(TINY.sizes[0], TINY)
    before = {name: value.clone() for name, value in workload.base.state_dict().items()}
    training = contenders.build_all(steps.NAMES, workload, TINY)
    frozen = [
        {p.data_ptr() for p in c.model.parameters() if not p.requires_grad and p.numel() > 1} for c in training.values()
    ]
    own = [{p.data_ptr() for p in c.trained() if p.numel()} for c in training.values()]
    assert all(each == frozen[0] for each in frozen)
    assert len(set.union(*own)) == sum(map(len, own))
    for contender in training.values():
        contender.take(2)
    assert all(torch.equal(value, before[name]) for name, value in workload.base.state_dict().items())


def test_methods_compared_train_equally_much() -> None:
    """PEFT's LoRA and ours, and the two AdaLoRAs, start with equally many parameters at the same layers."""
    workload = encoder(TINY.sizes[0], TINY)

    def trained(name: str) -> int:
        return sum(p.numel() for p in contenders.build(name, workload, TINY).trained())

    assert workload.adapted == 6
    assert trained(contenders.LORA) == trained(contenders.PEFT_LORA)
    assert trained(contenders.ADALORA) == trained(contenders.PEFT_ADALORA)
    assert trained(contenders.ADALORA_SHRUNK) < trained(contenders.ADALORA_MASKED) == trained(contenders.ADALORA)


def test_timed_steps_lie_before_the_last_allocation() -> None:
    """Warm-up and rounds end before it, and the share of mask steps among them follows from Δ_T."""
    settings = Settings()
    tuner = tunerkit.tuner(contenders.build(contenders.ADALORA, encoder(Size(1, 16), settings), settings).model)
    kinds = steps.kinds_of(settings)
    last = settings.warmup + settings.pairs
    assert tuner.budget(last) > tuner.budget(settings.lasting)
    assert kinds.mean() == 1 / settings.delta_t


def test_peft_adds_its_regulariser_where_it_should() -> None:
    """The loss of PEFT's AdaLoRA is higher than that of the same model with the regulariser bypassed."""
    workload = encoder(TINY.sizes[0], TINY)
    full, bare = (contenders.build(n, workload, TINY) for n in (contenders.PEFT_ADALORA, contenders.PEFT_ADALORA_BARE))
    losses = [contender.call(workload.x, workload.target).loss for contender in (full, bare)]
    assert losses[0] > losses[1] > 0


# Parts


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=long) if part in ("compile", "profile") else part for part in LIMITS]
)
def test_a_short_run_of_each_part_finds_numbers_beside_their_limits(part: str) -> None:
    """A tiny model and two rounds give numbers, intervals around them, and the project's limits for ours."""
    rows = short_run(part)
    assert rows
    assert all(row.part == part for row in rows)
    assert all(np.isfinite(row.value) for row in rows)
    assert all(row.low <= row.value <= row.high for row in rows if row.low is not None and row.high is not None)
    assert {(row.measure, row.limit) for row in rows if row.limit is not None} >= LIMITS[part]
    assert not any(row.who.startswith("PEFT") for row in rows if row.limit is not None)


def test_every_part_is_tried_here() -> None:
    """No part of the command is missing above; the part for GPUs is tested below."""
    assert {*LIMITS, "gpu"} == set(command.PARTS)


@pytest.mark.parametrize(("rest", "marked"), [(0.9, "met"), (1.1, "missed")])
def test_a_limit_is_met_by_the_whole_interval(rest: float, marked: str, tmp_path: Path) -> None:
    """Of nine steps, five take 0.9 of PEFT LoRA's: so does the median, whose interval reaches the other four."""
    times = {f"{name} @ now": [1.0] * 9 for name in shapes.NAMES}
    times["frozen floor @ now"] = [0.5] * 9
    times[f"{contenders.ADALORA_GAMMA} @ now"] = [0.9] * 5 + [rest] * 4
    run = {"kind": "native", "shape": "1x64", "hidden": 64, "checkouts": ["now"], "load": 0.0, "times": times}
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    head, _, line, *_ = (own.split(" | ") for own in shapes.table([tmp_path / "run.json"]))
    (step,) = (at for at, own in enumerate(head) if own.startswith(f"step, {contenders.ADALORA_GAMMA}"))
    assert line[step].startswith(f"0.9 [0.9, {rest}], {marked} ")


def test_a_busy_machine_meets_no_limit(tmp_path: Path) -> None:
    """The table of times that were taken beside other work says nothing of limits."""
    times = {f"{name} @ now": [1.0 + at, 1.1 + at] for at, name in enumerate(shapes.NAMES)}
    run = {"kind": "native", "shape": "1x64", "hidden": 64, "checkouts": ["now"], "times": times}
    for load, marked in ((shapes.BUSY + 0.1, False), (shapes.BUSY, True)):
        (tmp_path / "run.json").write_text(json.dumps({**run, "load": load}), encoding="utf-8")
        line = shapes.table([tmp_path / "run.json"])[2]
        assert ("met" in line or "missed" in line) == marked
        assert ("busy" in line) != marked


@long
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU this part takes minutes")
def test_the_part_for_gpus_runs_in_small_form_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    """The same code in each form that a CPU has. It says what it is not, and no figure of it meets a limit."""
    with call_clock():
        rows = gpu.measure(TINY)
    told = capsys.readouterr().err
    assert "no GPU is at hand" in told
    left_out = {form for form in gpu.FORMS if f"{form} is left out" in told}
    assert {gpu.GRAPH, gpu.LIGER} <= left_out <= {gpu.GRAPH, gpu.LIGER, gpu.NF4}
    assert {row.where for row in rows} == {f"small, {form}, cpu" for form in gpu.FORMS if form not in left_out}
    for form in (gpu.EAGER, gpu.COMPILED):
        named = {row.who for row in rows if row.where == f"small, {form}, cpu" and row.measure == "step, ms"}
        assert named == {*steps.NAMES} - ({contenders.PEFT_ADALORA} if form == gpu.COMPILED else set())
    assert {row.measure for row in rows} >= {"step, ms", steps.RATIO, gpu.NOISE, "peak above the floor's, MiB"}
    assert {row.limit for row in rows} == {None}


def test_what_a_method_keeps_is_seen() -> None:
    """PEFT's AdaLoRA keeps three tensors as large as its trained parameters, plain LoRA none, ours two and pads."""
    rows = {row.who: row.value for row in short_run("memory") if row.measure == "beyond, share of trained"}
    assert rows[contenders.PEFT_LORA] == rows[contenders.LORA] == 0
    assert rows[contenders.PEFT_ADALORA] == pytest.approx(3, abs=0.02)
    assert 2 < rows[contenders.ADALORA] < 2.7  # the layers are 16 wide; tests of the averages have those of real ones


# Tables


def limited() -> list[Row]:
    return [Row("a", "here", "us", "x", 0.5, 0.4, 0.6, limit=0.55), Row("a", "here", "us", "y", 3.0, limit=3.0)]


def test_the_intervals_upper_end_decides() -> None:
    """An interval across the limit misses it, even if the value is below; a count without an interval decides alone."""
    assert [row.passed for row in limited()] == [False, True]
    assert Row("a", "b", "c", "d", 1.0).passed is None


def test_tables_hold_every_value_and_limit() -> None:
    """Markdown shows the limit with its value and in the table of limits; JSON has all rows."""
    text = to_markdown({"date": "today"}, limited())
    assert "0.5 [0.4, 0.6] (≤ 0.55: missed)" in text
    assert "| a | here | us | x | 0.5 [0.4, 0.6] | ≤ 0.55 | missed |" in text
    assert "| date | today |" in text
    found = json.loads(to_json({"date": "today"}, [*limited(), Row("a", "b", "c", "d", float("nan"))]))
    assert [row["value"] for row in found["rows"]] == [0.5, 3.0, None]
    assert [row["passed"] for row in found["rows"]] == [False, True, None]


# The command


def test_a_run_leaves_its_files_and_counts_as_any_other(tmp_path: Path) -> None:
    """They have date, versions and kind of machine but no folder; the part `operations` depends on the code alone."""
    command.measure_all(["operations"], TINY, tmp_path / "new", Console(quiet=True))
    text = (tmp_path / "new" / "speed.md").read_text(encoding="utf-8")
    written = json.loads((tmp_path / "new" / "speed.json").read_text(encoding="utf-8"))
    assert {"date", "torch", "peft", "tunerkit", "processor", "cores", "threads"} <= set(written["header"])
    assert str(tmp_path) not in text
    assert "/home" not in text
    assert written["rows"] == json.loads(to_json({}, short_run("operations")))["rows"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--part", "stepz"], "no part named stepz; there are: steps"), (["--sizes", "6by384"], "such as 6x384")],
)
def test_a_wrong_option_is_answered_in_words(arguments: list[str], said: str) -> None:
    """One line says what was passed and what is allowed; the exit code is 2."""
    done = CliRunner().invoke(command.app, arguments)
    assert done.exit_code == 2
    assert said in done.output
