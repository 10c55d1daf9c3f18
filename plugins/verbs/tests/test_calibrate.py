"""Calibrating: statistics of the data set an adapter's start and ranks; everything else stays as it is."""

import copy
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tunerkit
from tests.support.toy_starts import Fitted, FittedPlugin
from tunerkit.plugin import Method, Statistics, StatisticsRequest, Tuner
from tunerkit_testing.registering import registered
from tunerkit_testing.small import LABELS, X, loss_of, net, step, train, trainable
from tunerkit_testing.toy_methods import LowRankConfig, LowRankPlugin

METHODS = ("toy-inputs", "toy-gradients")
BATCHES = [(X[:3],), (X[3:],)]


@pytest.fixture(autouse=True, scope="module")
def _toys() -> Iterator[None]:
    with registered(FittedPlugin(), LowRankPlugin()):
        yield


def wrapped(method: str = "toy-inputs", model: nn.Module | None = None, **config: Any) -> nn.Module:
    return tunerkit.wrap(model or net(), method, {"targets": ["0", "2"], **config}, seed=0)


def loss(output: Tensor, batch: tuple[Tensor]) -> Tensor:
    labels = LABELS[:3] if len(batch[0]) == 3 else LABELS[3:]
    return nn.functional.cross_entropy(output, labels, reduction="sum")


def calibrated(method: str, **config: Any) -> nn.Module:
    return tunerkit.calibrate(wrapped(method, **config), BATCHES, loss=loss)


@pytest.mark.parametrize("method", METHODS)
def test_the_start_and_the_ranks_follow_the_data_and_the_output_stays(method: str) -> None:
    """The model is the same object, adds nothing yet, has ranks that the data explains, and trains."""
    model = wrapped(method)
    assert tunerkit.calibrate(model, BATCHES, loss=loss) is model
    assert torch.equal(model(X), net()(X))
    tuner = tunerkit.tuner(model)
    assert tuner.ranks() == {path: len(adapter.get_parameter("a")) for path, adapter in tuner.adapters().items()}
    (change,) = tuner.history
    assert (change.step, change.ranks) == (0, tuner.ranks())
    assert tuner.progress.calibration == {"batches": 2, "rows": 8}
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
    tunerkit.attach(model, optimizer, total_steps=5)
    losses = train(model, optimizer, 5)
    assert losses[-1] < losses[0]


def test_inputs_in_a_plane_give_rank_2() -> None:
    """The toy takes as many directions as explain 90% of the inputs: those that the data has, at the first layer."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(6, 2, generator=generator)).Q
    data = torch.randn(40, 2, generator=generator) @ plane.T
    model = tunerkit.calibrate(wrapped(), [data])
    adapter = tunerkit.tuner(model).adapters()["0"]
    assert isinstance(adapter, Fitted)
    assert adapter.rank == 2
    a = adapter.a.detach()
    torch.testing.assert_close(a.T @ a, plane @ plane.T, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:.*running statistics")
@pytest.mark.parametrize("method", METHODS)
def test_the_base_its_modes_and_the_random_state_stay_as_they_are(method: str) -> None:
    """Bit for bit, with dropout and batch norm in training mode; no hook and no gradient is left."""

    class Drawing(FittedPlugin):
        @tunerkit.hookimpl
        def tunerkit_methods(self) -> list[Method]:
            found = super().tunerkit_methods()
            return [Method(f"{m.name}-drawing", m.config, statistics=m.statistics) for m in found]

        @tunerkit.hookimpl
        def tunerkit_calibrate(self, tuner: Tuner, statistics: Any) -> dict[str, int]:
            torch.randn(3)
            return tuner.ranks()

    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    with registered(Drawing()):
        model = tunerkit.wrap(model, f"{method}-drawing", {"targets": ["0", "3"]})
        model.eval()(X)  # from the second forward on, hooks that check the first one are gone
        model.train()
        model[2].eval()
        before = copy.deepcopy(model.state_dict())
        modes = [module.training for module in model.modules()]
        hooks = [len(module._forward_hooks) for module in model.modules()]
        random = torch.get_rng_state()
        tunerkit.calibrate(model, BATCHES, loss=loss)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("method", METHODS)
def test_batches_may_be_mappings_tuples_or_single_arguments(method: str) -> None:
    """What a batch is made of does not matter, nor does splitting it: sums are the same."""
    forms: list[list[Any]] = [[{"input": X[:3]}, {"input": X[3:]}], BATCHES, [X[:3], X[3:]], [X]]

    def any_loss(output: Tensor, batch: Any) -> Tensor:
        rows = len(batch["input"]) if isinstance(batch, dict) else len(batch[0] if isinstance(batch, tuple) else batch)
        labels = {3: LABELS[:3], 5: LABELS[3:], 8: LABELS}[rows]
        return nn.functional.cross_entropy(output, labels, reduction="sum")

    found = []
    for batches in forms:
        model = tunerkit.calibrate(wrapped(method), batches, loss=any_loss)
        found.append([adapter.get_parameter("a").detach() for adapter in tunerkit.tuner(model).adapters().values()])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one.abs(), two.abs(), atol=1e-3, rtol=0)  # a direction may be reversed


def test_a_new_head_is_fitted_before_gradients_are_measured() -> None:
    """Gradients through a random head say nothing. The head's copy lowers the loss; the base's own does not change."""
    model = wrapped("toy-gradients", train_modules=["4"])
    before = loss_of(model).item()
    base = {name: t.clone() for name, t in model.state_dict().items() if ".tunerkit." not in name}
    tunerkit.calibrate(model, BATCHES * 20, loss=loss)
    assert loss_of(model).item() < 0.9 * before
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    untouched = wrapped("toy-inputs", train_modules=["4"])
    tunerkit.calibrate(untouched, BATCHES)
    assert loss_of(untouched).item() == before


def test_the_head_of_a_method_that_needs_steps_is_fitted_too(tmp_path: Path) -> None:
    """The fit's own optimizer is not one that forgot to be attached; the result may be saved before any step."""

    class Stepping(FittedPlugin):
        @tunerkit.hookimpl
        def tunerkit_methods(self) -> list[Method]:
            wanted = StatisticsRequest(gradients=2)
            return [Method("toy-stepping", LowRankConfig, needs_steps=True, statistics=wanted)]

    with registered(Stepping()):
        model = wrapped("toy-stepping", train_modules=["4"])
        with pytest.raises(tunerkit.errors.AdapterError, match="was trained for 0 steps"):
            tunerkit.save(model, tmp_path)
        tunerkit.calibrate(model, BATCHES, loss=loss)
        with warnings.catch_warnings():  # to be loaded in several processes
            warnings.simplefilter("error")
            model = tunerkit.load(net(), tunerkit.save(model, tmp_path), trainable=True)
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        tunerkit.attach(model, optimizer, total_steps=2)
        step(model, optimizer)
        assert tunerkit.tuner(model).steps == 1


class Keeping(FittedPlugin):
    """Keeps the statistics, of inputs and of gradients."""

    def __init__(self, **wanted: int) -> None:
        self.wanted = StatisticsRequest(**wanted)
        self.found: dict[str, Statistics] = {}

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method("toy-keeping", config=LowRankConfig, statistics=self.wanted)]

    @tunerkit.hookimpl
    def tunerkit_calibrate(self, statistics: Any) -> None:  # type: ignore[override]
        self.found.update(statistics)


class Checkpointed(nn.Sequential):
    """Runs its first layers, and all of them once more around these, in checkpoints, in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        def first(x: Tensor) -> Tensor:
            return self[2](self[1](self[0](x)))  # type: ignore[no-any-return]

        def whole(x: Tensor) -> Tensor:
            return self[4](self[3](checkpoint(first, x, use_reentrant=False)))  # type: ignore[no-any-return]

        return checkpoint(whole, x, use_reentrant=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("wanted", [{"inputs": 2}, {"gradients": 2}, {"inputs": 2, "gradients": 2}])
def test_what_a_checkpoint_computes_again_is_counted_once(wanted: dict[str, int]) -> None:
    """The statistics are bit-identical to those of the same model without checkpoints."""
    found = []
    for build in (nn.Sequential, Checkpointed):
        with registered(plugin := Keeping(**wanted)):
            tunerkit.calibrate(wrapped("toy-keeping", build(*net()), targets=["0", "2", "4"]), BATCHES, loss=loss)
        found.append(plugin.found)
    for path, expected in found[0].items():
        same = found[1][path]
        assert same.rows == expected.rows == len(X)
        for one, other in ((same.inputs, expected.inputs), (same.gradients, expected.gradients)):
            assert (one is None) == (other is None)
        if same.inputs is not None and expected.inputs is not None:
            assert torch.equal(same.inputs, expected.inputs)
        if same.gradients is not None and expected.gradients is not None:
            assert torch.equal(same.gradients.q, expected.gradients.q)
            assert torch.equal(same.gradients.p, expected.gradients.p)


def test_one_of_several_adapters_is_calibrated() -> None:
    """It is named as everywhere; the other one stays."""
    model = wrapped("toy-inputs", tunerkit.wrap(net(), "toy-low-rank", {"targets": ["0"]}, adapter="other"))
    with pytest.raises(tunerkit.errors.AdapterError, match="several adapters"):
        tunerkit.calibrate(model, BATCHES)
    before = {name: t.clone() for name, t in model.state_dict().items() if ".other." in name}
    tunerkit.calibrate(model, BATCHES, "default")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


# Bad input


class Branching(nn.Module):
    """One of its two layers never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)  # type: ignore[no-any-return]


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "no batch": (lambda: (wrapped(), []), "there is no batch to calibrate on"),
    "used up": (lambda: (wrapped(), iter(())), "an iterator that is used up"),
    "NaN": (lambda: (wrapped(), [X * torch.nan]), "'?0'?, .*contain NaN or inf"),
    "inf": (lambda: (wrapped(), [X, X * torch.inf]), "contain NaN or inf"),
    "NaN loss": (lambda: (wrapped("toy-gradients"), [(X[:3] * torch.nan,)]), "the loss of a batch is nan"),
    "never ran": (
        lambda: (wrapped("toy-inputs", Branching(), targets=["used", "idle"]), [X]),
        "1 targets never ran on these batches: idle",
    ),
    "one mapping": (lambda: (wrapped(), {"x": X}), "batches is one dict; pass a list of batches"),
    "one tensor": (lambda: (wrapped(), X), "batches is one Tensor"),
    "other method": (
        lambda: (tunerkit.wrap(net(), "toy-low-rank", {"targets": ["0"]}), BATCHES),
        "'toy-low-rank' does not calibrate; methods that do: .*toy-gradients",
    ),
    "one pass": (
        lambda: (wrapped("toy-gradients", train_modules=["4"]), iter(BATCHES)),
        "a new head must be fitted.*list_iterator can be gone through once; pass a list",
    ),
    "not wrapped": (lambda: (net(), BATCHES), "has no adapter"),
}


@pytest.mark.filterwarnings("ignore:these adapters never ran")
@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_calibrated_is_refused_in_words(case: str) -> None:
    """Nothing changes: values, modes and hooks are as before, and nothing is recorded."""
    build, words = CASES[case]
    model, batches = build()
    model(X)  # from the second forward on, hooks that check the first one are gone
    before = copy.deepcopy(model.state_dict())
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(tunerkit.errors.AdapterError, match=f"(?s){words}"):
        tunerkit.calibrate(model, batches, loss=loss)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(module.training for module in model.modules())


def test_in_a_process_group_it_is_refused() -> None:
    """Each process would see other data, and start elsewhere; the error says how to do it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = wrapped()
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        with pytest.raises(
            tunerkit.errors.AdapterError, match="calibrate in one process, save the adapter, and load it"
        ):
            tunerkit.calibrate(model, BATCHES)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", METHODS)
def test_without_a_loss_only_gradients_are_refused(method: str) -> None:
    """The model gives none, and the error says how to pass one."""
    model = wrapped(method)
    if method == "toy-inputs":
        tunerkit.calibrate(model, BATCHES)
    else:
        with pytest.raises(tunerkit.errors.AdapterError, match=r"Tensor instead of a loss; add labels.*loss=\.\.\."):
            tunerkit.calibrate(model, BATCHES)
