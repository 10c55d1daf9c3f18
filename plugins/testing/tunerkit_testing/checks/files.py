"""Checks of files: what was saved is loaded, also with another rank."""

from collections.abc import Collection
from contextlib import suppress
from unittest import SkipTest

import attrs
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit import hooks
from tunerkit.errors import ConfigError, TargetError
from tunerkit.layers import Adapter
from tunerkit_testing.blaming import changed
from tunerkit_testing.cases import Trial, assert_same
from tunerkit_testing.checks.probing import (
    calls_of,
    copy_state,
    filled,
    own_parameters,
    own_parts,
    saved,
    some,
    unregistered,
)
from tunerkit_testing.checks.training import ended

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
