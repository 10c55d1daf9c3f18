"""Adapters that peft itself makes: drawn by Hypothesis, given random values or really pruned, and saved."""

from pathlib import Path
from typing import Any

import attrs
import peft
import torch
from hypothesis import strategies as st
from torch import nn

from plugins.peft.tests.peft_models import Case


@attrs.frozen
class Drawn:
    """The options of one adapter.

    Attributes:
        config: peft's config.
        steps: For AdaLoRA, after how many steps of real pruning it is saved.
        seed: Of its values.
    """

    config: peft.LoraConfig
    steps: int
    seed: int


@st.composite
def adapters(draw: st.DrawFn, case: Case) -> Drawn:
    """Draw a LoRA or AdaLoRA for a model."""
    adaptive = bool(case.linear) and draw(st.integers(0, 3)) == 0
    names = draw(st.lists(st.sampled_from(case.linear if adaptive else case.names), min_size=1, unique=True))
    shared: dict[str, Any] = {
        "target_modules": names,
        "lora_dropout": draw(st.sampled_from((0.0, 0.1))),
        "bias": draw(st.sampled_from(case.biases)),
        "modules_to_save": [head for head in case.heads if head not in names and draw(st.booleans())] or None,
    }
    seed = draw(st.integers(0, 999))
    if adaptive:
        initial = draw(st.integers(3, 6))
        adaptive_config = peft.AdaLoraConfig(
            init_r=initial,
            target_r=draw(st.integers(1, initial - 2)),
            total_step=6,
            lora_alpha=draw(st.sampled_from((0, 8, 5))),
            **shared,
        )
        return Drawn(adaptive_config, draw(st.sampled_from((0, 4, 6))), seed)
    patterned = draw(st.lists(st.sampled_from(names), unique=True))
    config = peft.LoraConfig(
        r=draw(st.integers(1, 9)),
        lora_alpha=draw(st.sampled_from((1, 8, 16, 7))),
        use_rslora=draw(st.booleans()),
        init_lora_weights=draw(st.sampled_from((True, "gaussian"))),
        rank_pattern={name: draw(st.integers(1, 5)) for name in patterned},
        alpha_pattern={name: draw(st.integers(1, 20)) for name in patterned if draw(st.booleans())},
        **shared,
    )
    return Drawn(config, 0, seed)


def save(case: Case, drawn: Drawn, folder: Path) -> None:
    """Let peft make the adapter, and save it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(drawn.seed)
        model: Any = peft.get_peft_model(case.build(), drawn.config)  # type: ignore[arg-type]
        randomize_(model)
        if drawn.steps:
            with torch.enable_grad():
                _prune_(case, model, drawn.steps)
        model.save_pretrained(str(folder))


def loaded(case: Case, folder: Path) -> nn.Module:
    """What peft makes of a folder."""
    model = peft.PeftModel.from_pretrained(case.build(), str(folder))  # type: ignore[arg-type]
    return model.eval()


def randomize_(model: nn.Module) -> None:
    """Give everything that is trained random values. The padding row of an embedding gets no gradient, so it stays."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
            if "lora_embedding_A" in name:
                layer: Any = model.get_submodule(name.rpartition(".lora_embedding_A")[0])
                if layer.get_base_layer().padding_idx is not None:
                    parameter[:, layer.get_base_layer().padding_idx] = 0


def _prune_(case: Case, model: Any, steps: int) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(steps + 1):
        case.output(model).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
