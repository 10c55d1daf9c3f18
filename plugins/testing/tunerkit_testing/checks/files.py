"""Checks of files: what was saved is loaded, also with another rank, and a training that was saved is resumed."""

import copy
from collections.abc import Collection, Sequence
from contextlib import suppress
from unittest import SkipTest

import attrs
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit import hooks, injection
from tunerkit.errors import ConfigError, TargetError, TunerkitError
from tunerkit.layers import Adapter
from tunerkit.plugin import State
from tunerkit_testing.blaming import changed, values_in
from tunerkit_testing.cases import STEPS, Trial, assert_same, optimizer_of
from tunerkit_testing.checks.probing import (
    calls_of,
    copy_state,
    filled,
    layers_of,
    outliving,
    own_parameters,
    own_parts,
    saved,
    some,
    steps_,
    trained_parameters,
    unregistered,
)
from tunerkit_testing.checks.training import STEP_HOOKS, assert_held, ended, not_in
from tunerkit_testing.small import trainable

_ROUNDING = 1e-5  # of what an adapter adds in fp64: it may compute in fp32
_HINT = "keep everything that forward needs in parameters and persistent buffers, or in the config"


def check_saves_and_loads(trial: Trial) -> None:
    """A new base model with the saved adapter has the trained model's output and ranks, and can be saved again."""
    model = ended(trial)
    path = tunerkit.save(model, trial.folder / "out")
    loaded = tunerkit.load(trial.build(), path).eval()
    assert_same(trial.output(loaded), trial.output(model), "loaded against trained", _HINT + _unsaved(model, loaded))
    assert tunerkit.tuner(loaded).ranks() == tunerkit.tuner(model).ranks(), f"the ranks are others once loaded; {_HINT}"
    assert not any(p.requires_grad for p in loaded.parameters()), "a loaded adapter is trained; set no requires_grad"
    tunerkit.save(loaded, trial.folder / "again")
    again = tunerkit.load(trial.build(), trial.folder / "again").eval()
    assert torch.equal(trial.output(again), trial.output(loaded)), f"saved twice, the output is another; {_HINT}"


def _unsaved(model: nn.Module, loaded: nn.Module) -> str:
    """Return what to add to a message: what adapters hold that no file has, and that is another once loaded."""
    before, after = _beside_the_state(model), _beside_the_state(loaded)
    others = changed(before, after)
    if not others:
        return ""

    def told(name: str) -> str:
        old = before.get(name)
        return name if isinstance(old, Tensor) else f"{name} ({old!r:.40}, now {after.get(name)!r:.40})"

    return (
        f". Once loaded these are others, and no file has them: {some([*map(told, others)])}. A buffer with "
        "persistent=False must follow from the config alone, and with `loading` as many numbers be drawn. An attribute "
        "must be computed from the config as it is and as its settled() returns it, alike: that one is saved"
    )


def _beside_the_state(model: nn.Module) -> dict[str, object]:
    found: dict[str, object] = {}
    for path, part in own_parts(model).items():
        saved = part.state_dict()
        held = [*unregistered(part), *((name, each) for name, each in part.named_buffers() if name not in saved)]
        found.update({f"{name} of the adapter at {path!r}": value for name, value in held})
    return found


def check_state_is_all(trial: Trial) -> None:
    """With the same tensors on the same base, two adapters add the same, also if one was built on other weights.

    The weights of a base are rounded to bf16 after one adapter is built, and before the other one is.
    """
    wide = trial.in_fp64()
    early = filled(wide)
    tuner = tunerkit.tuner(early)
    _rounded(early, {id(p) for p in (*tuner.parameters(), *own_parameters(tuner).values())})
    late = wide.on(attrs.evolve(wide.case, build=lambda: _rounded(wide.build()))).wrapped().eval()
    copy_state(early, late)
    expected = _added(early, wide)
    for path, found in _added(late, wide).items():
        worst = float((found - expected[path]).abs().max())
        assert worst <= _ROUNDING * float(expected[path].abs().max()), (
            f"{path}: with the same tensors on the same base, two adapters add what differs by {worst:.3g}; one was "
            "built on the base's weights, and the other one before they were rounded to bf16. Save what is computed "
            "from the base when an adapter is built, as a persistent buffer or with requires_grad=False, or compute it "
            "from the base in each forward"
        )


@torch.no_grad()
def _added(model: nn.Module, trial: Trial) -> dict[str, Tensor]:
    """Return what each adapter adds to its target's output, for the input that the base model gives it."""
    found = {}
    for call in calls_of(model, trial):
        with tunerkit.disabled(model):
            before = call.run()
        found[call.path] = call.run() - before
    return found


@torch.no_grad()
def _rounded(model: nn.Module, kept: Collection[int] = ()) -> nn.Module:
    """Round the values of a model's parameters in place, but for those with the ids in ``kept``."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in kept:
            parameter.copy_(parameter.bfloat16())
    return model


def check_other_rank_setting(trial: Trial) -> None:
    """With another value of the setting ``rank``, the file is loaded all the same: it has its config with it."""
    fields = {field.name: field for field in attrs.fields(hooks.registry.get(trial.method).config)}
    if "rank" not in fields or fields["rank"].type is not int:
        raise SkipTest("the method has no setting named rank")
    model = _with_other_rank(trial)
    path = saved(model, trial.folder)
    assert_same(
        trial.output(tunerkit.load(trial.build(), path).eval()), trial.output(model), "another rank, loaded", _HINT
    )


def _with_other_rank(trial: Trial) -> nn.Module:
    """Build a model with a rank that the method accepts: some allow even ones alone, or those that divide features."""
    rank: int = tunerkit.unstructure(trial.structured())["rank"]
    for other in (rank + 1, rank + 2, 2 * rank, rank // 2):
        with suppress(ConfigError, TargetError):
            return filled(trial.but(rank=other))
    raise SkipTest(f"the method accepts no rank close to {rank}")


def check_other_ranks_load(trial: Trial) -> None:
    """Adapters with ``rank_dims`` take the tensors of a file with fewer triplets than their config says."""
    model = filled(trial)
    adapters = [adapter for adapter in tunerkit.tuner(model).adapters().values() if rank_of(adapter) > 1]
    if not adapters:
        raise SkipTest("no adapter declares rank_dims and has a rank above 1")
    for adapter in adapters:
        adapter.load_state_dict(cut(adapter))
    path = saved(model, trial.folder)
    loaded = tunerkit.load(trial.build(), path).eval()
    hint = "list every tensor with a rank's dimension in rank_dims"
    assert_same(trial.output(loaded), trial.output(model), "loaded with other ranks", hint)
    assert tunerkit.tuner(loaded).ranks() == tunerkit.tuner(model).ranks(), f"the ranks are others once loaded; {hint}"


def rank_of(adapter: Adapter) -> int:
    """Return the size of the dimension that is the rank, masked triplets included; 0 if none is declared."""
    state = adapter.state_dict()
    return next((state[name].shape[dim] for name, dim in adapter.rank_dims.items()), 0)


def cut(adapter: Adapter) -> dict[str, Tensor]:
    """Return an adapter's state without its last triplet, also in what it saves beside its tensors, such as a mask."""
    state, rank = adapter.state_dict(), rank_of(adapter)
    for name, dim in {**adapter.rank_dims, **dict.fromkeys(cut_beside(adapter), 0)}.items():
        state[name] = state[name].narrow(dim, 0, rank - 1).clone()
    return state


def cut_beside(adapter: Adapter) -> list[str]:
    """Return what an adapter saves for each triplet beside its tensors, such as a mask."""
    own, rank = {*dict(adapter.named_parameters()), *dict(adapter.named_buffers())}, rank_of(adapter)
    return [name for name, each in adapter.state_dict().items() if name not in own and each.shape == (rank,)]


# --- Resuming ---------------------------------------------------------------------------------------------------------


def check_resumes(trial: Trial) -> None:
    """Saved in the middle and resumed in a new model, a training ends bit for bit as without the interruption."""
    _assert_resumes(trial, STEPS // 2, STEPS)


def check_resumes_late(trial: Trial) -> None:
    """On one layer, a training of 200 steps that is saved after 8 ends as without the interruption, bit for bit.

    What steps keep may have an effect only after many of them.
    """
    if not any(hooks.implements(hook, trial.method) for hook in STEP_HOOKS):
        raise SkipTest("the method does nothing in steps: it implements no hook of them")
    _assert_resumes(next(filter(_trains, layers_of(trial))), 8, 200)


def _trains(layer: Trial) -> bool:
    with suppress(TunerkitError):
        return bool(trained_parameters(tunerkit.tuner(layer.wrapped())))
    return False


def _assert_resumes(trial: Trial, half: int, steps: int) -> None:
    model = trial.wrapped()
    optimizer = optimizer_of(trainable(model), trial.lr)
    tunerkit.attach(model, optimizer, total_steps=steps)
    steps_(model, trial, optimizer, range(half))
    path = tunerkit.save(model, trial.folder / "adapter")
    tunerkit.save_state(model, trial.folder / "adapter")
    saved = copy.deepcopy(injection.training_state(tunerkit.tuner(model)))
    kept, remembered = copy.deepcopy(optimizer.state_dict()), _remembered(model)
    steps_(model, trial, optimizer, range(half, steps))
    assert_held(not_in(optimizer, tunerkit.tuner(model)), steps)
    again = tunerkit.load(trial.build(), path, trainable=True)
    fresh = optimizer_of(trainable(again), trial.lr)
    fresh.load_state_dict(kept)
    tunerkit.attach(again, fresh, total_steps=steps)
    tunerkit.load_state(again, trial.folder / "adapter")
    _assert_same_state(injection.training_state(tunerkit.tuner(again)), saved)
    lost = changed(remembered, _remembered(again))
    steps_(again, trial, fresh, range(half, steps))
    _assert_same_end(again, model, lost)


def _remembered(model: nn.Module) -> dict[str, object]:
    """Copy what steps may have kept, by name: in the tuner, in adapters, and elsewhere."""
    tuner = tunerkit.tuner(model)
    found = dict(values_in(tuner.state, "tuner.state"))
    for path, part in own_parts(model).items():
        found.update({f"{name} of the adapter at {path!r}": value for name, value in unregistered(part)})
    return {**outliving(model), **found}


def _assert_same_state(found: State, saved: State) -> None:
    """What was restored must be what was saved, also where the rest of a short training does not depend on it."""
    values = [name for name, value in saved.values.items() if found.values.get(name) != value]
    tensors = [
        name
        for name, tensor in saved.tensors.items()
        if name not in found.tensors or not torch.equal(found.tensors[name].cpu(), tensor.cpu())
    ]
    wrong = [*values, *tensors]
    assert not wrong, (
        f"after load_state, tunerkit_state returns other values than were saved: {', '.join(wrong[:5])}; set "
        "everything that it returns again in tunerkit_restore"
    )


def _assert_same_end(found: nn.Module, expected: nn.Module, lost: Sequence[str]) -> None:
    hint = (
        "return everything that later steps depend on from tunerkit_state, and set it again in tunerkit_restore: "
        "averages, masks, counters. What forward needs belongs into parameters and buffers"
    ) + (f". After load_state these were others than at save_state: {some(lost)}" if lost else "")
    one, other = tunerkit.tuner(found), tunerkit.tuner(expected)
    assert one.steps == other.steps, f"resumed, the training has {one.steps} steps instead of {other.steps}; {hint}"
    assert one.ranks() == other.ranks(), f"resumed, the ranks are others at the end; {hint}"
    assert one.history == other.history, f"resumed, the history of the ranks is another; {hint}"
    twin = dict(one.named_parameters())
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, twin[name]), (
            f"resumed, {name} differs at the end by {float((parameter - twin[name]).detach().abs().max()):.3g}; {hint}"
        )
