"""What an adapter's class may say: parameters and buffers that stay fixed, and the dimensions that are its rank."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import tunerkit
from tests.support.model_checks import pickled, silent, told
from tests.support.resumed_loop import assert_resumes
from tests.support.toy_growing import Growing, GrowingPlugin
from tests.support.toys import Building, registering
from tunerkit.plugin import Adapter, BaseLayer, add_low_rank
from tunerkit_testing.registering import registered
from tunerkit_testing.small import X, net, step, train, trainable

TARGETS = {"targets": ["0", "2"]}


class Fixed(Adapter):
    """Adds ``d b a x`` with trained ``d`` (out,); ``a`` and ``b`` are fixed, as a parameter and as a buffer."""

    reads_output = reads_weight = False
    b: Tensor

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, base.in_features), requires_grad=False)
        self.d = nn.Parameter(torch.zeros(base.out_features))
        self.register_buffer("b", torch.randn(base.out_features, 2))
        self.register_buffer("count", torch.arange(3), persistent=False)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return add_low_rank(base, x, y, q=self.a, p=self.d[:, None] * self.b, scale=1.0)


_toys = registering(Building("toy-fixed", Fixed), GrowingPlugin())


def wrapped(**config: Any) -> nn.Module:
    return tunerkit.wrap(net(), "toy-fixed", {**TARGETS, **config}, seed=0)


def trained_names(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}


# Fixed parameters


def test_a_parameter_that_was_built_fixed_is_trained_by_nothing(tmp_path: Path) -> None:
    """Not after wrapping, thawing, renaming, activating, copying, pickling or loading it for training."""
    model = wrapped()
    assert trained_names(model) == {"d"}
    tunerkit.freeze(model, "default")
    assert trained_names(model) == set()
    tunerkit.thaw(model, "default")
    assert trained_names(model) == {"d"}
    tunerkit.rename(model, "default", "other")
    tunerkit.activate(model, [])
    tunerkit.activate(model, ["other"])
    loaded = tunerkit.load(net(), tunerkit.save(model, tmp_path), trainable=True)
    for other in (copy.deepcopy(model), pickled(model), loaded):
        tunerkit.freeze(other, tunerkit.tuner(other).name)
        tunerkit.thaw(other, tunerkit.tuner(other).name)
        assert trained_names(other) == {"d"}


def test_training_changes_no_fixed_tensor_and_warns_of_nothing() -> None:
    """An optimizer of what is trainable holds all that the adapter trains; one of all parameters moves no other."""
    for choose in (trainable, lambda model: list(tunerkit.tuner(model).parameters())):
        model = wrapped()
        fixed = {name: t.clone() for name, t in model.state_dict().items() if not name.endswith(".d")}
        optimizer = torch.optim.AdamW(choose(model), lr=0.1)
        with silent(Warning):
            tunerkit.attach(model, optimizer, total_steps=3)
            train(model, optimizer, 3)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in fixed.items())
        assert all(adapter.get_parameter("d").any() for adapter in tunerkit.tuner(model).adapters().values())
        assert tunerkit.tuner(model).steps == 3


def test_fixed_parameters_and_persistent_buffers_are_saved_and_loaded(tmp_path: Path) -> None:
    """Another seed would draw others; a buffer that is not persistent is built again, and is in no file."""
    model = wrapped()
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    step(model, optimizer)
    path = tunerkit.save(model, tmp_path)
    with safe_open(path, "pt") as file:
        assert {name.rpartition(".")[2] for name in file.keys()} == {"a", "b", "d"}  # noqa: SIM118 -- not a dict
    torch.manual_seed(5)
    loaded = tunerkit.load(net(), path)
    assert torch.equal(loaded(X), model(X))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for adapter in tunerkit.tuner(loaded).adapters().values():
        assert torch.equal(adapter.get_buffer("count"), torch.arange(3))


def test_fixed_tensors_move_and_are_cast_with_the_adapter() -> None:
    """By the config's dtype, by ``model.to``, and to another device; integers keep their type."""
    model = wrapped(adapter_dtype="bfloat16")
    adapter = tunerkit.tuner(model).adapters()["0"]
    found = {name: tensor.dtype for name, tensor in (*adapter.named_parameters(), *adapter.named_buffers())}
    assert found == dict.fromkeys(("a", "d", "b"), torch.bfloat16) | {"count": torch.int64}
    model.double().to("meta")
    moved = {name: (t.dtype, t.device.type) for name, t in (*adapter.named_parameters(), *adapter.named_buffers())}
    assert moved == dict.fromkeys(("a", "d", "b"), (torch.float64, "meta")) | {"count": (torch.int64, "meta")}
    assert trained_names(model) == {"d"}


def test_an_adapter_with_nothing_to_train_counts_as_frozen() -> None:
    """There is nothing that an optimizer could train, and the error says so."""
    with registered(Building("toy-nothing", lambda base: Fixed(base).requires_grad_(False))):
        model = tunerkit.wrap(net(), "toy-nothing", TARGETS)
        optimizer = torch.optim.SGD(list(model.parameters()), lr=1.0)
        with pytest.raises(tunerkit.errors.StepError, match="frozen"):
            tunerkit.attach(model, optimizer)


# Ranks


def growing(rank: int, every: int = 1) -> nn.Module:
    return tunerkit.wrap(net(), "toy-growing", {**TARGETS, "every": every, "max_rank": rank}, seed=0)


def grown(rank: int) -> nn.Module:
    model = growing(rank)
    train(model, driven(model), 6)
    return model


def driven(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1)
    tunerkit.attach(model, optimizer, total_steps=9)
    return optimizer


def test_ranks_grow_on_the_schedule_and_are_recorded() -> None:
    """Each adapter starts at rank 1 and gets one more at steps 2 and 4; the loss falls, and parameters stay objects."""
    model = growing(3, every=2)
    before = {id(parameter) for parameter in trainable(model)}
    losses = train(model, driven(model), 8)
    tuner = tunerkit.tuner(model)
    history = [(change.step, change.ranks) for change in tuner.history]
    assert history == [(step, dict.fromkeys(("0", "2"), rank)) for step, rank in ((2, 2), (4, 3))]
    assert tuner.budget() == 6
    assert {id(parameter) for parameter in trainable(model)} == before
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stopped", [1, 2, 3, 5])
def test_a_resumed_loop_ends_bit_for_bit_as_without_the_stop(stopped: int, tmp_path: Path) -> None:
    """The file has the rank of that moment, the optimizer's state fits it, and the schedule goes on."""
    assert_resumes(lambda: growing(3, every=2), driven, tmp_path, steps=8, stopped=stopped)


@pytest.mark.filterwarnings("ignore:the schedule restarts")
@pytest.mark.parametrize("rank", [1, 3])
def test_a_file_with_another_rank_resizes_what_the_class_declares(rank: int, tmp_path: Path) -> None:
    """Loading into new adapters and into live ones; the parameters stay the same objects, and are trained as before."""
    model = grown(rank)
    assert set(tunerkit.tuner(model).ranks().values()) == {rank}
    loaded = tunerkit.load(net(), tunerkit.save(model, tmp_path), trainable=True)
    assert tunerkit.tuner(loaded).ranks() == tunerkit.tuner(model).ranks()
    assert torch.equal(loaded(X), model(X))
    live = grown(2)
    before = {id(parameter) for parameter in live.parameters()}
    live.load_state_dict(model.state_dict())
    assert {id(parameter) for parameter in live.parameters()} == before
    assert torch.equal(live(X), model(X))
    losses = train(live, driven(live), 3)
    assert losses[-1] < losses[0]


def test_a_rank_that_the_tensors_do_not_agree_on_is_refused() -> None:
    """Nothing is resized, and torch's error lists the shapes."""
    model = grown(3)
    state = model.state_dict()
    state["0.tunerkit.default.adapter.a"] = state["0.tunerkit.default.adapter.a"][:2]
    with pytest.raises(RuntimeError, match="size mismatch"):
        grown(1).load_state_dict(state)


class Masked(Growing):
    """Has tensors whose shapes must stay beside those that have the rank."""

    def __init__(self, base: Any, rank: int) -> None:
        super().__init__(base, rank)
        self.gain = nn.Parameter(torch.ones(2))
        self.register_buffer("mask", torch.ones(2))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["gain", "mask"])
def test_another_tensor_that_does_not_fit_is_refused_before_anything_is_resized(name: str, strict: bool) -> None:
    """Else the adapter would be left with the new rank and without the new values."""
    base: Any = nn.Linear(6, 5)
    adapter, state = Masked(base, 1), Masked(base, 3).state_dict()
    state[name] = torch.ones(3)
    before = copy.deepcopy(adapter.state_dict())
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        adapter.load_state_dict(state, strict=strict)
    after = adapter.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items() if key in ("a", "b", name))


class Reversed(Growing):
    """Counts its dimensions from the end."""

    rank_dims: ClassVar[Mapping[str, int]] = {"a": -2, "b": -1}


def test_dimensions_may_be_counted_from_the_end() -> None:
    """As everywhere in torch."""
    base: Any = nn.Linear(6, 5)  # it has the sizes that are needed
    big, small = (Reversed(base, rank) for rank in (3, 1))
    small.load_state_dict(big.state_dict())
    assert small.rank == 3
    for adapter in (big, small):
        for parameter in adapter.parameters():
            parameter.data = torch.empty(0)  # as ZeRO-3 keeps them, in a state and in an adapter
    assert small.load_state_dict(big.state_dict())
    assert small.a.shape == (0,)


class Misnamed(Growing):
    rank_dims: ClassVar[Mapping[str, int]] = {"q": 0}


class Misplaced(Growing):
    rank_dims: ClassVar[Mapping[str, int]] = {"a": 2}


class Undecided(Growing):
    reads_output = "sometimes"  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Misnamed, r"Misnamed whose rank_dims names 'q'.*parameters or buffers there: a, b"),
        (Misplaced, r"Misplaced whose rank_dims is 2 for 'a'.*shape \(1, 6\)"),
        (Undecided, r"Undecided with reads_output='sometimes' and reads_weight=False.*both, as True or False"),
    ],
)
def test_a_wrong_declaration_is_refused_when_wrapping(kind: type[Growing], words: str) -> None:
    """The error names the plugin, the hook, the target, the class and the expected form."""
    wrong = Building("toy-wrong", lambda base: kind(base, 1))
    expected = rf"build_adapter.*'toy-wrong'.*{words}"
    with registered(wrong), pytest.raises(tunerkit.errors.PluginError, match=expected) as error:
        tunerkit.wrap(net(), "toy-wrong", TARGETS)
    assert "'0'" in str(error.value)


class Silent(Growing):
    reads_output = None  # type: ignore[assignment]
    reads_weight = None  # type: ignore[assignment]


def silent_plugin(number: int | None) -> Building:
    """Its class says nothing of what it reads."""
    plugin = Building("toy-silent", lambda base: Silent(base, 1))
    if number is not None:
        vars(plugin)["TUNERKIT_API"] = number
    return plugin


def test_a_class_that_leaves_out_what_it_reads_is_refused_with_the_meaning_of_both_flags() -> None:
    """From the contract's number 2 on, and nothing is put into the model."""
    model = net()
    words = (
        r"'toy-silent'.*Silent with reads_output=None and reads_weight=None for '0'; .*True or False: "
        r"reads_output: whether the contribution of forward .*reads_weight: whether forward or the delta reads"
    )
    with registered(silent_plugin(2)), pytest.raises(tunerkit.errors.PluginError, match=words):
        tunerkit.wrap(model, "toy-silent", TARGETS)
    assert not any("tunerkit" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("number", [1, None])
def test_under_the_first_number_leaving_it_out_warns_once_and_works(number: int | None) -> None:
    """A plugin without a number is of the first; the warning names it, and what to write."""
    with registered(silent_plugin(number)):
        texts = told(lambda: [tunerkit.wrap(net(), "toy-silent", TARGETS) for _ in range(2)])
    words = [text for text in texts if "reads_output" in text]
    assert len(words) == 1
    for part in ("'toy-silent' (in-process)", "TUNERKIT_API 1", "class Silent", "TUNERKIT_API = 2", "None counts as"):
        assert part in words[0]
