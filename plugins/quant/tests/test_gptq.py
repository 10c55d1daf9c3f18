"""GPTQ: trained and made dense; merging is refused. GPTQModel has a venv of its own, so these are often skipped."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tunerkit
from plugins.quant.tests.quantised import TARGETS, X, dense

pytest.importorskip("gptqmodel", reason="GPTQModel is not installed")
METHODS: dict[str, dict[str, Any]] = {"lora": {"rank": 4, "alpha": 8}, "adalora": {"target_rank": 2, "init_rank": 4}}


def gptq() -> Any:
    """`dense` in GPTQ's format of 4 bits, rounded to the nearest: the format is what matters here."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    model: Any = dense()
    for path in TARGETS:
        old = model[int(path)]
        sizes = {"in_features": old.in_features, "out_features": old.out_features, "bias": old.bias is not None}
        layer = TorchLinear(bits=4, group_size=32, sym=True, desc_act=False, **sizes)
        scales = old.weight.detach().view(old.out_features, -1, 32).abs().amax(-1) / 7
        layer.pack(old, scales, torch.full_like(scales, 8), torch.arange(old.in_features, dtype=torch.int32) // 32)
        layer.post_init()
        model[int(path)] = layer
    return model


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_saves_loads_and_becomes_dense(method: str, tmp_path: Path) -> None:
    """Gradients reach every adapter after a forward in eval mode; the dense model computes the same."""
    pytest.importorskip(f"tunerkit_{method}")
    model = tunerkit.wrap(gptq(), method, {**METHODS[method], "targets": list(TARGETS)}, seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tunerkit.attach(model, optimizer, total_steps=12)
    wanted = torch.randn(len(X), 4, generator=torch.Generator().manual_seed(2))
    losses = []
    for step in range(12):
        model.eval()
        model(X)
        model.train()
        loss = (model(X) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in tunerkit.tuner(model).named_parameters():
            assert step < 2 or parameter.grad is None or parameter.grad.any() or not parameter.numel(), name
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    output = model.eval()(X)
    assert torch.equal(tunerkit.load(gptq(), tunerkit.save(model, tmp_path)).eval()(X), output)
    with pytest.raises(tunerkit.errors.AdapterError, match="as GPTQ int4, and GptqLayer cannot write it"):
        tunerkit.merge(model)
    with pytest.warns(tunerkit.TunerkitWarning, match="2 layers: GPTQ int4 -> float32"):
        tunerkit.load(dense(), tmp_path)
    expected = model(X)
    plain = tunerkit.unwrap(model, keep_merged=True, dtype=torch.float32)
    assert (plain(X) - expected).abs().max() <= 2e-3 * expected.abs().max()  # its scales are fp16


def test_packed_shapes_that_do_not_unpack() -> None:
    """The layer says another size than its packed weight: an adapter would fit neither."""
    model = gptq()
    model[0].in_features = 32
    with pytest.raises(tunerkit.errors.TargetError, match=r"packed weight of shape \(128, 64\), .* say \(128, 32\)"):
        tunerkit.wrap(model, "lora", {"targets": ["0"]})


def test_a_kernel_without_a_backward_is_refused() -> None:
    """GPTQModel chooses the fastest kernel of the machine, which need not pass gradients."""
    model = gptq()
    own = type(model[0])
    kernel = type("Fast", (own,), {"forward": own.forward, "__module__": "gptqmodel.nn_modules.qlinear.fast"})
    model[0].__class__ = kernel
    with pytest.raises(tunerkit.errors.TargetError, match=r"kernel Fast.*BACKEND\.GPTQ_TORCH"):
        tunerkit.wrap(model, "lora", {"targets": ["0"]})
