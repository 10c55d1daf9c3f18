"""The row about misuse: calls in the wrong order, in the wrong state, or with the wrong things."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tunerkit
from tests.faults.harness import Fault, cases, refused
from tests.faults.subjects import Subject, Tunerkit, net
from tunerkit_testing import small

# Each gets the subject, the kind, a model that is ready for it, and a folder with a saved adapter.
Wrong = Callable[[Any, str, Any, Path], object]


def misuse(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Make a wrong call. It must raise, and the model must be what it was before."""
    for kind in subject.kinds:
        subject.save(subject.trained(kind, seed=1), folder / kind)
    calls = _OURS if isinstance(subject, Tunerkit) else _PEFTS
    for number, kind, _ in cases("misuse", subject, count):
        label, (prepare, call) = list(calls.items())[number // len(subject.kinds) % len(calls)]
        model = prepare(subject, kind, folder / kind)
        outcome = refused(subject, lambda c=call, k=kind, m=model: c(subject, k, m, folder / k), model)  # type: ignore[misc]
        yield Fault(f"{number}: {kind}, {label}", outcome)


def _base(subject: Any, kind: str, saved: Path) -> nn.Module:
    return net()


def _loaded(subject: Any, kind: str, saved: Path) -> nn.Module:
    found: nn.Module = subject.load(saved)
    return found


def _merged(subject: Any, kind: str, saved: Path) -> nn.Module:
    model = _loaded(subject, kind, saved)
    subject.merge(model)
    return model


def _merged_for_good(subject: Any, kind: str, saved: Path) -> nn.Module:
    return tunerkit.merge(_loaded(subject, kind, saved), permanent=True)


def _fresh(subject: Any, kind: str, saved: Path) -> nn.Module:
    return tunerkit.wrap(net(), kind, subject.config(kind), seed=0)


def _two(subject: Any, kind: str, saved: Path) -> nn.Module:
    return tunerkit.load(_loaded(subject, kind, saved), saved, adapter="second")


def _inactive(subject: Any, kind: str, saved: Path) -> nn.Module:
    model = _loaded(subject, kind, saved)
    tunerkit.activate(model, [])
    return model


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(small.trainable(model), lr=0.1)


def _attach_and_step(subject: Any, kind: str, model: Any, saved: Path) -> None:
    optimizer = _sgd(model)
    tunerkit.attach(model, optimizer, total_steps=12)
    optimizer.step()


def _inside_disabled(call: Wrong) -> Wrong:
    def inside(subject: Any, kind: str, model: Any, saved: Path) -> None:
        with tunerkit.disabled(model):
            call(subject, kind, model, saved)

    return inside


def _wrap(config: Any, **options: Any) -> Wrong:
    def call(subject: Any, kind: str, model: Any, saved: Path) -> None:
        tunerkit.wrap(
            model, kind, {**subject.config(kind), **config} if isinstance(config, dict) else config, **options
        )

    return call


Prepared = tuple[Callable[[Any, str, Path], nn.Module], Wrong]
_OURS: dict[str, Prepared] = {
    "wrap what is no model": (_base, lambda s, k, m, p: tunerkit.wrap("model", k)),  # type: ignore[type-var]
    "wrap with an unknown method": (_base, lambda s, k, m, p: tunerkit.wrap(m, "adalor")),
    "wrap with a method that is no text": (_base, lambda s, k, m, p: tunerkit.wrap(m, 3)),  # type: ignore[arg-type]
    "wrap with a config of another type": (_base, _wrap(3)),
    "wrap with an unknown setting": (_base, _wrap({"rnk": 2})),
    "wrap where nothing matches": (_base, _wrap({"targets": ["q_proj"]})),
    "wrap a norm": (_base, _wrap({"targets": ["1"]})),
    "wrap without targets": (_base, _wrap({"targets": []})),
    "wrap with a seed that is text": (_base, _wrap({}, seed="0")),
    "wrap with a seed of 100 digits": (_base, _wrap({}, seed=10**100)),
    "wrap with a name in use": (_loaded, _wrap({})),
    "wrap a merged model": (_merged, _wrap({}, adapter="second")),
    "wrap a disabled model": (_loaded, _inside_disabled(_wrap({}, adapter="second"))),
    "load with a name in use": (_loaded, lambda s, k, m, p: tunerkit.load(m, p)),
    "load into a merged model": (_merged, lambda s, k, m, p: tunerkit.load(m, p, adapter="second")),
    "load from nowhere": (_base, lambda s, k, m, p: tunerkit.load(m, p / "nowhere")),
    "load from None": (_base, lambda s, k, m, p: tunerkit.load(m, None)),  # type: ignore[arg-type]
    "load a state from an adapter's file": (
        _loaded,
        lambda s, k, m, p: tunerkit.load_state(m, p / "adapter.safetensors"),
    ),
    "save a base model": (_base, lambda s, k, m, p: tunerkit.save(m, p)),
    "save an unknown adapter": (_loaded, lambda s, k, m, p: tunerkit.save(m, p, adapter="other")),
    "save one of two without a name": (_two, lambda s, k, m, p: tunerkit.save(m, p)),
    "save to a number": (_loaded, lambda s, k, m, p: tunerkit.save(m, 3)),  # type: ignore[arg-type]
    "merge a base model": (_base, lambda s, k, m, p: tunerkit.merge(m)),
    "merge twice": (_merged, lambda s, k, m, p: tunerkit.merge(m)),
    "merge a disabled model": (_loaded, _inside_disabled(lambda s, k, m, p: tunerkit.merge(m))),
    "merge without an active adapter": (_inactive, lambda s, k, m, p: tunerkit.merge(m)),
    "unmerge what is not merged": (_loaded, lambda s, k, m, p: tunerkit.unmerge(m)),
    "unmerge what was merged for good": (_merged_for_good, lambda s, k, m, p: tunerkit.unmerge(m)),
    "unwrap what was merged for good": (_merged_for_good, lambda s, k, m, p: tunerkit.unwrap(m)),
    "unwrap a base model": (_base, lambda s, k, m, p: tunerkit.unwrap(m)),
    "unwrap a disabled model": (_loaded, _inside_disabled(lambda s, k, m, p: tunerkit.unwrap(m))),
    "disable a base model": (_base, lambda s, k, m, p: tunerkit.disabled(m).__enter__()),
    "activate an unknown adapter": (_loaded, lambda s, k, m, p: tunerkit.activate(m, "other")),
    "activate an adapter twice": (_loaded, lambda s, k, m, p: tunerkit.activate(m, ["default", "default"])),
    "activate a number": (_loaded, lambda s, k, m, p: tunerkit.activate(m, 3)),  # type: ignore[arg-type]
    "activate while merged": (_merged, lambda s, k, m, p: tunerkit.activate(m, [])),
    "delete an unknown adapter": (_loaded, lambda s, k, m, p: tunerkit.delete(m, "other")),
    "delete while merged": (_merged, lambda s, k, m, p: tunerkit.delete(m, "default")),
    "rename to a name in use": (_two, lambda s, k, m, p: tunerkit.rename(m, "default", "second")),
    "rename to a path": (_loaded, lambda s, k, m, p: tunerkit.rename(m, "default", "../up")),
    "ask a base model for its tuner": (_base, lambda s, k, m, p: tunerkit.tuner(m)),
    "ask for one of two tuners": (_two, lambda s, k, m, p: tunerkit.tuner(m)),
    "attach a base model": (
        _base,
        lambda s, k, m, p: tunerkit.attach(m, torch.optim.SGD(m.parameters(), lr=0.1), total_steps=12),
    ),
    "attach what is no optimizer": (_fresh, lambda s, k, m, p: tunerkit.attach(m, "sgd", total_steps=12)),
    "attach an optimizer of another model": (
        _fresh,
        lambda s, k, m, p: tunerkit.attach(m, torch.optim.SGD(net().parameters(), lr=0.1), total_steps=12),
    ),
    "attach with steps that are text": (
        _fresh,
        lambda s, k, m, p: tunerkit.attach(m, _sgd(m), total_steps="12"),  # type: ignore[arg-type]
    ),
    "attach with negative steps": (_fresh, lambda s, k, m, p: tunerkit.attach(m, _sgd(m), total_steps=-1)),
    "step while merged": (lambda s, k, p: tunerkit.merge(_fresh(s, k, p)), _attach_and_step),
    "structure a list": (_base, lambda s, k, m, p: tunerkit.structure(k, ["rank", 2])),  # type: ignore[arg-type]
    "register None": (_base, lambda s, k, m, p: tunerkit.register(None)),
    "register a class": (_base, lambda s, k, m, p: tunerkit.register(dict)),
    "unregister what is not registered": (_base, lambda s, k, m, p: tunerkit.unregister(object())),
}


def _peft_wrap(**settings: Any) -> Wrong:
    def call(subject: Any, kind: str, model: Any, saved: Path) -> None:
        import peft

        peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": ["0", "2"], **settings}))

    return call


# The calls that peft has as well. A warning is not counted as an error, in either column.
_PEFTS: dict[str, Prepared] = {
    "wrap with an unknown setting": (_base, _peft_wrap(rnk=2)),
    "wrap where nothing matches": (_base, _peft_wrap(target_modules=["q_proj"])),
    "wrap a norm": (_base, _peft_wrap(target_modules=["1"])),
    "wrap without targets": (_base, _peft_wrap(target_modules=[])),
    "wrap with a rank that is text": (_base, _peft_wrap(r="8")),
    "wrap with a negative rank": (_base, _peft_wrap(r=-1)),
    "wrap a wrapped model": (_loaded, _peft_wrap()),
    "load with a name in use": (_loaded, lambda s, k, m, p: m.load_adapter(str(p), "default")),
    "load from nowhere": (_base, lambda s, k, m, p: s.load(p / "nowhere", base=m)),
    "save an unknown adapter": (_loaded, lambda s, k, m, p: m.save_pretrained(str(p), selected_adapters=["other"])),
    "merge twice": (_merged, lambda s, k, m, p: s.merge(m)),
    "unmerge what is not merged": (_loaded, lambda s, k, m, p: s.unmerge(m)),
    "activate an unknown adapter": (_loaded, lambda s, k, m, p: m.set_adapter("other")),
    "delete an unknown adapter": (_loaded, lambda s, k, m, p: m.delete_adapter("other")),
    "delete while merged": (_merged, lambda s, k, m, p: m.delete_adapter("default")),
}
