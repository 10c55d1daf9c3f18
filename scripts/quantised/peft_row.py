"""One row of the table for peft."""

import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.quantised.forms import REPACKS, quantised
from scripts.quantised.training import (
    RANK,
    STEPS,
    TARGETS,
    Package,
    batch,
    equal_or_share,
    how_it_resumes,
    logits,
    share,
    trained,
)


def of_peft(folder: str, form: str, method: str) -> Iterator[str]:
    """The cells of one row, in the columns' order."""
    peft: Any = importlib.import_module("peft")

    def fresh() -> Any:
        return quantised(folder, form, repacked=False)

    def allocate(model: Any, step: int) -> None:
        if method == "adalora":
            model.base_model.update_and_allocate(step)

    package = Package(
        parameters=_parameters,
        start=lambda model, optimizer: None,
        after=allocate,
        save=lambda model, saved: model.save_pretrained(saved),
        load=lambda saved: peft.PeftModel.from_pretrained(fresh(), saved, is_trainable=True),
    )
    base = logits(fresh())
    model: Any = peft.get_peft_model(fresh(), _config(peft, method))
    with tempfile.TemporaryDirectory() as saved:
        complete = trained(package, model, Path(saved))
        yield ("yes" if complete else "**no gradient**") + _unless_repacked(folder, form, _config(peft, method))
        yield "masks" if method == "adalora" else "exact"
        output = logits(model)
        model.save_pretrained(Path(saved) / "end")
        loaded = peft.PeftModel.from_pretrained(fresh(), Path(saved) / "end")
        yield equal_or_share(logits(loaded), output, base)
        yield how_it_resumes(lambda again: equal_or_share(logits(again), output, base), package, Path(saved))
    model.merge_adapter()
    merged = logits(model)
    yield "**nothing happens**" if share(merged, base, output) == "0.0e+00" else share(merged, output, base)
    model.unmerge_adapter()
    yield equal_or_share(logits(model), output, base)
    yield "–"


def _parameters(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _config(peft: Any, method: str) -> Any:
    torch.manual_seed(0)
    if method == "lora":
        return peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS))
    return peft.AdaLoraConfig(
        target_r=RANK,
        init_r=2 * RANK,
        total_step=STEPS,
        tfinal=2,
        target_modules=list(TARGETS),
        lora_alpha=2 * RANK,
    )


def _unless_repacked(folder: str, form: str, config: Any) -> str:
    """What becomes of peft's gradients if bitsandbytes repacks 4-bit weights, which only some CPUs do."""
    peft: Any = importlib.import_module("peft")

    model: Any = peft.get_peft_model(quantised(folder, form), config)
    if not any(getattr(module, REPACKS, False) for module in model.modules()):
        return ""
    logits(model)
    ids = batch()
    try:
        model.train()(ids, labels=ids).loss.backward()
    except (RuntimeError, TypeError):
        return " (repacked: **error**)"
    missing = [p for p in model.parameters() if p.requires_grad and p.grad is None]
    return f" (repacked: **{len(missing)} tensors without**)" if missing else ""
