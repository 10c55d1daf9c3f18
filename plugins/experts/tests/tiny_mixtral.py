"""A tiny Mixtral, its data, and a training loop."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

import tunerkit

IDS = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(2))
STACK = "model.layers.0.mlp.experts.stacks.gate_up_proj"


def mixtral(form: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    """Build the same two blocks of four experts at each call, with weights large enough to matter."""
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = transformers.MixtralForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    model.set_experts_implementation(form)
    return model.eval().to(dtype)


def logits(model: Any) -> Tensor:
    """The output for `IDS`, (4, 9, 64), without gradients."""
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def wrapped(method: str, model: Any = None, **config: Any) -> Any:
    """A Mixtral with adapters on its experts."""
    base = mixtral() if model is None else model
    return tunerkit.wrap(base, method, {"targets": ["experts"], **config}, seed=0)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Adam with an eps above the rounding of gradients that are 0 but for it, which it would scale up to steps."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, eps=1e-4)


def train(model: Any, steps: int = 3) -> None:
    """Take steps over all of `IDS`."""
    optimizer = adam(model)
    tunerkit.attach(model, optimizer, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))  # 0 for two tensors of 0
