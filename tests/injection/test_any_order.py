"""Adding, training, renaming, freezing, activating, merging and deleting in any order keeps adapters independent."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

import tunerkit
from tests.support.model_checks import fit
from tests.support.toys import Toys
from tunerkit.errors import AdapterError

NAMES = ("a", "b", "forward", "копия", "active")
CONFIGS = (
    {"targets": ["layers.0", "layers.1"]},
    {"targets": ["conv"], "bias": "adapters"},
    {"targets": ["layers.1"], "train_modules": ["head"]},
    {"targets": ["layers.0"], "train_modules": ["head.2"]},
)


class Several(RuleBasedStateMachine):
    """A model and, as the oracle, plain records of each adapter; `toys` is set by the test."""

    toys: "Toys"
    seen: ClassVar[set[str]] = set()

    def __init__(self) -> None:
        super().__init__()
        self.model = self.toys.net()
        self.x = self.toys.x()
        self.base = self.model(self.x).detach()
        self.folder = tempfile.TemporaryDirectory()
        self.optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3, weight_decay=0.1)
        self.outputs: dict[str, Tensor] = {}  # alone
        self.copied: dict[str, set[str]] = {}
        self.steps: dict[str, int] = {}
        self.active: list[str] = []
        self.frozen: set[str] = set()
        self.merged = False

    def alone(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The model's output with each of these alone active."""
        before = tunerkit.active(self.model)
        found = {}
        for name in names:
            tunerkit.activate(self.model, name)
            found[name] = self.model(self.x).detach()
        tunerkit.activate(self.model, before)
        return found

    def rivals(self, names: list[str]) -> bool:
        return any(self.copied[one] & self.copied[two] for one in names for two in names if one != two)

    def note(self, name: str) -> None:
        """Record a new adapter: active, attached, and with its output alone."""
        self.active.append(name)
        self.steps[name] = 0
        parameters = [p for p in tunerkit.tuner(self.model, name).parameters() if p.requires_grad]
        self.optimizer.add_param_group({"params": parameters})
        tunerkit.attach(self.model, self.optimizer, adapter=name)
        self.outputs.update(self.alone([name]))

    @precondition(lambda self: not self.merged and len(self.outputs) < len(NAMES))
    @rule(config=st.integers(0, 3), method=st.sampled_from(["toy-low-rank", "toy-shift"]), data=st.data())
    def add(self, config: int, method: str, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([name for name in NAMES if name not in self.outputs]))
        settings_of = CONFIGS[config]
        copied = {"head.0", "head.2"} if config == 2 else {"head.2"} if config == 3 else set()
        refused = any(copied & self.copied[other] for other in self.active)
        try:
            tunerkit.wrap(self.model, method, settings_of, adapter=name, seed=config)
        except AdapterError:
            assert refused
            return
        assert not refused
        for parameter in tunerkit.tuner(self.model, name).parameters():
            parameter.data.add_(0.1)
        self.copied[name] = copied
        self.note(name)

    @precondition(lambda self: not self.merged and 0 < len(self.outputs) < len(NAMES))
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(list(self.outputs)))
        name = data.draw(st.sampled_from([name for name in NAMES if name not in self.outputs]))
        path = tunerkit.save(self.model, Path(self.folder.name, str(len(self.outputs))), adapter=source)
        if any(self.copied[source] & self.copied[other] for other in self.active):
            with pytest.raises(AdapterError, match="the active adapter"):
                tunerkit.load(self.model, path, adapter=name, trainable=True)
            return
        tunerkit.load(self.model, path, adapter=name, trainable=True)
        self.copied[name] = self.copied[source]
        self.note(name)
        assert torch.equal(self.outputs[name], self.outputs[source])

    @precondition(lambda self: self.outputs)
    @rule(data=st.data())
    def activate(self, data: st.DataObject) -> None:
        names = data.draw(st.permutations(list(self.outputs)))[: data.draw(st.integers(0, 3))]
        if self.merged or self.rivals(names):
            with pytest.raises(AdapterError, match="unmerge" if self.merged else "both train"):
                tunerkit.activate(self.model, names)
            return
        tunerkit.activate(self.model, names)
        self.active = names

    @precondition(lambda self: self.outputs and len(self.outputs) < len(NAMES))
    @rule(data=st.data())
    def rename(self, data: st.DataObject) -> None:
        old = data.draw(st.sampled_from(list(self.outputs)))
        new = data.draw(st.sampled_from([name for name in NAMES if name not in self.outputs]))
        tunerkit.rename(self.model, old, new)
        for record in (self.outputs, self.copied, self.steps):
            renamed: dict[str, Any] = {new if name == old else name: value for name, value in record.items()}
            record.clear()  # type: ignore[attr-defined]
            record.update(renamed)  # type: ignore[attr-defined]
        self.active = [new if name == old else name for name in self.active]
        self.frozen = {new if name == old else name for name in self.frozen}

    @precondition(lambda self: self.outputs)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(list(self.outputs)))
        if self.merged:
            with pytest.raises(AdapterError, match="unmerge"):
                tunerkit.delete(self.model, name)
            return
        tunerkit.delete(self.model, name)
        del self.outputs[name], self.copied[name], self.steps[name]
        self.active = [other for other in self.active if other != name]
        self.frozen.discard(name)

    @precondition(lambda self: self.outputs)
    @rule(data=st.data(), frozen=st.booleans())
    def freeze_or_thaw(self, data: st.DataObject, frozen: bool) -> None:
        name = data.draw(st.sampled_from(list(self.outputs)))
        (tunerkit.freeze if frozen else tunerkit.thaw)(self.model, name)
        self.frozen = self.frozen | {name} if frozen else self.frozen - {name}

    @precondition(lambda self: not self.merged)
    @rule(count=st.integers(1, 3))
    def step(self, count: int) -> None:
        trained = [name for name in self.active if name not in self.frozen]
        if not trained:
            return
        fit(self.model, self.optimizer, self.x, count)
        self.seen.add("trained")
        for name in trained:
            self.steps[name] += count
        self.outputs.update(self.alone(trained))

    @precondition(lambda self: self.outputs)
    @rule()
    def merge_or_unmerge(self) -> None:
        if not self.merged and not self.active:
            with pytest.raises(AdapterError, match="no adapter is active"):
                tunerkit.merge(self.model)
            return
        before = self.model(self.x)
        (tunerkit.unmerge if self.merged else tunerkit.merge)(self.model)
        self.merged = not self.merged
        self.seen.add("merged")
        assert self.toys.close(self.model(self.x), before)

    @invariant()
    def names_and_activity_are_as_recorded(self) -> None:
        found = tunerkit.adapters(self.model)
        assert list(found) == list(self.outputs)
        assert [tuner.name for tuner in found.values()] == list(found)
        assert tunerkit.active(self.model) == tuple(self.active)
        assert {name: tuner.steps for name, tuner in found.items()} == self.steps
        trained = {name for name, count in tunerkit.trainable_parameters(self.model).adapters.items() if count}
        assert trained == set(self.outputs) - self.frozen

    @invariant()
    def each_alone_is_what_it_was(self) -> None:
        if not self.merged and self.outputs:
            found = self.alone(self.outputs)
            assert all(torch.equal(found[name], expected) for name, expected in self.outputs.items())

    @invariant()
    def the_base_is_untouched(self) -> None:
        if self.outputs:
            assert not any(p.requires_grad for name, p in self.model.named_parameters() if ".tunerkit." not in name)
            with tunerkit.disabled(self.model):
                assert torch.equal(self.model(self.x), self.base)
        else:
            assert torch.equal(self.model(self.x), self.base)
            assert all(p.requires_grad and "tunerkit" not in name for name, p in self.model.named_parameters())

    def teardown(self) -> None:
        self.folder.cleanup()


@pytest.fixture
def machine(toys: "Toys") -> Iterator[type[Several]]:
    Several.toys = toys
    yield Several
    del Several.toys


def test_adapters_stay_apart_in_any_order(machine: type[Several]) -> None:
    """Names, activity, counts, the base, and each adapter's output alone: only its own training changes them."""
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=25, deadline=None))
    assert machine.seen >= {"merged", "trained"}
