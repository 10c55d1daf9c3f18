"""Steps, save, load, merge and disable in any order keep the invariants of a wrapped model."""

import tempfile
from pathlib import Path

import torch
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import tunerkit
from tunerkit_adalora import AdaLoraConfig

TOTAL = 20


def base() -> nn.Module:
    """A small net with a head that is trained in full."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


class WrappedModel(RuleBasedStateMachine):
    """A wrapped model, driven at random; the base and one batch are the reference."""

    def __init__(self) -> None:
        super().__init__()
        self.original = base()
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(5, 6, generator=generator)
        self.labels = torch.randint(0, 3, (5,), generator=generator)
        self.expected = self.original(self.x).detach()
        self.folder = tempfile.TemporaryDirectory()
        self.merged = False
        self.attached = True

    @initialize(
        t_init=st.integers(0, 4),
        t_final=st.integers(1, 8),
        delta_t=st.integers(1, 4),
        seed=st.integers(0, 99),
        exact_svd=st.booleans(),
    )
    def wrap(self, t_init: int, t_final: int, delta_t: int, seed: int, exact_svd: bool) -> None:
        config = AdaLoraConfig(
            target_rank=2,
            init_rank=4,
            t_init=t_init,
            t_final=t_final,
            delta_t=delta_t,
            exact_svd=exact_svd,
            targets=("0", "2"),
            train_modules=("4",),
        )
        self.model = tunerkit.wrap(base(), "adalora", config, seed=seed)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=5e-2)
        tunerkit.attach(self.model, self.optimizer, total_steps=TOTAL)

    def output(self) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.model(self.x)
        return found

    @precondition(lambda self: self.attached and not self.merged and tunerkit.tuner(self.model).steps < TOTAL)
    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(min(count, TOTAL - tunerkit.tuner(self.model).steps)):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.x), self.labels).backward()
            self.optimizer.step()

    @precondition(lambda self: self.attached and self.merged)
    @rule()
    def step_while_merged(self) -> None:
        try:
            self.optimizer.step()
        except tunerkit.errors.StepError:
            return
        raise AssertionError("a step on a merged model must raise")

    @precondition(lambda self: not self.attached or tunerkit.tuner(self.model).steps > 0)
    @rule()
    def save_and_load(self) -> None:
        before = self.output()
        path = tunerkit.save(self.model, Path(self.folder.name) / "out")
        loaded = tunerkit.load(base(), path)
        assert (loaded(self.x) - before).abs().max() <= 1e-5 * before.abs().max()
        assert tunerkit.tuner(loaded).ranks() == tunerkit.tuner(self.model).ranks()

    @precondition(lambda self: not self.attached or tunerkit.tuner(self.model).steps > 0)
    @rule()
    def go_on_with_the_loaded(self) -> None:
        self.model = tunerkit.load(base(), tunerkit.save(self.model, self.folder.name), trainable=True)
        self.attached = self.merged = False

    @precondition(lambda self: not self.attached)
    @rule()
    def attach_again(self) -> None:
        if self.merged:
            tunerkit.unmerge(self.model)
            self.merged = False
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=5e-2)
        tunerkit.attach(self.model, self.optimizer, total_steps=TOTAL)
        self.attached = True

    @precondition(lambda self: not self.merged)
    @rule()
    def merge(self) -> None:
        before = self.output()
        tunerkit.merge(self.model)
        self.merged = True
        assert (self.output() - before).abs().max() <= 1e-5 * before.abs().max()

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self) -> None:
        tunerkit.unmerge(self.model)
        self.merged = False

    @precondition(lambda self: self.attached and self.merged)
    @rule()
    def finish_while_merged(self) -> None:
        try:
            tunerkit.tuner(self.model).finish()
        except tunerkit.errors.StepError:
            return
        raise AssertionError("finish on a merged model must raise")

    @precondition(lambda self: self.attached and not self.merged and tunerkit.tuner(self.model).steps > 0)
    @rule()
    def finish(self) -> None:
        tunerkit.tuner(self.model).finish()
        assert sum(tunerkit.tuner(self.model).ranks().values()) == 4

    @invariant()
    def disabled_shows_the_base(self) -> None:
        if hasattr(self, "model"):
            before = self.output()
            with tunerkit.disabled(self.model):
                assert torch.equal(self.output(), self.expected)
            assert torch.equal(self.output(), before)

    @invariant()
    def base_is_untouched(self) -> None:
        if hasattr(self, "model") and not self.merged:
            state = self.model.state_dict()
            for name, tensor in self.original.state_dict().items():
                assert torch.equal(state[name], tensor)

    @invariant()
    def mask_counts_the_budget_in_force(self) -> None:
        if hasattr(self, "model"):
            tuner = tunerkit.tuner(self.model)
            assert sum(tuner.ranks().values()) == tuner.budget()

    @invariant()
    def trainable_set_is_adapters_and_named_copies(self) -> None:
        if hasattr(self, "model"):
            names = {name for name, p in self.model.named_parameters() if p.requires_grad}
            weights = {f"{i}.tunerkit.default.adapter.{w}" for i in (0, 2) for w in ("p", "lam", "q")}
            assert names == weights | {f"4.tunerkit.default.copy.{w}" for w in ("weight", "bias")}

    def teardown(self) -> None:
        self.folder.cleanup()


TestWrappedModel = WrappedModel.TestCase
TestWrappedModel.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
