"""PEFT's folder of each method that it has is read, and what is written PEFT reads."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import tunerkit
from plugins.methods.tests.test_ln_tuning import base as normed
from plugins.methods.tests.test_peft_parity import LEAVES, ROWS, Net
from plugins.methods.tests.test_trainable_tokens import IDS, words

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))


STARTS = {"miss": {"init_weights": True}}  # where another start is another method in PEFT


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def embedded() -> nn.Module:
    model = words()
    del model.config  # PEFT wants one of transformers
    return model


# By method: the base, PEFT's config and the input; of several rows for one method, the first.
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Tensor]] = {
    row.method: (net, row.config(target_modules=list(LEAVES), **{**row.arguments, **STARTS.get(row.method, {})}), X)
    for row in reversed(ROWS)
} | {
    "ln-tuning": (lambda: normed("LayerNorm").float(), peft.LNTuningConfig(target_modules=["1"]), X),
    "trainable-tokens": (
        embedded,
        peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[7, 2], init_weights=False),
        IDS,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", CASES)
def test_goes_to_and_comes_from_peft(method: str, tmp_path: Path) -> None:
    """Read from PEFT's folder, the model has PEFT's output, which is not the base's; written again, PEFT has it too."""
    base, config, x = CASES[method]
    theirs: Any = peft.get_peft_model(base(), copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = theirs(x)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tunerkit.load(base(), tmp_path / "theirs").eval()
    assert tunerkit.tuner(ours).method == method
    assert not torch.allclose(expected, base()(x), atol=1e-3)
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
    tunerkit.export(ours, tmp_path / "ours", format="peft")
    again: Any = peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(again(x), expected, atol=1e-5, rtol=1e-5)
