"""Gradients withheld from a step: removed before it and restored after it, whatever happens in between."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tests.support.toys import OneMethod
from tunerkit import steps
from tunerkit.plugin import Adapter, BaseLayer, Engine, Method, Tuner, resize_
from tunerkit.steps.driver import Withheld
from tunerkit_testing.counting import Counting
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import ShiftConfig


class Gated(Adapter):
    """``gate`` · ``v`` (out,), added to the output. Only the method sets the gate."""

    reads_output = reads_weight = False

    def __init__(self, features: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.ones(features))
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return y + base.shape_bias(self.gate * self.v).to(y.dtype)


class GatePlugin(OneMethod):
    """Withholds the gate, and records its gradient whenever a hook fires."""

    method = Method("gated", config=ShiftConfig, needs_steps=True)

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer) -> Gated:
        return Gated(base.out_features)

    @tunerkit.hookimpl
    def tunerkit_start(self) -> list[tuple[str, Tensor | None]]:
        return []

    @tunerkit.hookimpl
    def tunerkit_before_step(self, tuner: Tuner) -> object:
        note(tuner, "before")
        return gates(tuner)

    @tunerkit.hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        note(tuner, "after")


class OldGatePlugin(GatePlugin):
    """Removes and restores the gradient itself, as methods did before hooks could return parameters."""

    @tunerkit.hookimpl
    def tunerkit_before_step(self, tuner: Tuner) -> None:  # type: ignore[override]
        note(tuner, "before")
        for gate in gates(tuner):
            gate.grad = None

    @tunerkit.hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        for gate in gates(tuner):
            gate.grad = noted(tuner)[-1][1]
        note(tuner, "after")


class NamingPlugin(GatePlugin):
    """Returns the gate's name instead of the gate."""

    @tunerkit.hookimpl
    def tunerkit_before_step(self, tuner: Tuner) -> object:
        return ["gate"]


def gates(tuner: Tuner) -> list[nn.Parameter]:
    return [adapter.gate for adapter in tuner.adapters().values() if isinstance(adapter, Gated)]


def noted(tuner: Tuner) -> list[tuple[str, Tensor | None]]:
    assert isinstance(tuner.state, list)
    return tuner.state


def note(tuner: Tuner, hook: str) -> None:
    (gate,) = gates(tuner)
    noted(tuner).append((hook, None if gate.grad is None else gate.grad.clone()))


@pytest.fixture(params=[GatePlugin])
def _plugin(request: pytest.FixtureRequest) -> Iterator[None]:
    with registered(request.param()):
        yield


pytestmark = pytest.mark.usefixtures("_plugin")


X = torch.linspace(-1, 1, 12).reshape(4, 3)


def started(make: Callable[..., torch.optim.Optimizer], **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model: nn.Module = tunerkit.wrap(nn.Sequential(nn.Linear(3, 2)), "gated", {"targets": ["0"]})
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=0.1, **options)
    tunerkit.attach(model, optimizer, total_steps=9)
    return model, optimizer


def loss_of(model: nn.Module) -> Tensor:
    loss: Tensor = (model(X) - 3).square().mean()
    return loss


def backward(model: nn.Module) -> Tensor:
    loss = loss_of(model)
    loss.backward()
    return loss


def gate_of(model: nn.Module) -> nn.Parameter:
    (gate,) = gates(tunerkit.tuner(model))
    return gate


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def raising(*_: object) -> None:
    raise ZeroDivisionError


AdamW, SGD = torch.optim.AdamW, torch.optim.SGD
with_both = pytest.mark.parametrize("_plugin", [GatePlugin, OldGatePlugin], indirect=True)


@with_both
@pytest.mark.parametrize(
    ("make", "options"),
    [(AdamW, {}), (AdamW, {"fused": True}), (SGD, {"momentum": 0.9, "weight_decay": 0.1}), (torch.optim.RMSprop, {})],
)
def test_a_withheld_parameter_stays_and_has_its_gradient_again(make: Any, options: dict[str, Any]) -> None:
    """If the core withholds what the hook returns, or the plugin does so, the optimizer never sees it."""
    model, optimizer = started(make, **options)
    gate = gate_of(model)
    seen: list[Tensor | None] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(gate.grad))
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        assert gate.grad is not None
        expected = gate.grad.clone()
        optimizer.step()
        assert torch.equal(gate.grad, expected)
    assert seen == [None] * 3
    assert gate.item() == 1
    assert gate not in optimizer.state
    assert [hook for hook, _ in noted(tunerkit.tuner(model))] == ["before", "after"] * 3
    assert all(grad is not None for _, grad in noted(tunerkit.tuner(model)))


@pytest.mark.parametrize("factor", [1.0, 1e38], ids=["taken", "skipped"])
@pytest.mark.parametrize("scale", [2.0**16, 3.0e4])
def test_under_a_grad_scaler_all_gradients_end_in_one_unit(factor: float, scale: float) -> None:
    """A fused step unscales the gradients it sees, a skipped step none; no division undoes 3.0e4 exactly."""
    model, optimizer = started(AdamW, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(model(X).square().mean() * factor).backward()  # type: ignore[no-untyped-call]
    scaled = grads(model)
    scaler.step(optimizer)
    skipped = factor > 1
    assert tunerkit.tuner(model).steps == (0 if skipped else 1)
    for found, before in zip(grads(model), scaled, strict=True):
        assert torch.equal(found, before if skipped else before / scale)


def test_after_a_step_that_raised_the_gradients_are_there_for_the_next() -> None:
    """The optimizer failed in the middle of its step: the next step withholds and restores the same gradient."""
    model, optimizer = started(SGD)
    backward(model)
    expected = grads(model)
    failing = optimizer.register_step_pre_hook(raising)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    failing.remove()
    optimizer.step()
    for found, before in zip(grads(model), expected, strict=True):
        assert torch.equal(found, before)
    assert gate_of(model).item() == 1
    (_, first), (_, second), (_, after) = noted(tunerkit.tuner(model))
    assert first is not None
    assert second is not None
    assert after is not None
    assert torch.equal(first, second)
    assert torch.equal(first, after)


def test_what_came_after_a_step_that_raised_wins() -> None:
    """An old gradient doesn't overwrite a newer one, and an old one of another size is dropped."""
    one, other = (nn.Parameter(torch.ones(3)) for _ in range(2))
    for parameter in (one, other):
        parameter.grad = torch.ones(3)
    withheld = Withheld()
    withheld.take_([one, other], None)
    one.grad = newer = torch.full((3,), 2.0)
    resize_(other, torch.ones(2))
    withheld.put_back_(stepped=False)
    assert one.grad is newer
    assert other.grad is None


@pytest.mark.parametrize("set_to_none", [True, False])
@with_both
def test_each_run_of_a_closure_sees_and_makes_its_own_gradient(set_to_none: bool) -> None:
    """LBFGS runs it several times: the gate stays unchanged, and ends with the last run's gradient."""
    model, optimizer = started(torch.optim.LBFGS, max_iter=4)
    gate = gate_of(model)
    made: list[Tensor] = []

    def closure() -> float:
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = backward(model)
        assert gate.grad is not None
        made.append(gate.grad.clone())
        return float(loss.detach())

    optimizer.step(closure)
    assert len(made) > 1
    assert gate.item() == 1
    assert gate.grad is not None
    assert torch.equal(gate.grad, made[-1])


def test_a_closure_that_accumulates_finds_what_it_has_accumulated() -> None:
    """Without `zero_grad` the second run adds to the first run's gradient, withheld or not."""
    model, optimizer = started(torch.optim.LBFGS, max_iter=3)
    gate, sums = gate_of(model), [torch.zeros(1)]

    def closure() -> float:
        (slope,) = torch.autograd.grad(loss_of(model), gate)
        sums.append(sums[-1] + slope)
        loss = backward(model)
        assert gate.grad is not None
        torch.testing.assert_close(gate.grad, sums[-1])
        return float(loss.detach())

    optimizer.step(closure)
    assert len(sums) > 2
    torch.testing.assert_close(gate.grad, sums[-1])


@pytest.mark.parametrize("_plugin", [NamingPlugin], indirect=True)
def test_what_is_no_list_of_parameters_is_refused() -> None:
    """The error says what was returned and what is allowed; no parameter was updated."""
    words = "tunerkit_before_step of .* returned a list with 'gate'.*return a list of the adapter's parameters"
    model, optimizer = started(SGD)
    backward(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(tunerkit.errors.PluginError, match=words):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_shared_parameter_is_taken_once_and_unscaled_once() -> None:
    """A parameter that is listed twice is divided by the scale once; all divisions are one operation."""
    shared, others = nn.Parameter(torch.ones(2)), [nn.Parameter(torch.ones(n)) for n in range(1, 9)]
    for parameter in (shared, *others):
        parameter.grad = torch.full_like(parameter, 8.0)
    without = nn.Parameter(torch.ones(2))
    withheld = Withheld()
    withheld.take_([shared, without, *others, shared], torch.tensor(4.0))
    assert all(parameter.grad is None for parameter in (shared, *others))
    with Counting() as mode:
        withheld.put_back_(stepped=True)
        withheld.put_back_(stepped=True)
    assert mode.count == 1
    for parameter in (shared, *others):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.full_like(parameter, 2.0))
    assert without.grad is None


def test_gradients_that_were_cleared_after_a_failed_step_stay_cleared() -> None:
    """The withheld gradient of a failed step does not come back after ``zero_grad``: nothing of it is trained."""
    model, optimizer = started(SGD)
    backward(model)
    failing = optimizer.register_step_pre_hook(raising)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    failing.remove()
    optimizer.zero_grad()
    tunerkit.activate(model, [])
    optimizer.step()
    assert tunerkit.tuner(model).steps == 0
    assert gate_of(model).grad is None


class FirstStepPlugin(GatePlugin):
    """Withholds the gate from the first step alone."""

    @tunerkit.hookimpl
    def tunerkit_before_step(self, tuner: Tuner) -> object:
        note(tuner, "before")
        return gates(tuner) if len(noted(tuner)) == 1 else None


class Moving(Engine):
    """Its optimizer moves a parameter without a gradient too."""

    withholds = False


@pytest.mark.parametrize("_plugin", [FirstStepPlugin], indirect=True)
def test_a_skipped_step_keeps_no_value_for_a_later_one() -> None:
    """The value from before a step that was skipped is not put back after the next one, which may move it."""
    torch.manual_seed(0)
    model: nn.Module = tunerkit.wrap(nn.Sequential(nn.Linear(3, 2)), "gated", {"targets": ["0"]})
    optimizer: Any = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    overflowing = optimizer.register_step_post_hook(lambda *_: setattr(optimizer, "found_inf", True))  # as ZeRO says it
    steps.drive([tunerkit.tuner(model)], optimizer, total_steps=9, engine=Moving())
    backward(model)
    optimizer.step()
    overflowing.remove()
    optimizer.found_inf = None
    gate = gate_of(model)
    assert gate.grad is not None
    expected = gate.detach() - 0.1 * gate.grad
    optimizer.step()
    assert tunerkit.tuner(model).steps == 1
    torch.testing.assert_close(gate.detach(), expected)
