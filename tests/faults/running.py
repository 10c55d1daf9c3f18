"""Rows about models in use: merge cycles, leaks, threads, bad gradients and misuse."""

import gc
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tunerkit
from tests.faults.harness import Fault, cases, named, refused, same_bits
from tests.faults.subjects import Peft, Subject, Tunerkit, net, output
from tunerkit import injection
from tunerkit_testing import small

# --- Merge cycles -----------------------------------------------------------------------------------------------------

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def merge_cycles(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Merge and unmerge over and over, in three precisions: each cycle must end with the base bit for bit."""
    originals = _saved(subject, folder)
    models: dict[tuple[str, torch.dtype], tuple[nn.Module, Tensor]] = {}
    for number, kind, _ in cases("merge cycles", subject, count):
        dtype = _DTYPES[number // len(subject.kinds) % 3]
        if (kind, dtype) not in models:
            loaded = subject.load(originals[kind], base=net().to(dtype))
            models[kind, dtype] = (loaded, output(loaded))
        model, before = models[kind, dtype]
        weights = [p.detach().clone() for p in subject.base_weights(model)]
        subject.merge(model)
        merged = output(model)
        subject.unmerge(model)
        same = all(same_bits(p, old) for p, old in zip(subject.base_weights(model), weights, strict=True))
        outcome = "" if same else "the base weights are not what they were"
        if not outcome and not same_bits(output(model), before):
            outcome = "the output is not what it was"
        if not outcome and torch.equal(merged, output(_plain(dtype))):
            outcome = "the merged model is the base model"
        yield Fault(f"{number}: {kind}, {dtype}", outcome)


def _saved(subject: Subject, folder: Path) -> dict[str, Path]:
    for kind in subject.kinds:
        subject.save(subject.trained(kind, seed=1), folder / kind)
    return {kind: folder / kind for kind in subject.kinds}


def _plain(dtype: torch.dtype) -> nn.Module:
    return net().to(dtype)


# --- Leaks ------------------------------------------------------------------------------------------------------------

_CYCLES = 5  # of one operation in a case


def leaks(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Repeat an operation and its opposite: tensors, modules, hooks, files and threads must not become more."""
    saved = _saved(subject, folder)
    operations = _OURS if isinstance(subject, Tunerkit) else _PEFTS
    for number, kind, _ in cases("leaks", subject, count):
        label, cycle = operations[number // len(subject.kinds) % len(operations)]
        model = net()
        for _ in range(2):  # what is cached once is no leak
            model = cycle(subject, kind, model, saved[kind])
        before = _counts(model)
        for _ in range(_CYCLES):
            model = cycle(subject, kind, model, saved[kind])
        after = _counts(model)
        more = [f"{after[what] - before[what]} {what} more" for what in before if after[what] > before[what]]
        yield Fault(f"{number}: {kind}, {label}", ", ".join(more) and f"after {_CYCLES} cycles {', '.join(more)}")


def _counts(model: nn.Module) -> dict[str, int]:
    gc.collect()
    # The class, not isinstance: proxies of libraries would be loaded by it.
    alive = [type(thing) for thing in gc.get_objects()]
    kinds = {"tensors": Tensor, "modules": nn.Module, "optimizers": torch.optim.Optimizer}
    found = {what: sum(issubclass(one, kind) for one in alive) for what, kind in kinds.items()}
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return {**found, "hooks": hooks, "files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}


Cycle = Callable[[Any, str, Any, Path], nn.Module]


def _wrap_and_unwrap(subject: Tunerkit, kind: str, model: nn.Module, saved: Path) -> nn.Module:
    return tunerkit.unwrap(tunerkit.wrap(model, kind, subject.config(kind)))


def _load_and_delete(subject: Tunerkit, kind: str, model: nn.Module, saved: Path) -> nn.Module:
    tunerkit.delete(subject.load(saved, base=model), "default")
    return model


def _merge_and_unwrap(subject: Tunerkit, kind: str, model: nn.Module, saved: Path) -> nn.Module:
    return tunerkit.unwrap(tunerkit.merge(subject.load(saved, base=model)))


def _save_and_disable(subject: Tunerkit, kind: str, model: nn.Module, saved: Path) -> nn.Module:
    subject.load(saved, base=model)
    subject.save(model, saved)
    with tunerkit.disabled(model):
        output(model)
    return tunerkit.unwrap(model)


def _attach_and_train(subject: Tunerkit, kind: str, model: nn.Module, saved: Path) -> nn.Module:
    tunerkit.wrap(model, kind, subject.config(kind), seed=0)
    optimizer = torch.optim.SGD(small.trainable(model), lr=0.1)
    tunerkit.attach(model, optimizer, total_steps=12)
    small.train(model, optimizer, 3)
    return tunerkit.unwrap(model)


def _refused_load(subject: Subject, kind: str, model: nn.Module, saved: Path) -> nn.Module:
    (saved.parent / "damaged").mkdir(exist_ok=True)
    (saved.parent / "damaged" / subject.file).write_bytes((saved / subject.file).read_bytes()[:-1])
    refused(subject, lambda: subject.load(saved.parent / "damaged", base=model), model)
    return model


def _peft_wrap(subject: Peft, kind: str, model: Any, saved: Path) -> nn.Module:
    wrapped: Any = subject.trained(kind, base=model)
    found: nn.Module = wrapped.unload()
    return found


def _peft_load(subject: Peft, kind: str, model: Any, saved: Path) -> nn.Module:
    loaded: Any = subject.load(saved, base=model)
    subject.merge(loaded)
    subject.unmerge(loaded)
    subject.save(loaded, saved)
    found: nn.Module = loaded.unload()
    return found


_OURS: tuple[tuple[str, Cycle], ...] = (
    ("wrap and unwrap", _wrap_and_unwrap),
    ("load and delete", _load_and_delete),
    ("merge and unwrap", _merge_and_unwrap),
    ("save and disable", _save_and_disable),
    ("attach and train", _attach_and_train),
    ("a refused load", _refused_load),
)
_PEFTS: tuple[tuple[str, Cycle], ...] = (("wrap and unload", _peft_wrap), ("load, merge and unload", _peft_load))


# --- Threads ----------------------------------------------------------------------------------------------------------


def threads(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Use one model, or a model each, in several threads at a time: results are those of one thread."""
    saved = _saved(subject, folder)
    for number, kind, chance in cases("threads", subject, count):
        label, attack = _THREADS[number // len(subject.kinds) % len(_THREADS)]
        yield Fault(f"{number}: {kind}, {label}", attack(subject, kind, saved[kind], chance))


def _together(calls: list[Callable[[], str]]) -> str:
    """Run calls in threads that start at once. Returns the first outcome that is not empty."""
    outcomes: list[str] = []
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], str]) -> None:
        barrier.wait()
        try:
            outcomes.append(call())
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {str(error)[:200]}")

    started = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return next(filter(None, outcomes), "")


def _forwards(subject: Subject, kind: str, saved: Path, chance: random.Random) -> str:
    model = subject.load(saved)
    expected = output(model)
    return _together([lambda: "" if torch.equal(output(model), expected) else "another output"] * 4)


def _loads(subject: Subject, kind: str, saved: Path, chance: random.Random) -> str:
    expected = output(subject.load(saved))

    def load(base: nn.Module) -> str:
        return "" if torch.equal(output(subject.load(saved, base=base)), expected) else "another output"

    # The bases first: what builds them seeds the random state that all threads share.
    return _together([partial(load, base) for base in (net(), net(), net())])


def _saves(subject: Subject, kind: str, saved: Path, chance: random.Random) -> str:
    model = subject.load(saved)
    expected, place = output(model), saved.parent / "threads"

    def call() -> str:
        subject.save(model, place)
        return ""

    outcome = _together([call] * 3)
    return outcome or ("" if torch.equal(output(subject.load(place)), expected) else "the file has another adapter")


def _merge_beside_forward(subject: Subject, kind: str, saved: Path, chance: random.Random) -> str:
    """Merge while another thread is in a forward: refused, or that forward's output is right all the same."""
    return _change_beside_forward(subject, saved, subject.merge)


def _load_beside_forward(subject: Subject, kind: str, saved: Path, chance: random.Random) -> str:
    """Put a second adapter in while another thread is in a forward."""

    def change(model: Any) -> None:
        if isinstance(subject, Peft):
            model.load_adapter(str(saved), "second")
            model.set_adapter("second")
        else:
            tunerkit.load(model, saved, adapter="second")

    return _change_beside_forward(subject, saved, change)


def _delete_beside_forward(subject: Subject, kind: str, saved: Path, chance: random.Random) -> str:
    """Take the adapter out while another thread is in a forward."""

    def change(model: Any) -> None:
        model.delete_adapter("default") if isinstance(subject, Peft) else tunerkit.delete(model, "default")

    return _change_beside_forward(subject, saved, change)


class _Waiting(nn.Module):
    """Stops a forward in the middle of the model until the change was made."""

    def __init__(self) -> None:
        super().__init__()
        self.armed, self.inside, self.go_on = False, threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        if self.armed:
            self.inside.set()
            self.go_on.wait()
        return torch.tanh(x)


def _change_beside_forward(subject: Subject, saved: Path, change: Callable[[Any], object]) -> str:
    base: Any = net()
    waiting = base[1] = _Waiting()
    model = subject.load(saved, base=base)
    before = output(model)
    waiting.armed, found = True, []
    thread = threading.Thread(target=lambda: found.append(output(model)))
    thread.start()
    while thread.is_alive() and not waiting.inside.wait(0.1):
        pass
    outcome = ""
    try:
        change(model)
    except Exception as error:
        outcome = subject.wrong_error(error)
    finally:
        waiting.armed = False
        waiting.go_on.set()
        thread.join()
    try:
        after = output(model)
    except Exception:
        after = before  # without its last adapter, a model of peft cannot be called
    # Merging gives the same output but for rounding, so "right" allows for that, and a mixture does not pass.
    right = any(torch.allclose(found[0], each, rtol=1e-4, atol=1e-5) for each in (before, after)) if found else False
    return outcome or ("" if right else "the forward's output is neither that before the change nor that after it")


_THREADS: tuple[tuple[str, Callable[[Subject, str, Path, random.Random], str]], ...] = (
    ("forward of one model in four threads", _forwards),
    ("load in three threads", _loads),
    ("save to one place in three threads", _saves),
    ("merge beside a forward", _merge_beside_forward),
    ("load beside a forward", _load_beside_forward),
    ("delete beside a forward", _delete_beside_forward),
)


# --- Bad gradients ----------------------------------------------------------------------------------------------------

_STEPS = 12


def bad_gradients(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Make gradients NaN, infinite, zero or missing at some step, with a scaler that skips the step or without."""
    for number, kind, chance in cases("bad gradients", subject, count):
        value = chance.choice((torch.nan, torch.inf, -torch.inf, 0.0, None))
        at, guarded = chance.randrange(1, _STEPS), bool(number // len(subject.kinds) % 2)
        label = f"{value} at step {at}, {'with' if guarded else 'without'} a scaler"
        place = folder / f"case-{number}"
        train = _train_with if isinstance(subject, Tunerkit) else _train_peft_with
        try:
            outcome = train(subject, kind, value, at, guarded, place, chance)
        except Exception as error:
            # Without a scaler, a gradient that is not finite spoils the weights, and a method may stop then.
            may_stop = not guarded and value not in (0.0, None)
            outcome = subject.wrong_error(error) if may_stop else f"training was stopped: {named(error)}"
        yield Fault(f"{number}: {kind}, {label}", outcome)


def _spoil_(parameters: Sequence[nn.Parameter], value: float | None, chance: random.Random) -> None:
    parameter = chance.choice(parameters)
    if value is None or parameter.grad is None:
        parameter.grad = None
    elif value == 0.0:
        parameter.grad.zero_()
    else:
        parameter.grad.view(-1)[chance.randrange(parameter.numel())] = value


def _train_with(
    subject: Any, kind: str, value: float | None, at: int, guarded: bool, place: Path, chance: random.Random
) -> str:
    model = tunerkit.wrap(net(), kind, subject.config(kind), seed=0).train()
    optimizer = torch.optim.AdamW(small.trainable(model), lr=1e-2)
    tunerkit.attach(model, optimizer, total_steps=_STEPS)
    tuner = tunerkit.tuner(model)
    _train_steps(model, optimizer, lambda: list(tuner.parameters()), value, at, guarded, chance)
    state = injection.training_state(tuner)
    dirty = [name for name, t in state.tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    final = tuner.budget(_STEPS)
    if dirty:
        return f"NaN or infinity is in the training state: {dirty[0]}"
    if kind == "adalora" and sum(tuner.ranks().values()) != final:
        return f"pruning ended at {sum(tuner.ranks().values())} triplets, not at {final}"
    finite = all(parameter.isfinite().all() for parameter in tuner.parameters())
    if finite:
        tunerkit.save(model, place)
        return (
            "" if torch.equal(output(subject.load(place)), output(model)) else "the saved adapter gives other outputs"
        )
    return refused(subject, lambda: tunerkit.save(model, place)) and "an adapter with NaN was saved"


def _train_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: Callable[[], Sequence[nn.Parameter]],
    value: float | None,
    at: int,
    guarded: bool,
    chance: random.Random,
    after: Callable[[int], object] = lambda step: None,
) -> None:
    """Train, and spoil one gradient before the step ``at``."""
    scaler = torch.amp.GradScaler("cpu", enabled=guarded, init_scale=2.0)
    for step in range(1, _STEPS + 1):
        optimizer.zero_grad()
        scaler.scale(small.loss_of(model)).backward()
        if step == at:
            _spoil_(parameters(), value, chance)
        scaler.step(optimizer)
        scaler.update()
        after(step)


def _train_peft_with(
    subject: Any, kind: str, value: float | None, at: int, guarded: bool, place: Path, chance: random.Random
) -> str:
    """Train peft's AdaLoRA, which has to be called after each step."""
    import peft

    config = peft.AdaLoraConfig(
        init_r=3, target_r=2, tinit=2, tfinal=4, deltaT=2, total_step=_STEPS, target_modules=["0", "2"]
    )
    model: Any = peft.get_peft_model(net(), config).train()
    optimizer = torch.optim.AdamW(small.trainable(model), lr=1e-2)
    update = model.base_model.update_and_allocate
    _train_steps(model, optimizer, lambda: small.trainable(model), value, at, guarded, chance, after=update)
    allocator = model.base_model.rankallocator
    if not all(t.isfinite().all() for t in (*allocator.ipt.values(), *allocator.exp_avg_ipt.values())):
        return "NaN or infinity is in the averages"
    live = sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name)
    if live > 4:
        return f"pruning ended at {live} triplets, not at 4"
    finite = all(parameter.isfinite().all() for parameter in small.trainable(model))
    return "" if finite else refused(subject, lambda: subject.save(model, place)) and "an adapter with NaN was saved"
