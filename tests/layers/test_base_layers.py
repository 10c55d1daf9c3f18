"""Base-layer kinds compared with float64 layers with merged weights, over shapes, groups, strides and paddings."""

import inspect
from collections.abc import Callable
from itertools import product
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.support.layer_law import built, check_law, described, random_
from tests.support.model_checks import each_copy
from tunerkit.layers import KINDS, BaseLayer, Knowledge, as_base_layer, as_base_layers
from tunerkit.layers.kinds import AttentionLayer, ConvLayer, EmbeddingLayer, LinearLayer, OutputLayer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MODES = ("zeros", "reflect", "replicate", "circular")


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution with any settings that torch allows, and an input that is large enough for its padding."""
    dimensions = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    axis = st.integers(1, 3)
    kernel = draw(st.tuples(*[axis] * dimensions))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * dimensions))
    numbers = st.tuples(*[st.integers(0, 2)] * dimensions)
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), numbers))
    stride = (1,) * dimensions if padding == "same" else draw(st.tuples(*[st.integers(1, 3)] * dimensions))
    module = CONVOLUTIONS[dimensions - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        kernel,  # type: ignore[arg-type]
        stride=stride,  # type: ignore[arg-type]
        padding=padding,  # type: ignore[arg-type]
        dilation=dilation,  # type: ignore[arg-type]
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(MODES)),
    )
    size = [max(d * (k - 1) + 1, 3) + draw(st.integers(0, 2)) for k, d in zip(kernel, dilation, strict=True)]
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    return random_(module), torch.randn(*batch, module.in_channels, *size, dtype=torch.float64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_keeps_the_law_for_every_dimension_and_geometry(groups: int, mode: str) -> None:
    """144 cases: dimensions x groups x padding modes x (plain, strided, dilated, "same")."""
    geometries: list[dict[str, Any]] = [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}]
    geometries.append({"padding": "same", "dilation": 2})
    for dimensions, geometry in product((1, 2, 3), geometries):
        module = CONVOLUTIONS[dimensions - 1](4, 8, 3, groups=groups, padding_mode=mode, **geometry)  # type: ignore[arg-type]
        check_law(random_(module), torch.randn(2, 4, *[5 + i for i in range(dimensions)], dtype=torch.float64), 3)


@settings(max_examples=150, deadline=None)
@given(convolutions(), st.integers(1, 4))
def test_a_convolution_keeps_the_law_whatever_its_settings(layer: tuple[nn.Module, Tensor], rank: int) -> None:
    """Different kernels, strides and dilations per axis; "same" and "valid"; batched or not; any rank."""
    check_law(*layer, rank)


batches = st.lists(st.integers(0, 3), max_size=3)


@settings(deadline=None)
@given(batches, st.integers(1, 5), st.integers(1, 5), st.integers(1, 7), st.booleans())
def test_a_linear_layer_keeps_the_law(batch: list[int], n_in: int, n_out: int, rank: int, bias: bool) -> None:
    """For any leading dimensions, including none and empty ones, and ranks above the number of features."""
    check_law(random_(nn.Linear(n_in, n_out, bias=bias)), torch.randn(*batch, n_in, dtype=torch.float64), rank)


@settings(deadline=None)
@given(batches, st.integers(1, 6), st.integers(1, 5), st.integers(1, 7), st.data())
def test_an_embedding_keeps_the_law(batch: list[int], rows: int, width: int, rank: int, data: st.DataObject) -> None:
    """With or without padding_idx, also counted from the end; scalar ids and no ids."""
    padding = data.draw(st.none() | st.integers(-rows, rows - 1))
    check_law(random_(nn.Embedding(rows, width, padding_idx=padding)), torch.randint(rows, batch), rank)


# --- Dropout ---------------------------------------------------------------------------------------------------------


LAYERS = ("linear", "conv1d", "conv2d", "conv3d", "embedding", "transposed")


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "embedding"])
def test_dropout_is_that_of_the_input(name: str) -> None:
    """Dropping inside project_in equals dropping before it, and 0 drops nothing."""
    module, x = built(name)
    base = described(module)
    q = torch.randn(2, base.in_features)
    torch.manual_seed(5)
    dropped = base.project_in(x, q, dropout=0.4)
    torch.manual_seed(5)
    assert torch.equal(dropped, base.project_in(F.dropout(x, 0.4), q))
    assert not torch.equal(dropped, base.project_in(x, q))
    assert torch.equal(base.project_in(x, q, dropout=0.0), base.project_in(x, q))


def test_dropout_of_an_embedding_drops_whole_ids() -> None:
    """Each occurrence of an id is dropped with that probability, or kept whole and scaled by 1/(1 - dropout)."""
    base = described(nn.Embedding(9, 4))
    q = torch.rand(3, 9) + 1
    ids = torch.randint(9, (40, 100))
    torch.manual_seed(0)
    ratio = base.project_in(ids, q, dropout=0.25) / base.project_in(ids, q)
    kept = ratio[..., 0] > 0
    assert torch.equal(ratio == 0, ~kept.unsqueeze(-1).expand_as(ratio))
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 4 / 3))
    assert abs(kept.double().mean() - 0.75) < 0.03  # four standard deviations of 4,000 draws
    assert (base.project_in(ids, q, dropout=1.0) == 0).all()


# --- Weights and biases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_pack_undoes_dense_in_any_dtype(name: str) -> None:
    """The dense weight is (out, in), shares the layer's memory, and packs back to the layer's layout and dtype."""
    module, _ = built(name)
    base = described(module)
    dense = base.dense()
    assert dense.shape == (base.out_features, base.in_features)
    assert dense.data_ptr() == module.weight.data_ptr()
    assert not dense.requires_grad
    weight = module.weight.detach().clone()
    if isinstance(module, nn.Embedding):
        weight[module.padding_idx] = 0
    assert torch.equal(base.pack(dense), weight)
    assert base.pack(dense.double()).dtype == torch.float64


def test_pack_zeroes_the_padding_row_of_a_copy_only() -> None:
    """The caller's weight keeps its column."""
    base = described(nn.Embedding(4, 3, padding_idx=1))
    weight = torch.ones(3, 4)
    assert torch.equal(base.pack(weight)[:, 0], torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert torch.equal(weight, torch.ones(3, 4))


@pytest.mark.parametrize("name", LAYERS)
def test_a_shaped_bias_adds_like_the_layers_own(name: str) -> None:
    """Adding the shaped bias to the output equals a layer whose own bias is larger by it."""
    module, x = built(name)
    base = described(module)
    b = torch.randn(base.out_features)
    y = module(x)
    added = y + base.shape_bias(b)
    assert added.shape == y.shape
    assert (module(x[0]) + base.shape_bias(b)).shape == y.shape[1:]
    if isinstance(module, nn.Embedding):
        assert torch.equal(added, y + b)
        return
    with torch.no_grad():
        module.bias += b
    torch.testing.assert_close(added, module(x))


@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_read_at_every_call(name: str) -> None:
    """A kind keeps no copy: it follows dtype changes and merged weights."""
    module, _ = built(name)
    base = described(module)
    module.double()
    assert base.dense().dtype == torch.float64
    module.weight.data = torch.zeros_like(module.weight)
    assert (base.dense() == 0).all()


# --- What matches ----------------------------------------------------------------------------------------------------


def test_each_layer_has_its_kind_and_features() -> None:
    """The table of core kinds; a convolution's `in` is C_in/groups · positions of its kernel."""
    table: list[tuple[nn.Module, type[BaseLayer], int, int]] = [
        (nn.Linear(5, 3), LinearLayer, 5, 3),
        (nn.Conv1d(4, 6, 3), ConvLayer, 12, 6),
        (nn.Conv2d(4, 6, (3, 2), groups=2), ConvLayer, 12, 6),
        (nn.Conv3d(2, 4, 2, groups=2), ConvLayer, 8, 4),
        (nn.Embedding(7, 3), EmbeddingLayer, 7, 3),
        (nn.MultiheadAttention(4, 2), AttentionLayer, 4, 12),
    ]
    for module, kind, n_in, n_out in table:
        base = described(module)
        assert type(base) is kind
        assert base.module is module
        assert (base.in_features, base.out_features, base.scale) == (n_in, n_out, 1.0)
        assert sum(other.matches(module) for other in KINDS) == 1


class Renamed(nn.Linear):
    """A subclass that keeps the forward."""


def derived(parent: type[nn.Module], method: str = "forward", name: str = "Derived", **more: object) -> Any:
    """A class that overrides one method."""
    return type(name, (parent,), {method: lambda self, *args: args, **more})


Cached: Any = derived(nn.Linear)
Scaled = derived(nn.Embedding, name="MyScaledWordEmbedding", embed_scale=2.0)
CachedAgain = type("CachedAgain", (Cached,), {})  # inherits a forward that isn't nn.Linear's


class Conv1D(nn.Module):
    """Not transformers': another library's class of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 2))


def with_own(name: str, module: nn.Module) -> nn.Module:
    """The instance overrides one of its class's methods."""
    setattr(module, name, lambda *args: torch.zeros(1))
    return module


@pytest.mark.parametrize(
    "module",
    [
        Cached(3, 2),
        CachedAgain(3, 2),
        derived(nn.Conv2d, "_conv_forward")(2, 2, 3),
        derived(nn.Embedding)(5, 3),
        Scaled(5, 3),
        Conv1D(),
        with_own("forward", nn.Linear(3, 2)),
        with_own("forward", nn.Conv2d(2, 2, 3)),
        with_own("_conv_forward", nn.Conv2d(2, 2, 3)),
        with_own("forward", nn.Embedding(5, 3)),
        nn.LazyLinear(2),
        nn.LazyConv2d(2, 3),
        nn.ConvTranspose2d(2, 2, 3),
        nn.EmbeddingBag(5, 3),
        nn.Bilinear(2, 2, 2),
        nn.MultiheadAttention(4, 2, kdim=3),
        with_own("forward", nn.MultiheadAttention(4, 2)),
        nn.LayerNorm(3),
        nn.Module(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_layer_that_may_do_something_else_has_no_kind(module: nn.Module) -> None:
    """Custom forwards, classes with the same name, layers without features yet, and other arithmetic."""
    assert as_base_layer(module) is None


def test_a_subclass_that_keeps_the_forward_has_its_parents_kind() -> None:
    """Also once torch's parametrizations have swapped the class."""
    for module in (Renamed(3, 2), weight_norm(nn.Linear(3, 2)), nn.MultiheadAttention(4, 2).out_proj):
        assert isinstance(as_base_layer(module), LinearLayer)


def test_the_first_kind_that_matches_wins_and_plugins_need_no_attrs() -> None:
    """Core kinds come before a plugin's, which is a plain subclass."""

    class Anything(BaseLayer):
        @classmethod
        def matches(cls, module: nn.Module) -> bool:
            return True

    plugin: Any = type("Plugin", (Anything,), {name: None for name in Anything.__abstractmethods__})
    assert isinstance(as_base_layer(nn.Linear(2, 2), (*KINDS, plugin)), LinearLayer)
    norm = nn.LayerNorm(2)
    found: Any = as_base_layer(norm, (*KINDS, plugin))
    assert type(found) is plugin
    assert found.module is norm
    with pytest.raises(TypeError, match="abstract"):
        Anything(nn.LayerNorm(2))  # type: ignore[abstract]


class Doubled(nn.Module):
    """A layer that no kind of core knows."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Inherited(Doubled):
    """It keeps the forward."""


class Overridden(Doubled):
    """It has a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


@pytest.mark.parametrize("name", [f"{__name__}.Doubled", f"{__name__}."])
def test_a_kind_that_names_forwards_is_asked_about_modules_with_them_alone(name: str) -> None:
    """Law: without `matches` of its own it is those; a package, with a dot at its end, stands for all its classes."""
    asked: list[nn.Module] = []

    class Named(OutputLayer):  # type: ignore[misc]  # final: nobody else may derive from it
        forwards = (name,)

        @classmethod
        def matches(cls, module: nn.Module) -> bool:
            asked.append(module)
            return super().matches(module)

    own = Doubled()
    own.forward = lambda x: x  # type: ignore[method-assign]
    inherited, overridden = Inherited(), Overridden()
    found = as_base_layers([nn.Tanh(), own, inherited, overridden], Knowledge((Named,), (), ()))
    assert list(found) == asked == ([inherited, overridden] if name.endswith(".") else [inherited])


def test_kinds_are_final_and_frozen() -> None:
    """No kind that matches something is subclassed, and its module cannot be replaced."""
    for kind in KINDS:
        assert kind.forwards
        assert not set(kind.__bases__) & set(KINDS)
        assert not inspect.isabstract(kind)
    base = described(nn.Linear(2, 2))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        base.module = nn.Linear(3, 3)  # type: ignore[misc]


# --- Copies ----------------------------------------------------------------------------------------------------------


@each_copy
@pytest.mark.parametrize("name", LAYERS)
def test_a_copied_layer_holds_a_kind_that_points_at_the_copy(name: str, way: Callable[[Any], Any]) -> None:
    """A kind stored in a child of its own layer, as injection does, is copied with the layer."""
    module, _ = built(name)
    base: Any = described(module)
    child: Any = nn.Module()
    child.base = base
    module.tunerkit = child
    other: Any = way(module)
    copied: Any = other.tunerkit.base
    assert type(copied) is type(base)
    assert copied.module is other
    assert base.module is module
    assert copied.dense().data_ptr() == other.weight.data_ptr() != module.weight.data_ptr()


def test_an_embedding_has_the_rows_of_its_weight() -> None:
    """Rows that were added by hand count, whatever the module says of its size."""
    module = nn.Embedding(10, 4)
    module.weight = nn.Parameter(torch.randn(15, 4))
    assert (described(module).in_features, described(module).out_features) == (15, 4)
