"""Parity with PEFT's AdaLoRA where PEFT is right: float64, same weights, data and scale, shrinking off."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit_adalora import AdaLoraConfig
from tunerkit_adalora.svd_layer import SvdLayer

peft = pytest.importorskip("peft", reason="peft is the peer that these tests compare with")
pytest.importorskip("transformers", reason="Conv1D is a transformers layer")
from transformers.modeling_outputs import SequenceClassifierOutput  # noqa: E402  # after the skip
from transformers.pytorch_utils import Conv1D  # noqa: E402  # after the skip

STEPS = 100
INIT_RANK, TARGET_RANK, ALPHA = 6, 3, 12.0


class Linears(nn.Module):
    """Three adapted linear layers; outputs carry ``.loss``, where peft adds its regulariser."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(10, 12), nn.Linear(12, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        return _classified(self.third(torch.tanh(self.second(torch.tanh(self.first(x))))), labels)


class Conv1Ds(nn.Module):
    """The same with transformers' Conv1D, whose weight is stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Conv1D(12, 10), Conv1D(4, 12)

    def forward(self, x: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        return _classified(self.second(torch.tanh(self.first(x))), labels)


class Convs(nn.Module):
    """Two convolutions with zero padding (peft gets the other padding modes wrong) and a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, stride=2)

    def forward(self, x: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        return _classified(self.second(torch.tanh(self.first(x))).mean((2, 3)), labels)


def _classified(logits: Tensor, labels: Tensor) -> SequenceClassifierOutput:
    return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


MODELS = {"linear": (Linears, (10,)), "conv1d": (Conv1Ds, (10,)), "conv2d": (Convs, (3, 7, 7))}


def _model(name: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name][0]().double()


def _batches(name: str) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        x = torch.randn(8, *MODELS[name][1], generator=generator, dtype=torch.float64)
        yield x, torch.randint(0, 4, (8,), generator=generator)


def _names(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | Conv1D)]


def _peft_run(name: str, gamma: float) -> Iterator[dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """Peft's weights (P, λ, Q by module) after each step; the first item is the start."""
    model = _model(name)
    names = _names(model)
    config = peft.AdaLoraConfig(
        target_r=TARGET_RANK, init_r=INIT_RANK, lora_alpha=ALPHA, tinit=10, tfinal=30, deltaT=5, beta1=0.85, beta2=0.85,
        orth_reg_weight=gamma, total_step=STEPS, target_modules=names, fan_in_fan_out=name == "conv1d",
    )  # fmt: skip
    torch.manual_seed(11)
    wrapped = peft.get_peft_model(model, config).double()
    # peft leaves its ranks ("ranknum", a constant in the scale) trainable, so that an optimizer moves and decays them.
    for parameter_name, parameter in wrapped.named_parameters():
        if "ranknum" in parameter_name:
            parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=2e-2)

    def weights() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        found = {}
        for path in names:
            layer = wrapped.base_model.model.get_submodule(path)
            parts = (layer.lora_B["default"], layer.lora_E["default"][:, 0], layer.lora_A["default"])
            found[path] = tuple(part.detach().clone() for part in parts)
        return found

    yield weights()
    for step, (x, labels) in enumerate(_batches(name), 1):
        # Through base_model: without a task type peft's outer forward never applies its regulariser.
        wrapped.base_model(x, labels=labels).loss.backward()
        optimizer.step()
        wrapped.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        yield weights()


@pytest.mark.parametrize("gamma", [0.0, 0.5], ids=["regulariser off", "regulariser on"])
@pytest.mark.parametrize("name", list(MODELS))
def test_weights_and_masks_are_peft_s_at_every_step(name: str, gamma: float) -> None:
    """Over 100 steps in float64 every mask equals PEFT's, and every weight is within 1e-9 of PEFT's."""
    theirs = list(_peft_run(name, gamma))
    model = tunerkit.wrap(
        _model(name),
        "adalora",
        AdaLoraConfig(
            target_rank=TARGET_RANK,
            init_rank=INIT_RANK,
            alpha=ALPHA * INIT_RANK / (INIT_RANK + 1e-5),
            t_init=10,
            t_final=30,
            delta_t=5,
            shrink=False,
            gamma=gamma,
            orthogonality="reference",
            adapter_dtype="float64",
            targets=tuple(_names(_model(name))),
            start="gaussian",
        ),
    )
    tuner = tunerkit.tuner(model)
    layers = {path: layer for path, layer in tuner.adapters().items() if isinstance(layer, SvdLayer)}
    with torch.no_grad():
        for path, (p, lam, q) in theirs[0].items():
            for own, other in ((layers[path].p, p), (layers[path].lam, lam), (layers[path].q, q)):
                own.copy_(other)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    tunerkit.attach(model, optimizer, total_steps=STEPS)
    masked_steps = 0
    for step, (x, labels) in enumerate(_batches(name), 1):
        model(x, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for path, (p, lam, q) in theirs[step].items():
            layer = layers[path]
            for own, other in ((layer.p, p), (layer.lam, lam), (layer.q, q)):
                assert (own - other).abs().max() <= 1e-9, f"{path} at step {step}"
            if (lam == 0).any():
                assert torch.equal(layer.lam == 0, lam == 0), f"mask of {path} at step {step}"
                masked_steps += 1
        assert sum(tuner.ranks().values()) == tuner.budget(step)
    assert masked_steps > 2 * 30
    assert sum(tuner.ranks().values()) == TARGET_RANK * len(layers)
