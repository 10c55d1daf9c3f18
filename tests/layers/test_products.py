"""By which library products are computed: one test for each branch, and the same numbers from all of them."""

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import tunerkit
from tests.support.toys import Toys
from tunerkit.layers import products, torch_private
from tunerkit_testing.product_forms import fused_form, plain_form

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """The answer about the processor is kept for good."""
    products.prefers_onednn.cache_clear()
    yield
    products.prefers_onednn.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """On any processor, large fp32 products go to oneDNN, and each asks for it."""
    found: list[object] = []
    own = torch_private.onednn_product

    def note() -> object:
        found.append(own())
        return found[-1]

    monkeypatch.setattr(torch_private, "onednn_product", note)
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(products, "LEAST_NUMBERS", 0)
    with fused_form():
        yield found


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
@pytest.mark.parametrize("mkl", [True, False])
@pytest.mark.parametrize("amd", [True, False])
def test_onednn_is_preferred_where_mkl_leaves_avx512_unused(
    capability: str, mkl: bool, amd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three are needed: each was measured, or is not known."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(products, "is_amd", lambda: amd)
    assert products.prefers_onednn() == ((capability, mkl, amd) == ("AVX512", True, True))


def test_the_system_names_the_maker_of_the_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Linux in a file, Windows through Python; a system that has neither names none."""
    for name, text in (("amd", "vendor_id\t: AuthenticAMD\n"), ("intel", "vendor_id\t: GenuineIntel\n")):
        (tmp_path / name).write_text(text * 1000)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(products, "CPUINFO", tmp_path / "amd")
    assert products.is_amd()
    monkeypatch.setattr(products, "CPUINFO", tmp_path / "intel")
    assert not products.is_amd()
    monkeypatch.setattr(products, "CPUINFO", tmp_path / "none")
    assert not products.is_amd()
    monkeypatch.setattr(platform, "processor", lambda: "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD")
    assert products.is_amd()


@needs_onednn
@pytest.mark.parametrize("rank", [1, 3, 12, 16, 40])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_both_libraries_return_the_same_products(rank: int, scale: float, calls: list[object]) -> None:
    """All three forms, for factors by row and by column. Sums of small whole numbers are exact in any order."""
    torch.manual_seed(rank)
    sizes = ((50, 33), (rank, 33), (50, 21), (21, rank), (21, 33))
    x, q, g, p, w = (torch.randint(-4, 5, size).float() for size in sizes)
    with torch.no_grad():
        h, d = products.multiply(x, q.t()), products.multiply(g, p)
        found = [h, d, products.multiply(g, w)]
        found += [products.gradient(d, x, q, scale), products.gradient(h, g, p.t(), scale)]
    x, q, g, p, w, h, d = (each.double() for each in (x, q, g, p, w, h, d))
    expected = [x @ q.t(), g @ p, g @ w, scale * d.t() @ x, scale * h.t() @ g]
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own.double(), other)
    assert len(calls) == len(found)
    assert None not in calls


@pytest.mark.parametrize(
    ("threads", "rows", "dtype", "parts"),
    [
        (1, 60, torch.float32, 1),
        (2, 60, torch.float32, 2),
        (2, 61, torch.float32, 1),
        (2, 22, torch.float32, 1),
        (5, 60, torch.float32, 5),
        (5, 61, torch.float32, 0),
        (5, 55, torch.float32, 0),
        (5, 60, torch.float64, 5),
        (5, 60, torch.bfloat16, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_thin_product_has_a_part_for_each_thread(
    threads: int, rows: int, dtype: torch.dtype, parts: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all forms it is the product: of as many parts, of one, and with the thin factor on the right."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(products, "prefers_onednn", lambda: False)
    monkeypatch.setattr(products, "LEAST_NUMBERS", 0)
    torch.manual_seed(0)
    x, q, h = (torch.randn(size).to(dtype) for size in ((rows, 33), (3, 33), (rows, 3)))
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        found = [products.multiply(x, q.t()), products.gradient(h, x, q, scale)]
        found.append(products.gradient(h, x, q.t().contiguous().t(), scale))
    x, q, h = x.double(), q.double(), h.double()
    tolerance = 0.1 if dtype is torch.bfloat16 else 1e-4
    for own, other in zip(found, [x @ q.t(), scale * h.t() @ x, scale * h.t() @ x], strict=True):
        torch.testing.assert_close(own.double(), other, rtol=tolerance, atol=tolerance)
    # By name of the operation: the shapes of its left sides.
    left = {
        name: [event.input_shapes["add" in name] for event in recorded.events() if event.name == f"aten::{name}"]
        for name in ("mm", "addmm", "bmm", "baddbmm")
    }
    if parts > 1:
        piece = rows // parts
        assert left == {"mm": [], "addmm": [], "bmm": [[parts, 3, 33]], "baddbmm": [[parts, 3, piece]] * 2}
    else:
        turned = [3, rows] if parts else [33, rows]  # where the gradient's own strides do not ask for rows
        assert left == {
            "mm": [[3, 33] if parts else [rows, 33]],
            "addmm": [[3, rows], turned],
            "bmm": [],
            "baddbmm": [],
        }


@needs_onednn
def test_outputs_and_gradients_and_second_derivatives_are_the_plain_form_s(
    toys: "Toys", calls: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is differentiated twice is computed by what can be; a mode that counts operations sees those it knows."""
    torch.manual_seed(0)
    model = tunerkit.wrap(nn.Sequential(nn.Linear(9, 7)), "toy-low-rank", {"targets": "re:.*"}, seed=0)
    weights = [p for p in model.parameters() if p.requires_grad]
    for weight in weights:
        nn.init.normal_(weight, std=0.3)
    x = torch.randn(4, 5, 9, requires_grad=True)

    def numbers() -> list[Tensor]:
        y = model(x)
        first = torch.autograd.grad(y.square().sum(), [x, *weights], create_graph=True)
        second = torch.autograd.grad(torch.stack([each.square().sum() for each in first]).sum(), [x, *weights])
        return [y, *first, *second, *torch.autograd.grad(model(x).square().sum(), [x, *weights])]

    found = numbers()
    assert calls
    assert None not in calls
    with plain_form():
        expected = numbers()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    counts = []
    for prefers in (True, False):
        monkeypatch.setattr(products, "prefers_onednn", lambda prefers=prefers: prefers)
        y = model(x.detach().requires_grad_()).square().sum()
        del calls[:]
        with FlopCounterMode(display=False) as counted:
            y.backward()
        assert set(calls) == ({None} if prefers else set())
        counts.append(counted.get_total_flops())
    assert counts[0] == counts[1] > 0


@needs_onednn
def test_what_onednn_is_not_for_goes_to_blas(calls: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Small activations, other dtypes, activations with gaps, what is differentiated, and a user who turned it off."""
    x, w = torch.randn(6, 8), torch.randn(3, 8)
    products.multiply(x, w.t().requires_grad_()).sum().backward()
    with torch.no_grad():
        products.multiply(x.double(), w.double().t()), products.multiply(x.bfloat16(), w.bfloat16().t())
        products.multiply(x.repeat(1, 2)[:, :8], w.t())
        monkeypatch.setattr(products, "LEAST_NUMBERS", 49)
        products.multiply(x, w.t())
        assert not calls
        monkeypatch.setattr(products, "LEAST_NUMBERS", 48)
        with torch.backends.mkldnn.flags(enabled=False):
            products.multiply(x, w.t())
        assert calls == [None]
        products.multiply(x, w.t())
    assert calls[-1] is not None
