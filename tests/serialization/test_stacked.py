"""Several adapters at one target: each reads the base's own output, and merging equals the forward or is refused."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tests.support.toy_readers import DirectionPlugin, ScalePlugin, SecretivePlugin
from tests.support.toys import Running, answering, registering
from tunerkit.plugin import Restriction
from tunerkit_testing.checks.probing import shared_in
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin, ShiftPlugin

METHODS = ("toy-low-rank", "toy-scale", "toy-direction")
ORDERS = [pair for pair in itertools.product(METHODS, repeat=2) if pair != ("toy-low-rank", "toy-low-rank")]


_toys = registering(LowRankPlugin(), ShiftPlugin(), ScalePlugin(), SecretivePlugin(), DirectionPlugin())


def linear() -> tuple[nn.Module, Tensor]:
    return nn.Linear(6, 5), torch.randn(7, 6)


def convolution() -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(4, 6, 3, padding=1, groups=2, stride=2), torch.randn(3, 4, 7, 7)


def embedding() -> tuple[nn.Module, Tensor]:
    return nn.Embedding(9, 5), torch.randint(9, (3, 4))


LAYERS = (linear, convolution, embedding)


def stacked(model: nn.Module, methods: tuple[str, ...], *, size: float = 0.3, **config: Any) -> Any:
    """``model`` with one adapter of each method, whose values were changed by about ``size``, in eval mode."""
    for number, method in enumerate(methods):
        tunerkit.wrap(model, method, {"targets": ["0"], **config}, adapter=f"a{number}", seed=number)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".tunerkit." in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model.eval()


def assert_merges(model: nn.Module, x: Any, limit: float = 1e-5) -> None:
    """Merged output is equal to the adapted one within ``limit``, and unmerging restores it bit for bit."""
    with torch.no_grad():
        adapted = model(x)
        tunerkit.merge(model)
        difference = (model(x) - adapted).abs().max() / adapted.abs().max()
        assert difference <= limit
        tunerkit.unmerge(model)
        assert torch.equal(model(x), adapted)


def seeded(build: Callable[[], tuple[nn.Module, Tensor]]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer, x = build()
    return nn.Sequential(layer), x


STACKS = [
    *(*ORDERS, ("toy-low-rank", "toy-shift", "toy-low-rank"), ("toy-low-rank", "toy-shift")),
    # Several readers, with others between them.
    ("toy-low-rank", "toy-scale", "toy-low-rank", "toy-scale", "toy-direction"),
    ("toy-low-rank", "toy-scale", "toy-low-rank", "toy-direction", "toy-scale"),
    # An adapter that does not declare what it reads counts as a reader.
    *(("toy-secretive",), ("toy-secretive", "toy-secretive")),
    *(pair for other in ("toy-low-rank", "toy-scale") for pair in (("toy-secretive", other), (other, "toy-secretive"))),
]


@pytest.mark.parametrize("build", LAYERS)
@pytest.mark.parametrize("methods", STACKS, ids="+".join)
def test_a_stack_in_any_order_merges_to_what_it_computes(
    build: Callable[[], tuple[nn.Module, Tensor]], methods: tuple[str, ...]
) -> None:
    """However many adapters read the base's output, none sees what another one added, and nothing is drawn."""
    model, x = seeded(build)
    fitting = tuple(m for m in methods if build is not embedding or m != "toy-shift")  # an embedding has no bias
    model, state = stacked(model, fitting), torch.get_rng_state()
    assert_merges(model, x)
    if len(methods) == 5:
        tunerkit.activate(model, [f"a{number}" for number in (4, 1, 0, 3)])
        assert_merges(model, x)
    assert torch.equal(torch.get_rng_state(), state)


def by_hand(model: Any, x: Tensor) -> Tensor:
    """What two scaling adapters with a low-rank one between them add to a linear layer, computed in float64."""
    layer = model[0]
    first, between, last = (layer.tunerkit.get(f"a{number}").adapter for number in range(3))
    y = x @ layer.weight.double().T + layer.bias.double()
    product = 0.5 * x @ between.a.double().T @ between.b.double().T
    return y * (1 + first.l.double() + last.l.double()) + product


def test_a_fused_product_does_not_change_the_output_that_others_read() -> None:
    """It writes into the layer's output, unless several adapters need that: all agrees with float64, gradients too."""
    model, x = seeded(linear)
    model = stacked(model, ("toy-scale", "toy-low-rank", "toy-scale"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for inputs in (x, x.requires_grad_()):
        found, expected = model(inputs), by_hand(model, inputs.double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(output.square().sum(), [x, *trained]) for output in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("infinite", [-torch.inf, torch.inf])
def test_readers_leave_an_infinite_output_as_it_is(dtype: torch.dtype, infinite: float) -> None:
    """Scaling it changes nothing, however many adapters do; the finite outputs are those of a layer without it."""
    model, x = seeded(linear)
    model = stacked(model, ("toy-scale", "toy-low-rank", "toy-scale", "toy-scale"), size=0.1).to(dtype)
    expected = model(x.to(dtype))
    with torch.no_grad():
        model[0].bias[2] = infinite
    found = model(x.to(dtype))
    assert torch.equal(found[:, 2], torch.full_like(found[:, 2], infinite))
    kept = [0, 1, 3, 4]
    assert torch.equal(found[:, kept], expected[:, kept])
    gradients = torch.autograd.grad(found[:, kept].sum(), [model[0].tunerkit.get("a1").adapter.b])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("methods", ORDERS, ids="+".join)
def test_a_base_in_bfloat16_merges_to_its_precision(methods: tuple[str, str]) -> None:
    """Each of the two ways rounds a few times to 8 bits; the merged weight is rounded once."""
    model, x = seeded(linear)
    assert_merges(stacked(model.bfloat16(), methods), x.bfloat16(), limit=2**-5)


class Logits(nn.Module):
    """A transformers model that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids).logits
        return logits


@pytest.mark.filterwarnings("ignore:.*new")  # heads, which these tests leave alone
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("methods", ORDERS, ids="+".join)
def test_pairs_on_a_bert_and_a_llama_merge_to_what_they_compute(name: str, methods: tuple[str, str]) -> None:
    """All linear layers at once, with the errors of all layers together."""
    pytest.importorskip("transformers")
    from tunerkit_testing import transformers_cases

    torch.manual_seed(0)
    model = Logits(getattr(transformers_cases, name)())
    assert_merges(stacked(model, methods, size=0.05, targets=["all-linear"]), torch.randint(61, (4, 7)))


def test_an_adapter_that_does_not_read_adds_to_what_came_before() -> None:
    """The order of activation is that of the sum; only readers come first."""
    model, x = seeded(linear)
    model = stacked(model, ("toy-low-rank", "toy-scale"))
    assert model[0].tunerkit.active == ("a1", "a0")
    before = model(x)
    twin = copy.deepcopy(model)
    tunerkit.activate(twin, ["a1", "a0"])
    assert torch.equal(twin(x), before)


@pytest.mark.parametrize("padding", [0, 2, 8])
@pytest.mark.parametrize(
    "methods", [("toy-scale",), ("toy-scale", "toy-low-rank"), ("toy-direction",), ("toy-secretive",)]
)
def test_a_reader_of_an_embedding_with_a_padding_row_is_refused(methods: tuple[str, ...], padding: int) -> None:
    """A delta never touches that row, and a reader changes what the forward reads there: the two would differ."""
    torch.manual_seed(0)
    layer = nn.Embedding(9, 5, padding_idx=padding)
    with torch.no_grad():
        layer.weight[padding] = 1.0  # as in pretrained tables
    model, x = stacked(nn.Sequential(layer), methods), torch.arange(9)
    before = model(x)
    with pytest.raises(
        tunerkit.errors.AdapterError, match=r"cannot merge into '0': its padding row .* the merged Embedding.*exclude="
    ) as error:
        tunerkit.merge(model)
    assert methods[0] in str(error.value)
    assert torch.equal(model(x), before)
    with torch.no_grad():
        layer.weight[padding] = 0.0  # as in new ones
    if methods == ("toy-scale",):
        assert_merges(model, x)


@pytest.mark.parametrize("methods", [("toy-scale",), ("toy-scale", "toy-low-rank")])
def test_a_projection_that_attention_uses_directly_is_merged_as_its_delta_says(methods: tuple[str, ...]) -> None:
    """Nobody calls it, so its own output says nothing: attention computes with the weight and the deltas."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    block = Running(lambda m, x: m.attention(x, x, x, need_weights=False)[0], attention=attention)
    model = stacked(block, methods, targets=["attention.out_proj"])
    assert_merges(model, torch.randn(2, 3, 8))


class Unreadable(nn.Parameter):
    """A weight that a library packed after wrapping, in a class without most of torch's functions."""

    def any(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def test_a_padding_row_is_not_read_of_a_weight_that_cannot_be_merged_at_all() -> None:
    """The library is named, and what its class cannot do is not tried."""
    model = stacked(nn.Sequential(nn.Embedding(9, 5, padding_idx=0)), ("toy-scale",))
    model[0]._parameters["weight"] = model[0].weight.detach().as_subclass(Unreadable)
    model[0].weight[0].fill_(1)
    classes = (f"{Unreadable.__module__}.{Unreadable.__qualname__}",)
    library = Restriction("a library", {"merge": "nothing can be added to it"}, classes=classes)
    with (
        registered(answering("tunerkit_restrictions", [library])),
        pytest.raises(tunerkit.errors.AdapterError, match="cannot merge with a library, found at '0"),
    ):
        tunerkit.merge(model)


def test_an_adapter_that_only_adds_to_an_embedding_with_a_padding_row_merges() -> None:
    """It adds nothing there, so no test is needed."""
    torch.manual_seed(0)
    embedding = nn.Embedding(100, 5, padding_idx=0)
    nn.init.normal_(embedding.weight)
    assert_merges(stacked(nn.Sequential(embedding), ("toy-low-rank",)), torch.arange(100))


def test_adapters_with_a_shared_module_merge_where_they_share_a_target() -> None:
    """Whether they read the output or only add to it."""
    from tests.support.toy_shared import SharedPlugin

    torch.manual_seed(0)
    with registered(SharedPlugin()):
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))
        for number, method in enumerate(("toy-shared", "toy-scale")):
            tunerkit.wrap(model, method, {"targets": ["0", "1"]}, adapter=f"a{number}", seed=number)
        assert_merges(model.eval(), torch.randn(3, 6))
        assert shared_in(tunerkit.tuner(model, "a0")) is not None
        assert all(p.dtype == torch.float32 for p in tunerkit.tuner(model, "a0").parameters())
