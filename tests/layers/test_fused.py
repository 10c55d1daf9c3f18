"""The fused low-rank product compared with the plain form: values, gradients, errors, and when it must not be used."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import tunerkit
from tests.support import between
from tests.support.layer_law import known
from tests.support.products import Product, adapted
from tests.support.toys import Toys
from tunerkit.errors import AdapterError
from tunerkit.injection.slots import apply_slots
from tunerkit.layers import as_base_layer, low_rank, products
from tunerkit.plugin import Adapter, BaseLayer
from tunerkit_testing.counting import Counting
from tunerkit_testing.product_forms import fused_form, plain_form

NODE = "_FusedLowRankBackward"


def conv1d() -> nn.Module:
    layer: nn.Module = known("transformers.pytorch_utils").Conv1D(4, 5)
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 4),
    "without bias": lambda: nn.Linear(5, 4, bias=False),
    "conv1d": conv1d,
}
INPUTS = [(5,), (3, 5), (2, 3, 5), (2, 1, 3, 5), (0, 5), (2, 0, 5)]


@pytest.fixture(scope="module", autouse=True)
def small_inputs_too() -> Iterator[None]:
    """The layers here are small."""
    with fused_form():
        yield


def is_fused(y: Tensor) -> bool:
    return y.grad_fn is not None and y.grad_fn.name() == NODE


def results(layer: Any, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of all trained parameters, for a nonlinear loss."""
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    y = layer(x)
    layer.zero_grad()
    (y * torch.arange(1.0, 5.0, dtype=y.dtype)).square().sum().backward()
    return [y.detach(), *(p.grad for p in (x, *layer.parameters()) if p.grad is not None)]


def assert_agree(layer: Any, x: Tensor, *, fused: bool = True, atol: float = 1e-10) -> None:
    """Check that both forms give the same, and that the first is the expected one."""
    assert is_fused(layer(x.detach().requires_grad_())) == fused
    with plain_form():
        assert not is_fused(layer(x.detach().requires_grad_()))
        expected = results(layer, x)
    torch.testing.assert_close(results(layer, x), expected, rtol=0, atol=atol)


class Looking(Product):
    """Notes what is on each output before it adds to it."""

    def __init__(self, base: BaseLayer, seen: list[tuple[Tensor, Tensor, bool]]) -> None:
        super().__init__(base, 3)
        self.seen = seen

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        self.seen.append((y, y.detach().clone(), bool(vars(y))))
        return super().forward(base, x, y)


@pytest.mark.parametrize("quiet", [torch.no_grad, contextlib.nullcontext])
def test_below_the_limit_nothing_is_fused_or_marked_or_written_to(
    quiet: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of the input decide: below the limit, outputs have the plain form's bits, and y stays as it is."""
    monkeypatch.setattr(low_rank, "LEAST_NUMBERS", 15)
    seen: list[tuple[Tensor, Tensor, bool]] = []
    layer = adapted(nn.Linear(5, 4), lambda base: Looking(base, seen))
    for rows in (2, 3):
        x = torch.randn(rows, 5, requires_grad=True)
        with quiet():
            found = layer(x)
            y, before, marked = seen[-1]
            assert (marked, torch.equal(y, before)) == ((False, True) if rows == 2 else (True, False))
            assert is_fused(found) == (rows == 3 and found.requires_grad)
            if rows == 2:
                with plain_form():
                    assert torch.equal(found, layer(x))


@pytest.mark.parametrize("shape", INPUTS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("diagonal", [True, False])
def test_outputs_and_gradients_are_the_plain_form_s(
    name: str, shape: tuple[int, ...], dropout: float, diagonal: bool
) -> None:
    """Gradients of the input, P, Λ and Q agree for every input shape, including empty batches."""
    layer = adapted(LAYERS[name](), lambda base: Product(base, 3, diagonal=diagonal, dropout=dropout)).double()
    assert_agree(layer, torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("diagonal", "trained"),
    [(diagonal, trained) for diagonal in (True, False) for trained in ("x", "p", "q", "all")] + [(True, "lam")],
)
@pytest.mark.parametrize("thin", [True, False])
def test_first_and_second_derivatives_are_those_of_finite_differences(
    name: str, diagonal: bool, trained: str, thin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any choice of frozen parameters; a gradient penalty works with the fused form too."""
    monkeypatch.setattr(products, "is_thin", lambda rank, factor: thin)
    monkeypatch.setattr(products, "LEAST_NUMBERS", 0)
    layer = adapted(LAYERS[name](), lambda base: Product(base, 2, diagonal=diagonal)).double()
    own = {key: p.detach() for key, p in layer.named_parameters() if "tunerkit" in key}
    values = {"x": torch.randn(2, 3, 5, dtype=torch.float64), **own}
    wanted = [key for key in values if trained == "all" or key.rpartition(".")[2] == trained]

    def call(*leaves: Tensor) -> Tensor:
        given = {**values, **dict(zip(wanted, leaves, strict=True))}
        for key in own:
            part = layer.get_submodule(key.rpartition(".")[0])
            part._parameters[key.rpartition(".")[2]] = given[key]
        y: Tensor = layer(given["x"])
        assert is_fused(y)
        return y

    leaves = [values[key].clone().requires_grad_() for key in wanted]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize(
    ("dtype", "rank"), [(torch.float32, 15), (torch.bfloat16, 31), (torch.float64, 7)], ids=["fp32", "bf16", "fp64"]
)
@pytest.mark.parametrize("diagonal", [True, False])
def test_factors_are_thin_below_the_width_of_a_register_and_gradients_are_laid_out_as_the_weights(
    dtype: torch.dtype, rank: int, diagonal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both sides of it, with gradients, without and in inference mode: the same bits. P's is always contiguous."""
    monkeypatch.setattr(products, "LEAST_NUMBERS", 0)
    for own in (rank, rank + 1):
        assert products.is_thin(own, torch.empty(0, dtype=dtype)) == (own == rank)
        make = functools.partial(Product, rank=own, diagonal=diagonal)
        layer = adapted(nn.Linear(9, 6), make).to(dtype)
        x = torch.randn(5, 9, dtype=dtype)
        y = layer(x)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.equal(layer(x), y)
        grads = torch.autograd.grad(y, [p for p in layer.parameters() if p.requires_grad], torch.ones_like(y))
        assert all(grad.is_contiguous() for grad in grads)
    assert not products.is_thin(rank, torch.empty(0, dtype=dtype, device="meta"))


# Both sides of the rank from which factors are no longer thin, 16 in fp32.
SIZES = st.sampled_from([1, 2, 7, 15, 16, 32, 65])


@given(st.tuples(SIZES, SIZES, SIZES, SIZES), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_the_fused_error_is_at_most_twice_the_plain_one(
    sizes: tuple[int, int, int, int], diagonal: bool, seed: int
) -> None:
    """Against float64, but for two roundings of the sum of absolute values: a sum may be exact by chance."""
    torch.manual_seed(seed)
    rows, into, out, rank = sizes
    layer = adapted(nn.Linear(into, out), lambda base: Product(base, rank, diagonal=diagonal))
    x, slope = torch.randn(rows, into), torch.randn(rows, out)

    def run(layer: Any, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y = layer(x)
        own = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return [y.detach(), *torch.autograd.grad(y, own, slope.to(y.dtype))]

    exact, fused = run(copy.deepcopy(layer).double(), x.double()), run(layer, x)
    with plain_form():
        plain = run(layer, x)
    with torch.no_grad():
        for p in layer.parameters():
            p.abs_()
        slope.abs_()
    sums = run(layer, x.abs())
    for truth, found, other, total in zip(exact, fused, plain, sums, strict=True):
        slack = 2 * torch.finfo(torch.float32).eps * total.max()
        assert (found - truth).norm() <= 2 * (other - truth).norm() + slack * truth.numel() ** 0.5


@pytest.mark.parametrize("diagonal", [True, False])
def test_under_autocast_it_multiplies_as_autocast_does(diagonal: bool) -> None:
    """bf16 products for fp32 weights; gradients have the weights' dtype, and errors are those of the plain form."""
    torch.manual_seed(0)
    layer = adapted(nn.Linear(48, 4), lambda base: Product(base, 8, diagonal=diagonal))
    x = torch.randn(64, 48)
    exact = results(copy.deepcopy(layer).double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_fused(layer(x))
        fused = results(layer, x)
        with plain_form():
            plain = results(layer, x)
    assert [t.dtype for t in fused] == [t.dtype for t in plain] == [torch.bfloat16] + [torch.float32] * (len(plain) - 1)
    for truth, found, other in zip(exact, fused, plain, strict=True):
        assert (found - truth).norm() <= 2 * (other - truth).norm()


def keep(kept: list[Tensor]) -> Callable[..., None]:
    return lambda module, args, output: kept.append(output)


def test_an_output_that_a_hook_has_seen_is_not_written_to() -> None:
    """Outputs that a hook collects, registered before ours or for all modules, stay unchanged."""
    kept: list[Tensor] = []
    layer = nn.Linear(5, 4)
    layer.register_forward_hook(keep(kept))
    x = torch.randn(3, 5)
    expected = layer(x).detach()
    adapted(layer)
    assert not is_fused(layer(x.requires_grad_()))
    assert torch.equal(kept[-1], expected)
    other = adapted(nn.Linear(5, 4))
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert not is_fused(other(x))
    finally:
        handle.remove()
    assert is_fused(other(x))


def test_a_forward_replaced_on_the_instance_is_not_fused() -> None:
    """It may return any tensor, such as one that it keeps."""
    layer = adapted(nn.Linear(5, 4))
    kept = torch.randn(3, 4)
    layer.forward = lambda x: kept
    before = kept.clone()
    layer(torch.randn(3, 5))
    assert torch.equal(kept, before)


def test_a_second_adapter_is_added_to_what_the_first_gives() -> None:
    """Only the first gets the base's own output; the second must not bypass the gradient through the first."""
    layer = adapted(nn.Linear(5, 4), lambda base: Product(base, 3), lambda base: Product(base, 2)).double()
    assert_agree(layer, torch.randn(2, 3, 5, dtype=torch.float64), fused=False)


class Gated(Adapter):
    """Changes y before adding to it, and adds twice."""

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.rand(base.out_features))
        self.one, self.two = Product(base, 2), Product(base, 3)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return self.two(base, x, self.one(base, x, y * self.gate))  # type: ignore[no-any-return]


class Twice(Gated):
    """Adds twice to its input: the first product is fused, the second adds to the result."""

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return self.two(base, x, self.one(base, x, y)) + 0 * self.gate  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Gated, Twice])
def test_an_adapter_may_do_more_than_one_product(kind: type[Adapter]) -> None:
    """No other tensor is mistaken for the base's output."""
    layer = adapted(nn.Linear(5, 4), kind).double()
    assert_agree(layer, torch.randn(2, 3, 5, dtype=torch.float64), fused=False)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "dropped": lambda x: F.dropout(x, 0.5),
    "gated": lambda x: x * torch.linspace(0.5, 2.0, 5, dtype=x.dtype),
    "detached": lambda x: x.detach(),
}


class Reads(Product):
    """Uses another input than the base layer does."""

    def __init__(self, base: BaseLayer, change: str) -> None:
        super().__init__(base, 3)
        self.change = CHANGES[change]

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(base, self.change(x), y)


@pytest.mark.parametrize("change", CHANGES)
def test_an_adapter_may_read_another_input_than_its_base_layer(change: str) -> None:
    """The base's gradient then goes to the base's input, not to the adapter's."""
    layer = adapted(nn.Linear(5, 4), lambda base: Reads(base, change)).double()
    assert_agree(layer, torch.randn(2, 3, 5, dtype=torch.float64))


class Writes(Gated):
    """Changes y in place, which adapters must not do."""

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return self.two(base, x, y.mul_(self.gate))  # type: ignore[no-any-return]


def test_an_output_that_was_changed_is_not_taken_for_the_base_s() -> None:
    """The in-place change has its own gradient."""
    layer = adapted(nn.Linear(5, 4, bias=False), Writes).double()
    assert_agree(layer, torch.randn(3, 5, dtype=torch.float64), fused=False)


def test_the_note_on_an_output_goes_with_the_adapters() -> None:
    """An output to which nothing was added leaves the layer as an ordinary tensor."""
    layer = adapted(nn.Linear(5, 4), lambda base: Product(base, 0))
    assert not vars(layer(torch.randn(3, 5)))


def test_a_weight_elsewhere_is_not_gone_through() -> None:
    """In a replica of DataParallel, the registered module is the first device's."""
    layer = adapted(nn.Linear(5, 4)).double()
    slots = layer.tunerkit
    elsewhere = nn.Linear(5, 4, device="meta", dtype=torch.float64).requires_grad_(False)
    base, x = as_base_layer(elsewhere), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert base is not None
    elsewhere.register_forward_hook(apply_slots, with_kwargs=True)
    y = F.linear(x, layer.weight, layer.bias)
    assert low_rank.mark(base, x, y, traced=False)
    found = slots.get("0").adapter(base, x, y)
    assert is_fused(found)
    expected = layer(x)
    slope = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(found, x, slope), torch.autograd.grad(expected, x, slope))


@pytest.mark.parametrize("island", ["forward", "backward"])
def test_autocast_may_be_on_in_one_direction_alone(island: str) -> None:
    """An fp32 block inside autocast, and a forward before autocast: gradients are those of the plain form."""
    torch.manual_seed(0)
    layer, x = adapted(nn.Linear(5, 4)), torch.randn(3, 5)

    def run() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=island == "backward"):
            y = layer(leaf)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=island == "forward"):
            y.float().square().sum().backward()
        return [p.grad for p in (leaf, *layer.parameters()) if p.grad is not None]

    fused = run()
    with plain_form():
        plain = run()
    for found, other in zip(fused, plain, strict=True):
        assert (found - other).norm() <= 0.03 * other.norm()


def test_a_bf16_base_under_autocast_is_gone_through() -> None:
    """With fp32 adapters, the base's weight has the dtype of the product, so one autograd node covers both."""
    torch.manual_seed(0)
    layer = adapted(nn.Linear(48, 4))
    layer.weight.data, layer.bias.data = layer.weight.data.bfloat16(), layer.bias.data.bfloat16()
    x = torch.randn(64, 48).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = results(layer, x)
        with plain_form():
            plain = results(layer, x)
    for found, other in zip(fused, plain, strict=True):
        assert (found - other).norm() <= 0.02 * other.norm()


def test_operations_in_place_behind_it_and_a_second_backward_are_right() -> None:
    """An in-place ReLU overwrites the sum, which is not saved; a retained graph supports a second backward."""
    layer = adapted(nn.Linear(5, 4)).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    y = torch.relu_(layer(x))
    with plain_form():
        other = torch.relu(layer(x))
    slope = torch.randn_like(y)
    expected = torch.autograd.grad(other, x, slope)[0]
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(y, x, slope, retain_graph=True)[0], expected)


def test_saved_tensors_may_be_kept_elsewhere() -> None:
    """Hooks on saved tensors (activation offloading) get what the node saves, and return it."""
    layer = adapted(nn.Linear(5, 4)).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = results(layer, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        found = results(layer, x)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_base_layer_that_is_trained_too_gets_its_gradient(what: str) -> None:
    """If the base is unfrozen along with the adapter, its gradient is that of the plain form."""
    layer = adapted(nn.Linear(5, 4)).double()
    getattr(layer, what).requires_grad_()
    assert_agree(layer, torch.randn(2, 3, 5, dtype=torch.float64))


def test_an_input_without_gradient_and_frozen_adapters_cost_no_graph() -> None:
    """The first layer's input often needs no gradient; an adapter loaded for inference has none at all."""
    layer = adapted(nn.Linear(5, 4))
    assert is_fused(layer(torch.randn(3, 5)))
    layer.requires_grad_(False)
    assert not layer(torch.randn(3, 5)).requires_grad
    x = torch.randn(3, 5)
    expected = results(layer, x)
    with plain_form():
        torch.testing.assert_close(expected, results(layer, x))


class Checkpointed(nn.Module):
    """Recomputes its layer in backward."""

    def __init__(self, layer: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.layer, x, **self.options)


SAVING = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {"use_reentrant": False, "context_fn": SAVING},
}


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_checkpointed_layers_have_the_same_gradients(how: str) -> None:
    """A recomputed output is overwritten again; one that a policy saves is reused in backward, and is not."""
    layer = adapted(nn.Linear(5, 4)).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = results(layer, x)
    found = results(Checkpointed(layer, CHECKPOINTS[how]), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_overwriting_an_output_saved_before_is_an_error_at_backward() -> None:
    """If a pre-hook or a caller saved the tensor, autograd raises; the result is never silently wrong."""
    layer = nn.Linear(5, 4)
    saved: list[Tensor] = []
    adapted(layer, lambda base: Saves(base, saved))
    layer(torch.randn(3, 5, requires_grad=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved[0].sum().backward()


class Saves(Product):
    """Uses y for something else before the product overwrites it, which the docs of add_low_rank forbid."""

    def __init__(self, base: BaseLayer, saved: list[Tensor]) -> None:
        super().__init__(base, 2)
        self.saved = saved

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        self.saved.append(y.square())
        return super().forward(base, x, y)


def test_transforms_and_traces_see_the_plain_form() -> None:
    """vmap, grad, forward-mode derivatives and tracing need the individual operations."""
    layer, x = adapted(nn.Linear(5, 4)).double(), torch.randn(3, 5, dtype=torch.float64)
    expected = layer(x).detach()
    torch.testing.assert_close(torch.func.vmap(layer)(x), expected)
    slope = torch.func.grad(lambda x: layer(x).sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(slope, torch.autograd.grad(layer(leaf).sum(), leaf)[0])
    value, tangent, *_ = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(value, expected)
    assert tangent.any()
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), expected)  # type: ignore[no-untyped-call]


def test_a_batch_of_gradients_at_once_is_right() -> None:
    """``is_grads_batched`` runs the node's backward under vmap."""
    layer, x = adapted(nn.Linear(5, 4)).double(), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    own = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y = layer(x)
    slopes = torch.randn(2, *y.shape, dtype=y.dtype)
    together = torch.autograd.grad(y, own, slopes, is_grads_batched=True, retain_graph=True)
    for number, slope in enumerate(slopes):
        for found, expected in zip(together, torch.autograd.grad(y, own, slope, retain_graph=True), strict=True):
            torch.testing.assert_close(found[number], expected)


@pytest.mark.parametrize("shape", between.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", between.DTYPES, ids=str)
@pytest.mark.parametrize("scenario", between.SCENARIOS)
def test_what_is_replaced_between_two_reads_ends_as_in_the_plain_form(
    toys: "Toys", scenario: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Nothing of an input or a weight is remembered from one read to the next."""
    between.agree("toy-low-rank", {}, scenario, shape, dtype)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("how", ["other values", "second derivatives", "another dtype"])
def test_parameters_replaced_before_backward_change_no_gradient(name: str, diagonal: bool, how: str) -> None:
    """The data of the base's and of the adapter's: gradients are those of what the forward read, bit for bit."""
    layer = adapted(LAYERS[name](), lambda base: Product(base, 3, diagonal=diagonal)).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    own = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def gradients(*, replace: bool) -> list[Any]:
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        assert is_fused(y)
        for parameter in layer.parameters() if replace else ():
            parameter.data = parameter.data.float() if how == "another dtype" else parameter.data + 1
        loss = y.square().sum()
        if how == "second derivatives":
            loss = torch.stack([g.square().sum() for g in torch.autograd.grad(loss, own, create_graph=True)]).sum()
        loss.backward()
        return [each.grad for each in own]

    expected = gradients(replace=False)
    for found, other in zip(gradients(replace=True), expected, strict=True):
        assert torch.equal(found, other)


class Doubling(BaseTorchFunctionMode):
    """Doubles what every linear layer computes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs)
        return 2 * found if func is F.linear else found


def test_a_linear_layer_that_computes_something_else_takes_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class got another forward after wrapping, or a mode or a patch changes ``F.linear``; a default device may."""
    layer = adapted(nn.Linear(5, 4)).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    plain, linear = nn.Linear.forward, F.linear
    with Doubling():
        assert_agree(layer, x, fused=False)
    with torch.device("cpu"):
        assert_agree(layer, x)
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", lambda *args: 2 * linear(*args))
        assert_agree(layer, x, fused=False)

    @functools.wraps(plain)
    def patched(self: nn.Linear, x: Tensor) -> Tensor:
        return plain(self, x).tanh()

    monkeypatch.setattr(nn.Linear, "forward", patched)
    assert_agree(layer, x, fused=False)


def test_a_base_that_was_resized_says_so(toys: "Toys") -> None:
    """In either direction and form, and not a mismatch of shapes inside torch."""
    for out, into in ((6, 5), (2, 5), (4, 7), (1, 5)):
        layer = adapted(nn.Linear(5, 4))
        layer.weight.data, layer.bias.data = torch.randn(out, into), torch.randn(out)
        layer.out_features, layer.in_features = out, into
        for form in (contextlib.nullcontext, plain_form):
            with form(), pytest.raises(AdapterError, match=r"Linear was resized after .* resize the model first"):
                layer(torch.randn(3, into))


def test_other_dtypes_and_layouts_take_the_plain_form() -> None:
    """fp32 adapters on a bf16 base multiply in fp32 without autocast; nothing else is overwritten."""
    layer = adapted(nn.Linear(5, 4))
    layer.bfloat16().tunerkit.float()
    assert not is_fused(layer(torch.randn(3, 5).bfloat16()))
    jagged = torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)], layout=torch.jagged)
    assert not is_fused(adapted(nn.Linear(5, 4))(jagged))


def operations(model: nn.Module) -> int:
    x = torch.randn(2, 3, 8, requires_grad=True)
    with Counting() as mode:
        model(x).sum().backward()
    return mode.count


def test_a_training_step_dispatches_few_operations(toys: "Toys") -> None:
    """Forward and backward above the frozen layer: 14 per adapted layer with two factors, 19 with a diagonal."""
    depth = 6
    base = nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth)))
    floor = operations(copy.deepcopy(base).requires_grad_(False))
    model = tunerkit.wrap(copy.deepcopy(base), "toy-low-rank", {"targets": "re:\\d+"})
    assert operations(model) - floor <= 14 * depth
    for diagonal, limit in ((False, 14), (True, 19)):
        make = functools.partial(Product, rank=3, diagonal=diagonal)
        layers = [adapted(nn.Linear(8, 8), make) for _ in range(depth)]
        assert operations(nn.Sequential(*layers)) - floor <= limit * depth
