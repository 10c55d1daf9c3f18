"""Driving steps: when a method's hooks fire, and which attachments are rejected."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import tunerkit
from tests.support.model_checks import sgd, silent, told
from tests.support.noting import Call, NotingPlugin, calls_of, hooks_of, per_step
from tests.support.toys import OneMethod, registering
from tunerkit.injection import tuners_of
from tunerkit.plugin import Method
from tunerkit.steps import drive, is_attached, optimizer_of
from tunerkit_testing.small import trainable
from tunerkit_testing.toy_methods import ShiftConfig, Shifting


class Plain(OneMethod, Shifting):
    """A method that needs no steps and implements no step hook, like LoRA."""

    method = Method("plain", config=ShiftConfig)


_methods = registering(NotingPlugin(), Plain())


X = torch.linspace(-1, 1, 12).reshape(4, 3)
# d loss / d v is (1, 1) whatever the weights.
GRADIENT = torch.ones(2)


def wrapped(
    method: str = "noting-stepper", adapter: str = "default", model: nn.Module | None = None, **config: Any
) -> nn.Module:
    if model is None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2))
    return tunerkit.wrap(model, method, {"targets": ["0"], **config}, adapter=adapter)


def backward(model: nn.Module, factor: float = 1.0) -> Tensor:
    loss: Tensor = model(X).sum(1).mean() * factor
    loss.backward()
    return loss


def calls(model: nn.Module) -> list[Call]:
    return calls_of(tunerkit.tuner(model))


def names(model: nn.Module) -> list[tuple[str, int]]:
    return hooks_of(tunerkit.tuner(model))


def attached(
    make: Callable[[nn.Module], torch.optim.Optimizer] = sgd, *, total_steps: int = 9, **config: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model, and the optimizer that drives its adapter."""
    model = wrapped(**config)
    optimizer = make(model)
    tunerkit.attach(model, optimizer, total_steps=total_steps)
    return model, optimizer


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "sgd fused": lambda model: sgd(model, fused=True),
    "adamw loop": lambda model: torch.optim.AdamW(trainable(model), lr=0.1, foreach=False),
    "adamw foreach": lambda model: torch.optim.AdamW(trainable(model), lr=0.1, foreach=True),
    "adamw fused": lambda model: torch.optim.AdamW(trainable(model), lr=0.1, fused=True),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
AS_KEYWORD = pytest.mark.parametrize("as_keyword", [False, True], ids=["positional", "keyword"])


def step_with(optimizer: torch.optim.Optimizer, closure: Callable[[], Any], as_keyword: bool) -> Any:
    return optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)


@AS_KEYWORD
@each_optimizer
def test_with_a_closure_before_fires_when_the_closure_has_made_the_gradients(
    make: Callable[[nn.Module], torch.optim.Optimizer], as_keyword: bool
) -> None:
    """However the closure is passed, gradients are complete when `before` fires, and the closure's loss is returned."""
    model, optimizer = attached(make)

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model)

    losses = [step_with(optimizer, closure, as_keyword) for _ in range(3)]
    assert names(model) == per_step(3)
    assert all(isinstance(loss, Tensor) for loss in losses)
    for before in calls(model)[::2]:
        torch.testing.assert_close(before.grads[0], GRADIENT)


@AS_KEYWORD
def test_lbfgs_calls_before_for_each_run_of_the_closure_and_after_once(as_keyword: bool) -> None:
    """LBFGS evaluates several times per step: each gradient gets its regulariser, and the step is counted once."""
    model = wrapped()
    optimizer = torch.optim.LBFGS(trainable(model), lr=0.1, max_iter=4)
    tunerkit.attach(model, optimizer, total_steps=9)
    runs = 0

    def closure() -> float:
        nonlocal runs
        runs += 1
        optimizer.zero_grad()
        loss = (model(X) - 1).square().mean()
        loss.backward()
        return float(loss.detach())

    step_with(optimizer, closure, as_keyword)
    assert runs > 1
    assert names(model) == [("before", 1)] * runs + [("after", 1)]
    step_with(optimizer, closure, as_keyword)
    assert names(model)[-1] == ("after", 2)


def test_a_closure_of_none_is_no_closure() -> None:
    """``step(None)`` and ``step(closure=None)`` are plain steps."""
    model, optimizer = attached()
    backward(model)
    optimizer.step(None)
    optimizer.step(closure=None)
    assert names(model) == per_step(2)


def test_accelerates_wrapped_optimizer_counts_synchronised_steps_only() -> None:
    """Accelerate steps its wrapper per micro-batch, and the real optimizer, which alone counts, when it syncs."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = wrapped()
    model, optimizer = accelerator.prepare(model, sgd(model))
    assert type(optimizer).__name__ == "AcceleratedOptimizer"
    tunerkit.attach(model, optimizer, total_steps=9)
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(X).sum(1).mean())
            optimizer.step()
            optimizer.zero_grad()
    assert names(model) == per_step(3)


class Averaging(torch.optim.Optimizer):
    """Wraps an optimizer and has its own state, like most Lookahead implementations."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.optimizer = inner

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """The inner step, then halfway back to the end of the last step."""
        loss = self.optimizer.step(closure)
        for weight in (weight for group in self.param_groups for weight in group["params"]):
            slow = self.state[weight].setdefault("slow", weight.clone())
            weight.copy_(slow.lerp_(weight, 0.5))
        return loss


def test_a_wrapper_with_a_separate_state_is_refused_where_steps_count() -> None:
    """It would restore pruned values; the inner optimizer can be attached. Of other methods its steps are counted."""
    model = wrapped()
    inner = sgd(model)
    outer = Averaging(inner)
    with pytest.raises(tunerkit.errors.StepError, match=r"Averaging keeps its own state beside .* of SGD.*SGD alone"):
        tunerkit.attach(model, outer, total_steps=9)
    assert not is_attached(tunerkit.tuner(model))
    tunerkit.attach(model, inner, total_steps=9)
    plain = wrapped("plain")
    tunerkit.attach(plain, own := Averaging(sgd(plain)))
    backward(plain)
    own.step()
    assert tunerkit.tuner(plain).steps == 1


def test_an_optimizer_that_takes_no_hooks_is_refused_and_nothing_is_attached() -> None:
    """Timm's Lookahead supports step hooks but not the hooks of state dicts."""
    optim = pytest.importorskip("timm.optim")
    model = wrapped()
    inner = sgd(model)
    with pytest.raises(
        tunerkit.errors.StepError,
        match=r"Lookahead does not support hooks.*If it wraps an optimizer with hooks, attach the wrapped",
    ):
        tunerkit.attach(model, optim.Lookahead(inner), total_steps=9)
    tunerkit.attach(model, inner, total_steps=9)


class Foreign:
    """Steps, and is no torch optimizer: an engine's own."""

    def step(self) -> None:
        pass


class Bare(torch.optim.Optimizer):
    """A torch optimizer whose class never called the constructor of torch's."""

    def __init__(self) -> None:
        pass

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize("make", [Foreign, Bare])
def test_a_method_that_needs_no_steps_takes_an_optimizer_without_hooks(make: Callable[[], Any]) -> None:
    """Its steps are not counted, which is said; a method that needs steps is still refused."""
    model = wrapped("plain")
    with pytest.warns(tunerkit.TunerkitWarning, match="does not support hooks, so steps are not counted"):
        tunerkit.attach(model, make(), total_steps=9)
    tuner = tunerkit.tuner(model)
    assert (tuner.steps, tuner.total_steps) == (0, 9)
    with pytest.raises(tunerkit.errors.StepError, match="does not support hooks"):
        tunerkit.attach(wrapped(), make(), total_steps=9)


@pytest.mark.parametrize(
    "candidate", [None, "adam", torch.optim.SGD, nn.Linear(1, 1)], ids=["None", "text", "class", "model"]
)
def test_what_cannot_step_is_refused_for_every_method(candidate: object) -> None:
    """A class or a model in the optimizer's place is a mistake, whether steps are needed or not; its type is named."""
    for method in ("plain", "noting-stepper"):
        text = refusal(wrapped(method), candidate, total_steps=9)
        assert "attach takes a torch optimizer, or a trainer that an installed" in text
        assert type(candidate).__name__ in text


@pytest.mark.parametrize("unscales", [False, True], ids=["unscaled by step", "unscaled by the user"])
@each_optimizer
def test_a_step_that_the_grad_scaler_skips_is_not_counted(
    make: Callable[[nn.Module], torch.optim.Optimizer], unscales: bool
) -> None:
    """Step 2 overflows at 2**16: `after` is not called for it, and the next step gets its number."""
    model = wrapped()
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    tunerkit.attach(model, optimizer, total_steps=9)
    fused = optimizer.param_groups[0]["fused"]
    for factor in (1.0, 1e38, 1.0):
        scaler.scale(model(X).sum(1).mean() * factor).backward()  # type: ignore[no-untyped-call]
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert [call.step for call in calls(model) if call.hook == "after"] == [1, 2]
    assert tunerkit.tuner(model).steps == 2
    for call in calls(model):
        if call.hook == "after":
            torch.testing.assert_close(call.grads[0], GRADIENT)
    # Only a fused optimizer, left to unscale by itself, is stepped with scaled gradients.
    befores = [call for call in calls(model) if call.hook == "before"]
    assert len(befores) == (3 if fused else 2)
    scales = [2.0**16, 2.0**16, 2.0**15] if fused and not unscales else [None] * len(befores)
    assert [call.grad_scale for call in befores] == scales
    torch.testing.assert_close(befores[0].grads[0], GRADIENT * (scales[0] or 1.0))


def test_a_trainers_clock_numbers_the_steps() -> None:
    """A trainer's global step also counts skipped steps: the method gets these numbers, and the tuner stores them."""
    model = wrapped()
    optimizer = sgd(model)
    numbers = iter([1, 1, 4, 4])
    drive([tunerkit.tuner(model)], optimizer, total_steps=9, clock=lambda: next(numbers))
    for expected in (1, 4):
        backward(model)
        # before, then after: each asks the clock once.
        optimizer.step()
        assert tunerkit.tuner(model).steps == expected
    assert names(model) == [("before", 1), ("after", 1), ("before", 4), ("after", 4)]


def test_ranks_that_after_step_returns_become_history() -> None:
    """An allocation is recorded with its step; a step without one is not recorded."""
    model, optimizer = attached(ranks_every=3)
    for _ in range(7):
        backward(model)
        optimizer.step()
    tuner = tunerkit.tuner(model)
    expected = [(step, dict.fromkeys(tuner.ranks(), step)) for step in (3, 6)]
    assert [(change.step, change.ranks) for change in tuner.history] == expected


@given(micro=st.lists(st.integers(1, 3), min_size=1, max_size=6), name=st.sampled_from(sorted(OPTIMIZERS)))
@settings(max_examples=30, deadline=None)
def test_steps_count_optimizer_steps_for_any_accumulation(micro: list[int], name: str) -> None:
    """Whatever the micro-batches: `before` sees the summed gradient and old weights, `after` the new weights."""
    model, optimizer = attached(OPTIMIZERS[name])
    for count in micro:
        for _ in range(count):
            backward(model)
        optimizer.step()
        optimizer.zero_grad()
    assert names(model) == per_step(len(micro))
    assert tunerkit.tuner(model).steps == len(micro)
    for before, after, count in zip(calls(model)[::2], calls(model)[1::2], micro, strict=True):
        torch.testing.assert_close(before.grads[0], count * GRADIENT)
        torch.testing.assert_close(after.grads, before.grads, rtol=0, atol=0)
        assert not torch.equal(after.weights[0], before.weights[0])
        assert before.grad_scale is None


def refusal(model: nn.Module, *args: Any, **kwargs: Any) -> str:
    """The message of a rejected attachment; also checks that the model is still unattached."""
    before = {name: (t.state, t.steps, t.total_steps, is_attached(t)) for name, t in tuners_of(model).items()}
    with pytest.raises(tunerkit.errors.StepError) as caught:
        tunerkit.attach(model, *args, **kwargs)
    assert {n: (t.state, t.steps, t.total_steps, is_attached(t)) for n, t in tuners_of(model).items()} == before
    return str(caught.value)


def test_unknown_total_steps_are_refused() -> None:
    """A method that needs steps says where to pass the total."""
    model = wrapped()
    words = refusal(model, sgd(model))
    assert "total_steps=... to tunerkit.attach" in words
    assert "config" in words


def test_disagreeing_total_steps_are_refused_with_both_numbers() -> None:
    """The totals in the config and in the call must not differ; the same, or the config's alone, is accepted."""
    for given_too in (True, False):
        model = wrapped(total_steps=10)
        words = refusal(model, sgd(model), total_steps=11)
        assert "total_steps=10" in words
        assert "11" in words
        tunerkit.attach(model, sgd(model), total_steps=10 if given_too else None)
        assert tunerkit.tuner(model).total_steps == 10


def test_a_total_that_stands_for_an_int_is_one() -> None:
    """NumPy integers are accepted: computed lengths are often of that type."""
    model = wrapped()
    optimizer = sgd(model)
    tunerkit.attach(model, optimizer, total_steps=np.int64(10))  # type: ignore[arg-type]
    assert type(tunerkit.tuner(model).total_steps) is int
    assert tunerkit.tuner(model).total_steps == 10


@pytest.mark.parametrize("total", [0, -1, 2.5, True, "10", np.float64(3), 2**63, 2**70])
@pytest.mark.parametrize("method", ["noting-stepper", "plain"])
def test_a_total_that_is_no_number_of_steps_is_refused(total: object, method: str) -> None:
    """The total must be an int from 1 to the largest that files have, whatever the method needs."""
    model = wrapped(method)
    assert repr(total) in refusal(model, sgd(model), total_steps=total)


@pytest.mark.parametrize("method", ["noting-stepper", "plain"])
def test_an_optimizer_without_the_adapters_parameters_is_refused(method: str) -> None:
    """It would never update them; the message says how to build the right optimizer."""
    model = wrapped(method)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    assert "requires_grad" in refusal(model, other, total_steps=5)


@pytest.mark.parametrize("method", ["noting-stepper", "plain"])
def test_parameters_missing_from_an_optimizer_are_listed_in_one_warning(method: str) -> None:
    """The warning names each missing part, adapter or head, and its place. If nothing is missing, there is none."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 3) for _ in range(8)]
    model = wrapped(method, model=nn.Sequential(*layers), targets="re:[0-6]", train_modules=["7"])
    own = dict(model.named_parameters())
    held = [own["0.tunerkit.default.adapter.v"], own["7.tunerkit.default.copy.bias"]]
    with pytest.warns(tunerkit.TunerkitWarning, match="adapter 'default' trains") as told:
        tunerkit.attach(model, torch.optim.SGD(held, lr=0.1), total_steps=5)
    (text,) = (str(each.message) for each in told)
    assert "do not change: adapter.v at 1, 2, 3, 4, 5 and 1 more; copy.weight at 7; build it from" in text
    tunerkit.unwrap(model)
    wrapped(method, model=model, targets="re:[0-6]", train_modules=["7"])
    with silent(Warning):
        tunerkit.attach(model, sgd(model), total_steps=5)


def test_a_head_alone_does_not_train_an_adapter_that_needs_steps() -> None:
    """A pruning method scores its adapters by their training; with other methods a head may be trained alone."""
    for method, refused in (("noting-stepper", True), ("plain", False)):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        model = wrapped(method, model=layers, train_modules=["1"])
        head = torch.optim.SGD([p for n, p in model.named_parameters() if ".copy." in n], lr=0.1)
        if refused:
            assert "has none of the parameters of adapter 'default', which is in 1 modules" in refusal(model, head)
        else:
            with pytest.warns(tunerkit.TunerkitWarning, match=r"adapter\.v at 0;"):
                tunerkit.attach(model, head)


@pytest.mark.parametrize(("options", "is_told"), [({}, True), ({"eps": 1e-4}, False)], ids=["default", "1e-4"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_epsilon_that_is_0_in_float16_is_told_before_it_breaks_the_weights(
    options: dict[str, Any], is_told: bool, dtype: str
) -> None:
    """Adam divides by a root that is 0 for small gradients in float16; what the warning advises keeps them finite."""
    model = wrapped("plain", adapter_dtype=dtype)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, **options)
    expected = is_told and dtype == "float16"
    texts = told(lambda: tunerkit.attach(model, optimizer))
    assert ["eps=1e-08 rounds to 0: steps divide by 0" in text for text in texts] == [True] * expected
    backward(model, 1e-4)
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in trainable(model)) is not expected


@pytest.mark.parametrize("fresh", [False, True])
def test_what_the_refusal_of_a_second_optimizer_advises_works(*, fresh: bool) -> None:
    """Wrapping again alone is an error, since the name is taken: delete the first optimizer, or the adapter."""
    model, optimizer = attached(total_steps=5)
    backward(model)
    optimizer.step()
    assert "attached to an optimizer already" in refusal(model, optimizer, total_steps=5)
    text = refusal(model, sgd(model), total_steps=5)
    assert "attached to an optimizer already" in text
    assert "delete the old one and all references to it" in text
    assert "call tunerkit.delete(model, 'default') and wrap again" in text
    if fresh:
        tunerkit.delete(model, "default")
        wrapped(model=model)
        tunerkit.attach(model, sgd(model), total_steps=5)
    else:
        del optimizer
        gc.collect()
        optimizer = sgd(model)
        with pytest.warns(tunerkit.TunerkitWarning, match="restarts at step 0"):
            tunerkit.attach(model, optimizer, total_steps=5)
        assert optimizer_of(tunerkit.tuner(model)) is optimizer


def test_stepping_while_merged_raises_and_moves_nothing() -> None:
    """Training a merged model has no effect; after unmerge training continues."""
    model, optimizer = attached(total_steps=5)
    backward(model)
    before = [p.detach().clone() for p in trainable(model)]
    tunerkit.merge(model)
    with pytest.raises(tunerkit.errors.StepError, match=r"tunerkit\.unmerge"):
        optimizer.step()
    with pytest.raises(tunerkit.errors.StepError, match="merged"):
        optimizer.step(lambda: 0.0)
    assert all(torch.equal(p, old) for p, old in zip(trainable(model), before, strict=True))
    assert names(model) == []
    tunerkit.unmerge(model)
    optimizer.step()
    assert names(model) == per_step(1)


def test_steps_beyond_the_total_trigger_one_warning() -> None:
    """Step 3 of 2 triggers a warning, step 4 does not, and the method gets both steps."""
    model, optimizer = attached(total_steps=2)
    backward(model)
    with silent(Warning):
        optimizer.step()
        optimizer.step()
    with pytest.warns(tunerkit.TunerkitWarning, match="total_steps=2"):
        optimizer.step()
    with silent(Warning):
        optimizer.step()
    assert names(model) == per_step(4)


def test_a_method_that_needs_no_steps_attaches_as_a_no_op() -> None:
    """Attaching is allowed, even without a total: training is bit-identical, and steps are counted."""
    weights = []
    for attached in (False, True):
        model = wrapped("plain")
        optimizer = sgd(model, momentum=0.9)
        if attached:
            tunerkit.attach(model, optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
        weights.append(trainable(model)[0].detach())
        assert tunerkit.tuner(model).steps == (5 if attached else 0)
    assert torch.equal(*weights)
    assert weights[0].abs().min() > 0


def test_one_call_attaches_all_adapters_and_a_name_only_one() -> None:
    """Each adapter has a separate count."""
    model = wrapped("plain", "other", wrapped())
    optimizer = sgd(model)
    tunerkit.attach(model, optimizer, total_steps=5, adapter="other")
    assert [is_attached(tuner) for tuner in tuners_of(model).values()] == [False, True]
    tunerkit.attach(model, optimizer, total_steps=5, adapter="default")
    both = wrapped("plain", "other", wrapped())
    optimizer = sgd(both)
    tunerkit.attach(both, optimizer, total_steps=5)
    backward(both)
    optimizer.step()
    assert [tuner.steps for tuner in tuners_of(both).values()] == [1, 1]


@pytest.mark.parametrize("reason", ["attached", "missing", "total", "start"])
def test_attach_changes_nothing_when_one_of_several_adapters_is_refused(reason: str) -> None:
    """If the second adapter is rejected for any reason, the first is not attached, and the optimizer has no hook."""
    settings_of: dict[str, dict[str, Any]] = {"total": {"total_steps": 7}, "start": {"refuses": True}}
    second = settings_of.get(reason, {})
    model = wrapped("noting-stepper", "second", wrapped(), **second)
    first, other = tuners_of(model).values()
    optimizer = torch.optim.SGD([*first.parameters(), *(() if reason == "missing" else other.parameters())], lr=0.1)
    another = sgd(model)
    if reason == "attached":
        tunerkit.attach(model, another, total_steps=5, adapter="second")
    with pytest.raises((tunerkit.errors.StepError, tunerkit.errors.ConfigError)):
        tunerkit.attach(model, optimizer, total_steps=5)
    assert not is_attached(first)
    assert (first.state, first.total_steps) == (None, None)
    for parameter in trainable(model):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert (first.steps, other.steps) == (0, 0)


def test_of_several_adapters_the_one_left_to_attach_is_named() -> None:
    """To attach a second adapter to another optimizer you must name it: the message says so."""
    model = wrapped()
    first = sgd(model)
    tunerkit.attach(model, first, total_steps=5)
    wrapped(adapter="second", model=model)
    own = torch.optim.SGD(tunerkit.tuner(model, "second").parameters(), lr=0.1)
    assert refusal(model, own, total_steps=5).endswith(
        "wrap again for a new run, or pass adapter='second' to attach another"
    )
    tunerkit.attach(model, own, total_steps=5, adapter="second")
    assert refusal(model, own, total_steps=5).endswith("wrap again for a new run")


def test_a_restarted_schedule_triggers_a_warning() -> None:
    """A second optimizer for a method that needs steps triggers a warning that says how to resume; others get none."""
    for method in ("noting-stepper", "plain"):
        model = wrapped(method)
        optimizer = sgd(model)
        tunerkit.attach(model, optimizer, total_steps=5)
        backward(model)
        optimizer.step()
        twin = copy.deepcopy(model)
        texts = told(lambda: tunerkit.attach(twin, sgd(twin), total_steps=5))  # noqa: B023  # called at once
        assert len(texts) == (method == "noting-stepper")
        restart = "restarts at step 0 for adapter 'default' after 1 steps"
        assert all(restart in text and "load_state" in text for text in texts)


def test_a_frozen_adapter_is_left_alone_and_refused_by_name() -> None:
    """An adapter that was loaded only for inference, along with a trained one, must not be driven."""
    model = wrapped("noting-stepper", "second", wrapped())
    frozen, training = tuners_of(model).values()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    optimizer = sgd(model)
    tunerkit.attach(model, optimizer, total_steps=5)
    assert [is_attached(tuner) for tuner in (frozen, training)] == [False, True]
    words = refusal(model, optimizer, total_steps=5, adapter="default")
    assert "tunerkit.thaw(model, 'default')" in words
    assert "trainable=True" in words


def test_unwrap_detaches() -> None:
    """The optimizer that drove an unwrapped model continues without our hooks."""
    model, optimizer = attached(total_steps=5)
    tuner, noted = tunerkit.tuner(model), calls(model)
    backward(model)
    tunerkit.unwrap(model)
    optimizer.step()
    assert noted == []
    assert tuner.steps == 0
    assert not is_attached(tuner)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_an_attached_model_is_freed_with_its_optimizer() -> None:
    """No global state keeps a model alive: a search over many runs must not fill the memory."""
    model, optimizer = attached(total_steps=5)
    left = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert left() is None
