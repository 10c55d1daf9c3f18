"""Checks of a training: what gets gradients, what moves, and what stays."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final
from unittest import SkipTest

import attrs
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit import hooks
from tunerkit.errors import PluginError, TunerkitError
from tunerkit.plugin import Tuner
from tunerkit_testing.blaming import told
from tunerkit_testing.cases import STEPS, Trial, assert_base_untouched, optimizer_of, train
from tunerkit_testing.checks.probing import own_parameters, seeded, some, trained_parameters, values_of, without_copies

_LEAST_FALL = 1e-5  # a share of the first loss. Some start slowly: AdaLoRA as in its paper falls by 1.4e-4 on BERT

STEP_HOOKS: Final = (hooks.specs.tunerkit_before_step, hooks.specs.tunerkit_after_step)
_SCALE = 1024.0


@attrs.define(eq=False)
class Seen:
    """What a training of the method's own parameters showed, each by name.

    Attributes:
        model: The model after the training.
        starts: The values of the trained parameters at the start.
        ends: Their values at the end; a parameter may have another shape by then.
        missing: Those that had no gradient in a step.
        reached: Those whose gradient was not 0 in some step.
        losses: The loss before each step.
        cut: Whether the loss has no gradient at all; the training ends there.
        lost: Those at the end that the optimizer does not hold.
    """

    model: nn.Module
    starts: dict[str, Tensor]
    ends: dict[str, Tensor]
    missing: set[str]
    reached: set[str]
    losses: list[float]
    cut: bool = False
    lost: Sequence[str] = ()


def _observed(trial: Trial) -> Seen:
    """Train the method's own parameters, without the modules that are trained in full, which would hide much."""
    model = without_copies(trial)
    tuner = tunerkit.tuner(model)
    own = trained_parameters(tuner)
    seen = Seen(model, values_of(own), {}, set(), set(), [])
    # As a GradScaler has it: smaller gradients than 6e-8 are 0 in fp16.
    scale = _SCALE if any(parameter.dtype == torch.float16 for parameter in own.values()) else 1.0
    optimizer = optimizer_of(own.values(), trial.lr)
    tunerkit.attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = seeded(trial.loss, model, step)
        seen.losses.append(float(loss.detach()))
        if not loss.requires_grad:
            seen.cut = True
            break
        (loss * scale).backward()
        for name, parameter in trained_parameters(tuner).items():
            if parameter.grad is None and parameter.numel():
                seen.missing.add(name)
            elif parameter.grad is not None and bool(parameter.grad.count_nonzero()):
                seen.reached.add(name)
        optimizer.step()
    seen.ends.update(values_of(trained_parameters(tuner)))
    seen.lost = not_in(optimizer, tuner)
    return seen


def not_in(optimizer: torch.optim.Optimizer, tuner: Tuner) -> list[str]:
    """Return the names of the method's trained parameters that an optimizer does not hold."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [name for name, parameter in trained_parameters(tuner).items() if id(parameter) not in held]


def assert_held(lost: Sequence[str], steps: int) -> None:
    """Assert that no parameter is trained that an optimizer does not hold."""
    assert not lost, (
        f"after {steps} steps {lost[0]} is another nn.Parameter than the optimizer was given, so no step moves it; "
        "write new values into the one that is there, by copy_(); tunerkit.plugin.shrink_ and grow_ do it for those of "
        "another size"
    )


def _few(names: set[str], of: Mapping[str, Tensor]) -> str:
    return f"{len(names)} of {len(of)} trained tensors ({some(sorted(names))})"


def check_something_trains(trial: Trial) -> None:
    """Some parameter of the adapters, or of the module that they share, is trained."""
    model = trial.wrapped()
    tuner = tunerkit.tuner(model)
    assert trained_parameters(tuner), (
        "no parameter of the adapters is trained; build at least one nn.Parameter without requires_grad=False"
    )


def check_steps_run(trial: Trial) -> None:
    """A short training runs, with all that the method's hooks do in its steps."""
    try:
        trial.once(_observed)
    except PluginError:
        raise
    except Exception as error:
        raise AssertionError(f"a training of {STEPS} steps raised {told(error)}") from error


def check_only_the_adapter_trains(trial: Trial) -> None:
    """Before and after a training, the parameters with ``requires_grad`` are the tuner's, and none of the base."""
    ended = trial.once(full_training)
    wrong = ended.wrong or _of_the_base(ended.model)
    assert not wrong, f"{', '.join(wrong[:3])} of the base would be trained; do not set requires_grad in a hook"


@attrs.frozen(eq=False)
class Ended:
    """A model after a training with all that the case trains, and what was seen before.

    Attributes:
        model: The model.
        losses: The loss before each step.
        wrong: Parameters of the base that required a gradient.
        fixed: The values of the method's parameters that are not trained.
        counts_ranks: Whether the budget was the sum of the ranks: it may count something else, such as parameters.
    """

    model: nn.Module
    losses: list[float]
    wrong: list[str]
    fixed: dict[str, Tensor]
    counts_ranks: bool


def full_training(trial: Trial) -> Ended:
    """Train all that the case trains. The result is for `remembered`."""
    model = trial.wrapped()
    tuner = tunerkit.tuner(model)
    own = own_parameters(tuner)
    fixed = values_of({name: parameter for name, parameter in own.items() if not parameter.requires_grad})
    wrong, counts_ranks = _of_the_base(model), sum(tuner.ranks().values()) == tuner.budget()
    return Ended(model, train(model, trial.case), wrong, fixed, counts_ranks)


def ended(trial: Trial) -> nn.Module:
    """Return a model after a training with all that the case trains, in eval mode. Other checks use it too."""
    return trial.once(full_training).model.eval()


def _of_the_base(model: nn.Module) -> list[str]:
    own = {id(parameter) for parameter in tunerkit.tuner(model).parameters()}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]


def check_gradients_reach_every_tensor(trial: Trial) -> None:
    """In every step each trained tensor of the method has a gradient."""
    seen = trial.once(_observed)
    assert not seen.cut, (
        "the loss has no gradient for any parameter of the adapters; compute forward from the parameters, without "
        "detach(), .data or no_grad()"
    )
    assert not seen.missing, (
        f"{_few(seen.missing, seen.starts)} have no gradient; compute forward from every parameter without detaching "
        "it, and build those that are not trained with requires_grad=False"
    )


def check_every_tensor_moves(trial: Trial) -> None:
    """In a short training each trained tensor of the method changes, by the optimizer or by the method itself.

    At the end, the optimizer still holds each of them.
    """
    seen = trial.once(_observed)
    assert_held(seen.lost, STEPS)
    still = {
        name
        for name, start in seen.starts.items()
        if start.numel() and start.shape == seen.ends[name].shape and torch.equal(start, seen.ends[name])
    }
    assert not still, (
        f"{_few(still, seen.starts)} did not change in {STEPS} steps"
        + ("" if still & seen.reached else ", and their gradients are 0")
        + "; if all factors of a product start at 0, none of them ever gets a gradient: let one start at random values"
    )


def check_loss_falls(trial: Trial) -> str:
    """A short training of the method's own parameters lowers the loss beyond rounding, and changes the eval output."""
    seen = trial.once(_observed)
    first, last = seen.losses[0], seen.losses[-1]
    assert _falls(seen), (
        f"the loss goes from {first:.6g} to {last:.6g} in {STEPS} steps at a learning rate of {trial.lr}; check the "
        "sign of what forward adds and its scale, or take a larger rate: --lr, or cases=[attrs.evolve(case, lr=...)]"
    )
    before = trial.output(trial.build().eval())
    assert not torch.equal(trial.output(seen.model.eval()), before), (
        "training lowers the loss and does not change the output in eval mode; add the same there, except for dropout"
    )
    return f"{first:.4g} to {last:.4g}"


def _falls(seen: Seen) -> bool:
    return seen.losses[0] - seen.losses[-1] > _LEAST_FALL * abs(seen.losses[0])


def check_trains_beside_copies(trial: Trial) -> None:
    """With all that the case trains, such as a new head, the loss falls.

    The method's hooks change neither gradients nor values of what is trained in full, nor of biases, nor a learning
    rate, and a target may have no gradient in a step.
    """
    for name in trial.once(_meddling):
        assert name.startswith(_OWN), (
            f"a step hook changes {name}, which is not the method's; change and penalise only parameters of "
            "tuner.adapters() and of what they share: tuner.parameters() has biases and trained modules too, and "
            "learning rates are the user's"
        )
    losses = trial.once(full_training).losses
    # Where the loss does not fall without the copies either, loss_falls says so.
    assert losses[-1] < losses[0] or not _falls(trial.once(_observed)), (
        f"the loss goes from {losses[0]:.4g} to {losses[-1]:.4g}; leave modules that are trained in full to the "
        "optimizer, and change only parameters of tuner.adapters() in a step hook"
    )


_OWN = "the adapters' "


def _meddling(trial: Trial) -> list[str]:
    """Return the gradients, values and learning rates that hooks change in steps in which the optimizer changes none.

    In the last of these steps the first target has no gradient, as where no batch used it.
    """
    if not any(hooks.implements(hook, trial.method) for hook in STEP_HOOKS):
        return []
    model, generator, found = _with_biases(trial), torch.Generator().manual_seed(3), dict[str, None]()
    tuner = tunerkit.tuner(model)
    optimizer = torch.optim.SGD([p for p in tuner.parameters() if p.requires_grad], lr=0.0)
    tunerkit.attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        trained = {name: p for name, p in tuner.named_parameters() if p.requires_grad}
        own = {id(parameter) for parameter in own_parameters(tuner).values()}
        for parameter in trained.values():
            parameter.grad = 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter)
        if step == STEPS - 1:
            next(iter(tuner.adapters().values())).zero_grad()
        before = {name: (p.detach().clone(), p.grad.clone()) for name, p in trained.items() if p.grad is not None}
        _step(optimizer, step)
        for name, (value, gradient) in before.items():
            parameter, whose = trained[name], _OWN * (id(trained[name]) in own)
            if parameter.grad is not None and not torch.equal(parameter.grad, gradient):
                found[f"{whose}gradient of {name}"] = None
            if not torch.equal(parameter, value):
                found[f"{whose}{name}"] = None
        if any(group["lr"] for group in optimizer.param_groups):
            found["the optimizer's lr"] = None
    return [*found]


def _step(optimizer: torch.optim.Optimizer, step: int) -> None:
    try:
        optimizer.step()
    except Exception as error:
        if step < STEPS - 1:
            raise
        raise AssertionError(
            f"a step hook raised {told(error)} in a step in which a target has no gradient, as where no batch used it; "
            "look whether parameter.grad is None"
        ) from error


def check_needs_steps(trial: Trial) -> None:
    """A method whose step hooks change gradients or weights declares ``needs_steps``: it needs `tunerkit.attach`."""
    if hooks.registry.get(trial.method).needs_steps:
        return
    changes = [name for name in trial.once(_meddling) if name.startswith(_OWN)]
    assert not changes, (
        f"a step hook changes {changes[0]}, and without tunerkit.attach it is never called: the adapter would be "
        "trained as if the method had no such step, without a word; declare Method(..., needs_steps=True)"
    )


def check_steps_keep_the_base(trial: Trial) -> None:
    """A training changes no tensor of the base."""
    model = trial.once(full_training).model
    assert_base_untouched(
        model, trial.case, "change only parameters of the adapters in a step hook, none of the base layer"
    )


def check_fixed_stays_fixed(trial: Trial) -> None:
    """A parameter that is built with ``requires_grad=False`` gets no gradient and keeps its value."""
    ended = trial.once(full_training)
    if not ended.fixed:
        raise SkipTest("all parameters of the method are trained")
    own = own_parameters(tunerkit.tuner(ended.model))
    for name, before in ended.fixed.items():
        parameter = own[name]
        assert parameter.grad is None, f"{name} is fixed and has a gradient; do not set requires_grad after building"
        assert torch.equal(parameter, before), (
            f"{name} is fixed and changed in training; change it in no step hook, or make it a buffer"
        )


def check_freezing(trial: Trial) -> None:
    """A frozen adapter has no gradient; thawed, exactly what was trained before is trained again."""
    model = trial.wrapped()
    tuner = tunerkit.tuner(model)
    before = set(trained_parameters(tuner))
    tunerkit.freeze(model, tuner.name)
    trial.start_training(model)
    trial.loss(model)
    assert not trained_parameters(tuner), "a frozen adapter has trained parameters; do not set requires_grad in forward"
    tunerkit.thaw(model, tuner.name)
    assert set(trained_parameters(tuner)) == before, (
        "after freeze and thaw other parameters are trained than before; build those that are never trained with "
        "requires_grad=False"
    )


def check_param_groups(trial: Trial) -> None:
    """`tunerkit.param_groups` has each trained parameter once, and an optimizer accepts it.

    Biases and modules that are trained beside the adapters keep the learning rate and the weight decay that are given.
    """
    model = _with_biases(trial)
    groups = tunerkit.param_groups(model, lr=trial.lr)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    expected = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(found) == sorted(expected), (
        f"the groups have {len(found)} parameters, {len(expected)} are trained; return each parameter in one group of "
        "tunerkit_param_groups at most, and none that is fixed"
    )
    own = {id(parameter) for parameter in own_parameters(tunerkit.tuner(model)).values()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) in own or (group["lr"], "weight_decay" in group) == (trial.lr, False), (
                f"{names[id(parameter)]} is trained beside the adapters, and is in a group with lr={group['lr']:g} "
                f"instead of {trial.lr:g}, and weight_decay={group.get('weight_decay')}; name in tunerkit_param_groups "
                "only parameters of tuner.adapters() and of what they share: tuner.parameters() has biases and trained "
                "modules too, whose names may be like the adapters'"
            )
    torch.optim.AdamW(groups)


def _with_biases(trial: Trial) -> nn.Module:
    """Wrap a model and train the targets' biases too, where the method and the model allow that."""
    with suppress(TunerkitError):
        return attrs.evolve(trial, config={"bias": "adapters", **trial.config}).wrapped()
    return trial.wrapped()
