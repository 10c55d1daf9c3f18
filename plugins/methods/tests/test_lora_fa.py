"""LoRA-FA trains B as PEFT's optimizer of that name does."""

import copy
from typing import Any

import peft
import torch
from peft.optimizers import create_lorafa_optimizer
from torch import Tensor, nn

import tunerkit
from tunerkit_methods.lora_fa import HalfFixed

LEAVES = ("0", "2")


def test_trains_as_pefts_optimizer_does() -> None:
    """In fp64, A stays as it is, and B is within 1e-9 of PEFT's after 20 steps; ε of Adam is 0, which they scale apart.

    PEFT rounds the gradient to bf16, except in fp64.
    """
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)).double()
    theirs: Any = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(LEAVES))
    )
    theirs = theirs.double()
    ours = tunerkit.wrap(base, "lora-fa", {"rank": 3, "alpha": 6, "targets": LEAVES, "adapter_dtype": "float64"})
    adapters = tunerkit.tuner(ours).adapters()
    layers = {name: theirs.base_model.model.get_submodule(name) for name in LEAVES}
    with torch.no_grad():
        for name in LEAVES:
            layers[name].lora_A["default"].weight.copy_(adapters[name].get_parameter("a"))
    mine = torch.optim.AdamW(tunerkit.param_groups(ours, lr=1e-2), eps=0.0, weight_decay=0.0)
    tunerkit.attach(ours, mine, total_steps=20)
    other = create_lorafa_optimizer(theirs, r=3, lora_alpha=6, lr=1e-2)
    other.param_groups[0]["eps"] = 0.0
    for model, optimizer in ((ours, mine), (theirs, other)):
        torch.manual_seed(1)
        for _ in range(20):
            model(torch.randn(16, 12, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name in LEAVES:
        adapter, layer = adapters[name], layers[name]
        assert isinstance(adapter, HalfFixed)
        assert torch.equal(adapter.a, layer.lora_A["default"].weight)
        assert adapter.b.abs().max() > 0.1
        assert (adapter.b - layer.lora_B["default"].weight).abs().max() <= 1e-9


def test_a_step_of_gradient_descent_moves_the_product_as_near_to_the_full_gradient_as_it_can() -> None:
    """With its change of B, s B A moves by the projection of the step that W would take on the rows of A."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 5)).double()
    model = tunerkit.wrap(base, "lora-fa", {"rank": 3, "alpha": 6, "targets": ["0"], "adapter_dtype": "float64"})
    optimizer = torch.optim.SGD(tunerkit.param_groups(model, lr=1.0))
    tunerkit.attach(model, optimizer, total_steps=1)
    x = torch.randn(8, 12, dtype=torch.float64)
    y = model(x)
    (slope,) = torch.autograd.grad(y.square().sum(), y, retain_graph=True)
    y.square().sum().backward()
    optimizer.step()
    adapter = tunerkit.tuner(model).adapters()["0"]
    assert isinstance(adapter, HalfFixed)
    full, rows = slope.T @ x, adapter.a.detach()
    projected = full @ torch.linalg.pinv(rows) @ rows
    torch.testing.assert_close(adapter.scale * adapter.b.detach() @ rows, -projected, atol=1e-6, rtol=1e-6)


def kept(method: str) -> int:
    """The bytes that a forward keeps for backward, without parameters."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(3)]
    model = tunerkit.wrap(nn.Sequential(*layers), method, {"targets": "all-linear", "rank": 2})
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(torch.randn(64, 32, requires_grad=True))
    assert out.requires_grad
    return sum(seen.values())


def test_keeps_no_input_of_a_layer_for_backward() -> None:
    """Of three layers, LoRA keeps each input; LoRA-FA keeps A x, which is smaller."""
    assert kept("lora-fa") < 0.6 * kept("lora")
