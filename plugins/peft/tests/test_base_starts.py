"""Starts that PEFT takes out of the base weight are read over a base in full precision, and from no other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import tunerkit
from plugins.peft.tests import peft_adapters, peft_folders
from plugins.peft.tests.peft_models import CASES, Case
from tunerkit import serialization
from tunerkit.errors import FileError

pytestmark = [
    pytest.mark.usefixtures("no_other_types"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
LLAMA = CASES["llama"]
PATTERNS: dict[str, Any] = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}
READ: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": ("llama", {"init_lora_weights": "pissa", "target_modules": ["q_proj", "down_proj"]}),
    "olora": ("llama", {"init_lora_weights": "olora", "target_modules": ["q_proj", "down_proj"]}),
    "pissa, by patterns": ("llama", {"init_lora_weights": "pissa", "target_modules": ["q_proj", "v_proj"], **PATTERNS}),
    "olora, by patterns": ("llama", {"init_lora_weights": "olora", "target_modules": ["q_proj", "v_proj"], **PATTERNS}),
    "pissa, above a layer's rank": ("llama", {"init_lora_weights": "pissa", "target_modules": ["q_proj"], "r": 32}),
    "olora, above a layer's rank": (
        "llama",
        {"init_lora_weights": "olora", "target_modules": ["q_proj", "v_proj"], "r": 12, "use_rslora": True},
    ),
    "pissa of Conv1D": ("gpt2", {"init_lora_weights": "pissa", "target_modules": ["c_attn"]}),
    "pissa beside an embedding": (
        "llama",
        {"init_lora_weights": "pissa", "target_modules": ["q_proj", "embed_tokens"]},
    ),
}


def saved(folder: Path, case: Case, **given: Any) -> Any:
    """A model with an adapter that PEFT trained, which it has saved."""
    torch.manual_seed(3)
    model: Any = peft.get_peft_model(case.build(), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **given}))  # type: ignore[arg-type]
    peft_adapters.randomize_(model)
    model.save_pretrained(str(folder))
    return model.eval()


@pytest.mark.parametrize("name", READ)
def test_such_a_start_is_computed_again(tmp_path: Path, name: str) -> None:
    """Law: output of the loaded adapter, of a file of ours and of a folder of ours equals that of PEFT's training."""
    of, given = READ[name]
    case = CASES[of]
    with torch.no_grad():
        expected, base = case.output(saved(tmp_path / "theirs", case, **given)), case.output(case.build())
        model = tunerkit.load(case.build(), tmp_path / "theirs")
        again = tunerkit.load(case.build(), tunerkit.save(model, tmp_path / "ours"))
        back = peft_adapters.loaded(case, tunerkit.export(model, tmp_path / "back"))
        assert (base - expected).abs().max() > 1e-2 * expected.abs().max()
        for found in (model, again, back):
            assert (case.output(found) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert tunerkit.unstructure(tunerkit.tuner(model).config)["start"] == given["init_lora_weights"]


def test_its_training_goes_on_as_in_peft(tmp_path: Path) -> None:
    """A and B alone are trained, and after three steps of SGD they equal PEFT's."""
    saved(tmp_path, LLAMA, init_lora_weights="pissa", target_modules=["q_proj"])
    ours = tunerkit.load(LLAMA.build(), tmp_path, trainable=True)
    theirs: Any = peft.PeftModel.from_pretrained(LLAMA.build(), str(tmp_path), is_trainable=True).eval()  # type: ignore[arg-type]
    trained = []
    for model in (ours, theirs):
        trained.append([p for p in model.parameters() if p.requires_grad])
        optimizer = torch.optim.SGD(trained[-1], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            LLAMA.output(model).square().mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    for mine, other in zip(*trained, strict=True):
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max()


def packed() -> nn.Module:
    """A model with integers for one weight, as a quantiser leaves them."""
    model: Any = LLAMA.build()
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.detach().mul(100).to(torch.int8), requires_grad=False)
    return model  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bfloat16": (lambda: LLAMA.build().bfloat16(), "q_proj is in bfloat16"),
    "float16": (lambda: LLAMA.build().half(), "q_proj is in float16"),
    "int8": (packed, "layers.0.self_attn.q_proj is quantised"),
    "the meta device": (lambda: LLAMA.build().to("meta"), "q_proj has no weights"),
}


@pytest.mark.parametrize("base", REFUSED)
def test_another_base_than_one_in_full_precision_is_refused(tmp_path: Path, base: str) -> None:
    """What PEFT has subtracted from a rounded weight is another part; the error says which base to load."""
    saved(tmp_path, LLAMA, init_lora_weights="pissa", target_modules=["q_proj"])
    build, part = REFUSED[base]
    with pytest.raises(
        FileError, match=rf"(?s)in float32, as in from_pretrained\(.*dtype=torch\.float32.*{part}"
    ) as raised:
        serialization.open_unloaded(build(), tmp_path)
    # The command takes it for torch's own error, and loads the base with its weights.
    assert isinstance(raised.value, NotImplementedError) == (base == "the meta device")


def test_a_layer_that_peft_starts_in_no_such_way_is_refused(tmp_path: Path) -> None:
    """A convolution with PiSSA in a file is none of PEFT's."""

    def tensors() -> dict[str, torch.Tensor]:
        name = f"{peft_folders.PREFIX}point.lora_"
        return {f"{name}A.weight": torch.ones(2, 4, 1, 1), f"{name}B.weight": torch.ones(4, 2, 1, 1)}

    config = {"init_lora_weights": "olora", "target_modules": ["point"]}
    folder = peft_folders.folder(tmp_path, config, tensors())
    peft_folders.refused(folder, "point is a Conv2d", "no such start", model=CASES["convolutions"].build())


def test_an_alpha_that_nothing_is_divided_by_is_refused(tmp_path: Path) -> None:
    """PiSSA divides the singular values by the scale; with OLoRA, a scale of 0 would hide what is subtracted."""
    config = {"init_lora_weights": "olora", "lora_alpha": 0}
    peft_folders.refused(peft_folders.folder(tmp_path, config), "alpha is 0 at 'layers.0.query'", "above 0")


def test_mica_is_told_and_can_train_as_in_peft(tmp_path: Path) -> None:
    """PEFT trains A alone; here B trains too, and the line of the warning leaves as many parameters as PEFT has."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="mica")
    theirs: Any = peft.get_peft_model(LLAMA.build(), config)  # type: ignore[arg-type]
    theirs.save_pretrained(str(tmp_path))
    with pytest.warns(tunerkit.TunerkitWarning, match="trains A alone") as told:
        model = tunerkit.load(LLAMA.build(), tmp_path, trainable=True)
    exec(str(told[0].message).partition("write: ")[2], {"tunerkit": tunerkit, "model": model})
    counts = [sum(p.numel() for p in each.parameters() if p.requires_grad) for each in (model, theirs)]
    assert counts[0] == counts[1] > 0
    tunerkit.attach(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
