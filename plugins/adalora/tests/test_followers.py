"""An average of the model, or a second optimizer, beside a shrinking adapter: no shape error, nothing silent."""

import gc
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tunerkit
from tunerkit_adalora import followers
from tunerkit_testing.small import TARGETS, loss_of, net, train, trainable

TOTAL = 12
SETTINGS: dict[str, Any] = {
    "target_rank": 2, "init_rank": 4, "alpha": 4, "exact_svd": False, "t_init": 2, "t_final": 6, "delta_t": 1,
    "targets": TARGETS,
}  # fmt: skip
DECAY = 0.5


def wrapped(**changes: Any) -> nn.Module:
    return tunerkit.wrap(net(), "adalora", SETTINGS | changes, seed=0)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def sizes(model: nn.Module) -> set[int]:
    return {len(adapter.get_parameter("lam")) for adapter in tunerkit.tuner(model).adapters().values()}


def test_an_average_beside_a_shrinking_adapter_follows_masks() -> None:
    """It averages what `shrink=False` trains, bit for bit, to the end; one warning says why the shapes stay."""
    ends = []
    for shrink in (True, False):
        model = wrapped(shrink=shrink)
        optimizer = adamw(trainable(model))
        tunerkit.attach(model, optimizer, total_steps=TOTAL)
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", tunerkit.TunerkitWarning)
            for _ in range(TOTAL):
                train(model, optimizer, 1)
                averaged.update_parameters(model)
        assert [str(each.message) for each in told] == [_KEPT] * shrink
        ends.append([*model.parameters(), *averaged.parameters()])
        del averaged
        gc.collect()
    assert all(map(torch.equal, *ends))


_KEPT = (
    "adapter 'default': masked triplets stay in memory, still masked, until training ends: an AveragedModel "
    "averages them, and its copy keeps their shapes"
)


class Keeping(torch.optim.SGD):
    """Its state is none of torch's."""

    def __init__(self, parameters: Any, state: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.state = state


@pytest.mark.parametrize("state", [list, dict], ids=["a list", "tensors alone"])
def test_an_optimizer_with_a_state_of_its_own_kind_stops_no_training(state: type) -> None:
    """What derives from torch's class may keep anything; a tensor of the weights' shape keeps the shapes."""
    model = wrapped()
    optimizer = adamw(trainable(model))
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    held = [] if state is list else {weight: torch.zeros_like(weight) for weight in trainable(model)}
    other = Keeping(trainable(model), held)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", tunerkit.TunerkitWarning)
        train(model, optimizer, TOTAL)
    assert ["Keeping" in str(each.message) for each in told] == [True] * (state is dict)
    assert other.state is held


@pytest.mark.parametrize("name", ["default", "other"])
def test_an_average_of_another_model_keeps_nothing(name: str) -> None:
    """Nor one without adapters: it has no copy of this one."""
    model = wrapped()
    twin = tunerkit.wrap(net(), "adalora", SETTINGS | {"gamma": 0.1 * (name == "default")}, adapter=name, seed=0)
    others = [AveragedModel(twin), AveragedModel(net())]
    optimizer = adamw(trainable(model))
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    train(model, optimizer, TOTAL)
    assert max(sizes(model)) < 4
    assert others


def test_an_average_across_re_parametrised_triplets_is_warned_of_at_the_first_step() -> None:
    """P, Λ and Q are others after each allocation. The warning says from when on an average means something."""
    model = wrapped(exact_svd=True)
    optimizer = adamw(trainable(model))
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    averaged = AveragedModel(model)
    with pytest.warns(tunerkit.TunerkitWarning, match=r"exact_svd=False, or begin to average after step 6, the"):
        train(model, optimizer, 1)
    assert averaged.module is not model


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_second_optimizer_that_keeps_a_state_keeps_the_shapes(momentum: float) -> None:
    """Its state would not fit shrunk weights. One without a state steps shrunk ones."""
    model = wrapped()
    optimizer, second = adamw(trainable(model)), torch.optim.SGD(trainable(model), lr=1e-3, momentum=momentum)
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", tunerkit.TunerkitWarning)
        for _ in range(TOTAL):
            loss_of(model).backward()
            for each in (optimizer, second):
                each.step()
            model.zero_grad()
    assert (sizes(model) == {4}) == bool(momentum)
    assert [r"another optimizer (SGD) has state for them" in str(each.message) for each in told] == [True] * bool(
        momentum
    )


def test_lambda_in_a_second_optimizer_is_refused_at_attach() -> None:
    """It would move λ after the mask. A single optimizer without some λ triggers the warning of missing parameters."""
    model = wrapped()
    first, *rest = tunerkit.tuner(model).adapters().values()
    one = adamw(first.parameters())
    other = adamw([p for adapter in rest for p in adapter.parameters()])
    refused = pytest.raises(tunerkit.errors.StepError, match=r"another optimizer .* λ of adapter 'default' at '.*'")
    with refused, pytest.warns(tunerkit.TunerkitWarning, match="lacks parameters"):
        tunerkit.attach(model, one, total_steps=TOTAL)
    other.itself = other  # type: ignore[attr-defined]  # as a scheduler holds its optimizer
    del other
    with pytest.warns(tunerkit.TunerkitWarning, match="lacks parameters that adapter"):
        tunerkit.attach(model, one, total_steps=TOTAL)


@pytest.mark.parametrize("first", [True, False])
def test_process_0_decides_for_all(first: bool) -> None:
    """An average is often in one process alone, and shapes must change in all or none."""
    model = wrapped()
    tuner = tunerkit.tuner(model)

    class InGroup:
        name, config, engine, progress = tuner.name, tuner.config, SimpleNamespace(is_shared=True), tuner.progress

        def agree_(self, tensors: list[torch.Tensor], what: str) -> None:
            tensors[0].fill_(first)

    reason = followers.follower(InGroup(), trainable(model), torch.ones(1))  # type: ignore[arg-type]
    assert reason == ("an object in process 0 relies on their shapes" if first else None)
