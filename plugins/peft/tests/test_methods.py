"""Folders of every method of tunerkit-methods that declares PEFT's names: what PEFT wrote, and what tunerkit writes."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tunerkit
from plugins.peft.tests.peft_models import CASES, Case
from plugins.peft.tests.test_declared_types import close, randomize_
from tunerkit.plugin import method_record

pytest.importorskip("tunerkit_methods")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of its own defaults
LINEAR = {"llama": ("q_proj", "down_proj"), "bert": ("query", "dense")}
BOTH = {**LINEAR, "gpt2": ("c_attn", "c_fc")}  # whose layers hold their weights transposed


@attrs.frozen
class Row:
    """A method as PEFT writes it.

    Attributes:
        config: PEFT's config class.
        fields: Its fields.
        targets: The names of the modules, by the model.
    """

    config: Callable[..., Any]
    fields: Mapping[str, Any] = attrs.field(factory=dict)
    targets: Mapping[str, tuple[str, ...]] = attrs.field(factory=lambda: LINEAR)


ROWS: dict[str, list[Row]] = {
    "loha": [Row(peft.LoHaConfig, {"r": 3, "alpha": 6}, {**LINEAR, "convolutions": ("one", "two", "point")})],
    "lokr": [
        Row(peft.LoKrConfig, {"r": 2, "alpha": 4}, {**LINEAR, "convolutions": ("two", "point")}),
        Row(peft.LoKrConfig, {"r": 1, "alpha": 4, "decompose_both": True}),
    ],
    "vera": [Row(peft.VeraConfig, {"r": 5}, BOTH), Row(peft.VeraConfig, {"r": 5, "save_projection": False})],
    "ia3": [
        Row(peft.IA3Config, {"feedforward_modules": []}, {**BOTH, "convolutions": ("two", "three")}),
        Row(peft.IA3Config, {"feedforward_modules": ["down_proj"]}, {"llama": LINEAR["llama"]}),
        Row(peft.IA3Config, {"feedforward_modules": ["1.attn.c_attn"]}, {"gpt2": ("c_attn", "1.attn.c_attn")}),
    ],
    "oft": [
        Row(peft.OFTConfig, {"oft_block_size": 4}),
        Row(peft.OFTConfig, {"oft_block_size": 4, "use_cayley_neumann": False, "block_share": True}),
    ],
    # Without its CUDA extension, PEFT computes with one factor whatever its config says.
    "boft": [Row(peft.BOFTConfig, {"boft_block_size": 4, "boft_n_butterfly_factor": 1})],
    "hra": [Row(peft.HRAConfig, {"r": 4})],
    "randlora": [
        Row(peft.RandLoraConfig, {"r": 4, "randlora_alpha": 4, "save_projection": save}) for save in (True, False)
    ],
    "vblora": [Row(peft.VBLoRAConfig, {"r": 2, "num_vectors": 8, "vector_length": 8})],
    "fourierft": [Row(peft.FourierFTConfig, {"n_frequency": 10})],
    "c3a": [Row(peft.C3AConfig, {"block_size": 8})],
    "miss": [Row(peft.MissConfig, {"r": 4})],
    "road": [Row(peft.RoadConfig, {"group_size": 8, "variant": f"road_{n}"}) for n in (1, 2, 4)],
    "shira": [Row(peft.ShiraConfig, {"r": 2, "random_seed": 1}), Row(peft.ShiraConfig, {"r": 2})],
    "delora": [Row(peft.DeloraConfig, {"r": 4, "delora_lambda": 1})],
    "tinylora": [Row(peft.TinyLoraConfig, {"r": 2, "u": 6, "weight_tying": tying}) for tying in (0.0, 0.5, 1.0)],
    "ln-tuning": [Row(peft.LNTuningConfig, {}, {"llama": ("input_layernorm",), "bert": ("LayerNorm",)})],
    "trainable-tokens": [
        Row(
            peft.TrainableTokensConfig,
            {"token_indices": [1, 5]},
            {"llama": ("embed_tokens",), "bert": ("word_embeddings",)},
        )
    ],
    "dora": [Row(peft.LoraConfig, {"r": 3, "lora_alpha": 6, "use_dora": True}, {**BOTH, "convolutions": ("two",)})],
}
INSTALLED = {
    method: record
    for method, info in tunerkit.methods().items()
    if info.distribution == "tunerkit-methods" and info.error is None
    for record in [method_record(method)]
}
PAIRS = [(method, row, at) for method in INSTALLED for row in ROWS.get(method, ()) for at in row.targets]


def test_every_method_that_declares_names_is_here() -> None:
    """Nothing is declared that no folder of PEFT's was read by."""
    assert {method for method, record in INSTALLED.items() if "peft" in record.foreign} <= ROWS.keys()


@pytest.mark.parametrize(("method", "row", "at"), PAIRS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_folder_comes_in_and_goes_out(tmp_path: Path, method: str, row: Row, at: str) -> None:
    """Outputs equal PEFT's; what is written has PEFT's tensors, and PEFT and tunerkit load it."""
    case, (theirs, ours) = CASES[at], (tmp_path / "theirs", tmp_path / "ours")
    expected = made(case, row, at, theirs)
    model = tunerkit.load(case.build(), theirs)
    assert tunerkit.tuner(model).method == method
    with torch.no_grad():
        output = case.output(model)
        assert close(output, expected)
        tunerkit.export(model, ours)
        again: Any = peft.PeftModel.from_pretrained(case.build(), str(ours))  # type: ignore[arg-type]
        assert close(case.output(again.eval()), expected)
        assert torch.equal(case.output(tunerkit.load(case.build(), ours)), output)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (theirs, ours))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def made(case: Case, row: Row, at: str, folder: Path) -> Tensor:
    """Let PEFT make an adapter and save it; the output of its model."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)
        config = row.config(target_modules=list(row.targets[at]), **row.fields)
        model: Any = peft.get_peft_model(case.build(), config)  # type: ignore[arg-type]
    randomize_(model)
    model.save_pretrained(str(folder))
    with torch.no_grad():
        return case.output(model.eval())
