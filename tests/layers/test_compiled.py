"""Low-rank products in compiled models on a CPU: one operation for a layer, the same numbers, and where it is not."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support.products import Product, adapted
from tunerkit.layers import compiled, products, torch_private

OPERATION = "tunerkit.linear_low_rank"


@pytest.fixture(autouse=True)
def small_inputs_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The layers here are small. What was compiled before is forgotten, and what is compiled here too."""
    monkeypatch.setattr(compiled, "LEAST_NUMBERS", 0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def model(*, bias: bool = True, **product: Any) -> nn.Sequential:
    """Two adapted layers; by default everything is in fp32."""
    torch.manual_seed(0)
    layers = (nn.Linear(6, 9, bias=bias), nn.Linear(9, 5, bias=bias))
    first, last = (adapted(each, lambda base: Product(base, 3, **product)) for each in layers)
    return nn.Sequential(first, nn.Tanh(), last)


def results(call: Callable[[Tensor], Tensor], own: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x, if it needs one, and of all trained parameters."""
    wanted = [*([x] if x.requires_grad else []), *(p for p in own.parameters() if p.requires_grad)]
    y = call(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]


def operations(call: Callable[..., object], *args: object) -> int:
    """How many layers of what is called are one operation, once it is compiled; a graph break is an error."""
    counter = torch_private.compile_counter("aot_eager")
    torch.compile(call, backend=counter, fullgraph=True)(*args)
    modules = [module for graph in counter.graphs for module in graph.modules() if hasattr(module, "graph")]
    return sum(str(node.target).startswith(OPERATION) for module in modules for node in module.graph.nodes)


@pytest.mark.parametrize(
    ("backend", "diagonal", "bias", "needs", "library"),
    [
        ("inductor", True, True, True, "blas"),
        ("aot_eager", True, False, True, "onednn"),
        ("aot_eager", False, True, True, "onednn"),
        ("aot_eager", False, True, False, "blas"),
    ],
)
def test_outputs_and_gradients_are_those_of_the_eager_model(
    backend: str, diagonal: bool, bias: bool, needs: bool, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By both libraries, with and without a gradient of the input, for several batch sizes and two compilations."""
    if library == "onednn":
        monkeypatch.setattr(products, "prefers_onednn", lambda: True)
        monkeypatch.setattr(products, "LEAST_NUMBERS", 0)
    own = model(bias=bias, diagonal=diagonal)
    counter = torch_private.compile_counter(backend)
    call = torch.compile(own, backend=counter, fullgraph=True)
    for size in (4, 7, 2):
        x = torch.randn(size, 3, 6, requires_grad=needs)
        torch.testing.assert_close(results(call, own, x), results(own, own, x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2
    assert operations(own, x) == 2


def frozen_but(own: nn.Sequential, name: str) -> nn.Sequential:
    own.get_parameter(name).requires_grad_()
    return own


def by_row(own: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.vmap(lambda row: own(row))(x)


def differentiated(own: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.func.grad(lambda x: own(x).sum())(x)


WITHOUT: dict[str, Callable[[Tensor], int]] = {
    "dropout": lambda x: operations(model(dropout=0.5), x),
    "another dtype": lambda x: operations(model().double(), x.double()),
    "a trained base": lambda x: operations(frozen_but(model(), "0.weight"), x) - 1,
    "a trained bias": lambda x: operations(frozen_but(model(), "2.bias"), x) - 1,
    "vmap": lambda x: operations(by_row(model()), x),
    "a transform that differentiates": lambda x: operations(differentiated(model()), x),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_what_the_operations_do_not_know_has_the_plain_form(name: str) -> None:
    """Dropout, dtypes, weights that are trained, transforms of torch.func; a layer at a time."""
    assert WITHOUT[name](torch.randn(4, 3, 6)) == 0


def test_autocast_and_small_inputs_and_another_hook_have_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is looked at while the graph is traced."""
    own, x = model(), torch.randn(4, 3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert operations(own, x) == 0
    monkeypatch.setattr(compiled, "LEAST_NUMBERS", 4 * 3 * 9)
    assert operations(own, x) == 1
    monkeypatch.setattr(compiled, "LEAST_NUMBERS", 0)
    own[0].register_forward_hook(lambda module, args, output: output * 2, prepend=True)
    call = torch.compile(own, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(call(x), own(x))
    assert operations(own, x) == 1


def test_the_first_of_two_adapters_is_in_the_operation() -> None:
    """The second adds to what is no longer the base layer's own output."""
    torch.manual_seed(0)

    class Adding(Product):
        reads_output = False

    own = adapted(nn.Linear(6, 5), lambda base: Adding(base, 3), lambda base: Adding(base, 2))
    x = torch.randn(4, 6, requires_grad=True)
    call = torch.compile(own, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(call, own, x), results(own, own, x), rtol=1e-4, atol=1e-4)
    assert operations(own, x) == 1


def test_a_checkpoint_recomputes_the_operation() -> None:
    """Within its graph too, and gradients are the same."""
    own, x = model(), torch.randn(4, 3, 6, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        found: Tensor = checkpoint(own, x, use_reentrant=False)
        return found

    for found, expected in zip(
        results(torch.compile(call, backend="aot_eager", fullgraph=True), own, x), results(own, own, x), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert operations(call, x) == 2


def test_an_exported_model_has_operations_that_others_know() -> None:
    """Whoever reads an exported graph may not have tunerkit."""
    graph = torch.export.export(model().eval(), (torch.randn(4, 3, 6),)).graph
    assert not [node for node in graph.nodes if str(node.target).startswith(OPERATION)]


def test_autocast_in_the_backward_alone_changes_nothing() -> None:
    """The operations know nothing of it when they are traced."""
    own, x = model(), torch.randn(4, 3, 6, requires_grad=True)
    weights = [x, *(p for p in own.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(own(x).square().sum(), weights)
    loss = torch.compile(own, backend="aot_eager", fullgraph=True)(x).square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(loss, weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Breaking(Product):
    """Its forward breaks the graph."""

    def forward(self, base: Any, x: Tensor, y: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(base, x, y)


def test_a_graph_that_breaks_in_an_adapter_computes_the_same() -> None:
    """Dynamo then traces what a hook calls, and not the hook."""
    own = adapted(nn.Linear(6, 5), lambda base: Breaking(base, 3))
    x = torch.randn(4, 6, requires_grad=True)
    call = torch.compile(own, backend="aot_eager")
    torch.testing.assert_close(results(call, own, x), results(own, own, x), rtol=1e-4, atol=1e-4)
    assert not vars(call(x))


def test_sizes_that_only_the_run_knows_are_no_question_to_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that depend on data, or that the user has bounded. Sizes known to be small have the plain form."""
    monkeypatch.setattr(compiled, "LEAST_NUMBERS", 300)
    own, x = model(), torch.randn(40, 6)
    for size in (40, 60):
        x = torch.randn(size, 6)
        torch._dynamo.mark_dynamic(x, 0, min=2, max=1024)
        assert operations(own, x) == 2
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert operations(lambda x, some: own(x[some]), torch.randn(60, 6), torch.arange(60) % 2 == 0) == 2
    torch.compiler.reset()  # it remembers which sizes have changed
    assert operations(own, torch.randn(40, 6)) == 1


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)], ids=str)
@pytest.mark.parametrize("least", [0, 1 << 40], ids=["one operation", "plain"])
def test_inductor_keeps_the_scale(shape: tuple[int, ...], least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fusion of a matrix product with a sum ignores the sum's alpha; inputs with two dimensions have such a sum."""
    monkeypatch.setattr(compiled, "LEAST_NUMBERS", least)
    torch.manual_seed(0)
    own = adapted(nn.Linear(6, 5, bias=False), lambda base: Product(base, 3, diagonal=False))
    x = torch.randn(shape, requires_grad=True)
    call = torch.compile(own, fullgraph=True)
    torch.testing.assert_close(results(call, own, x), results(own, own, x), rtol=1e-4, atol=1e-4)


def test_second_derivatives_without_a_graph_of_the_backward() -> None:
    """The backend that runs operations as they are has them."""
    own = model()
    x = torch.randn(4, 6, requires_grad=True)

    def second(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        weights = [x, *(p for p in own.parameters() if p.requires_grad)]
        first = torch.autograd.grad(call(x).square().sum(), weights, create_graph=True)
        return [*torch.autograd.grad(torch.stack([each.square().sum() for each in first]).sum(), weights)]

    call = torch.compile(own, backend="eager", fullgraph=True)
    torch.testing.assert_close(second(call), second(own), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_the_operations_keep_what_torch_asks_of_one(bias: bool) -> None:
    """Torch's own check: schemas, shapes without values, derivatives, dynamic sizes."""
    x, w, q, p = (torch.randn(size, requires_grad=True) for size in ((2, 4, 6), (5, 6), (3, 6), (5, 3)))
    w = w.detach()
    torch.library.opcheck(compiled.linear_low_rank, (x, w, torch.randn(5) if bias else None, q, p, 0.5))
    g, h = torch.randn(2, 4, 5), torch.randn(8, 3)
    x, q, p = x.detach(), q.detach(), p.detach()
    columns = torch.randn(6, 20).t(), torch.randn(20, 5).t()  # neither thin nor by row
    torch.library.opcheck(compiled.gradients, (g, x, w, torch.randn(8, 20), *columns, 0.5))
    torch.library.opcheck(compiled.gradients, (g, x, w if bias else None, h, q, p, 0.5))
