"""Rows of tokens that PEFT trains beside a LoRA are read as products, on both sides of a tie, or refused."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tunerkit
from plugins.peft.tests import peft_adapters, peft_folders
from plugins.peft.tests.peft_folders import PREFIX, refused
from plugins.peft.tests.peft_models import CASES, TIED
from tunerkit import serialization

pytestmark = [
    pytest.mark.usefixtures("no_other_types"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.*trainable_token_indices"),
]
KEY = f"{PREFIX}embed_tokens.token_adapter.trainable_tokens_delta"
READ: dict[str, tuple[Any, dict[str, Any]]] = {
    "a list": (CASES["llama"], {"trainable_token_indices": [5, 9]}),
    "by name": (CASES["llama"], {"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [3]}}),
    "tied": (TIED, {"trainable_token_indices": [9, 5, 2], "use_rslora": True}),
    "tied, both named": (TIED, {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1, 5]}}),
    "tied, in other orders": (TIED, {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [5, 1]}}),
    "tied, apart": (TIED, {"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [3]}}),
    "over PiSSA": (CASES["llama"], {"trainable_token_indices": [5], "init_lora_weights": "pissa"}),
    "with a scaled embedding": (CASES["gemma3"], {"trainable_token_indices": [5, 9]}),
}


@pytest.mark.parametrize("name", READ)
def test_one_load_computes_what_peft_does(tmp_path: Path, name: str) -> None:
    """As does a folder of ours in PEFT; a warning says where training would differ."""
    case, given = READ[name]
    torch.manual_seed(3)
    theirs: Any = peft.get_peft_model(case.build(), peft.LoraConfig(r=2, target_modules=["q_proj"], **given))
    peft_adapters.randomize_(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with torch.no_grad():
        expected = case.output(theirs.eval())
        with pytest.warns(
            tunerkit.TunerkitWarning, match=r"^[^\n]*\n- [^\n]*'trainable-tokens' trains such rows alone$"
        ):
            model = tunerkit.load(case.build(), tmp_path / "theirs")
        back = peft_adapters.loaded(case, tunerkit.export(model, tmp_path / "ours"))
        merged = tunerkit.unwrap(tunerkit.load(case.build(), tmp_path / "theirs"), keep_merged=True)
        for found in (model, back, merged):
            assert (case.output(found) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_rows_of_a_head_alone_stay_with_it(tmp_path: Path) -> None:
    """PEFT leaves the embedding as it is, which a tied weight cannot hold; the line of the error unties the model."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [1, 5]})
    theirs: Any = peft.get_peft_model(TIED.build(), config)  # type: ignore[arg-type]
    peft_adapters.randomize_(theirs)
    theirs.save_pretrained(str(tmp_path))
    model = TIED.build()
    with pytest.raises(tunerkit.errors.TargetError, match="lm_head: has a tied weight") as raised:
        tunerkit.load(model, tmp_path)
    exec(str(raised.value).partition("load onto it: ")[2], {"model": model, "torch": torch})
    with torch.no_grad():
        found, expected = TIED.output(tunerkit.load(model, tmp_path)), TIED.output(theirs.eval())
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


class Largest(TorchDispatchMode):
    """Measures the largest tensor that is made, in bytes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(each.nbytes for each in tree_leaves(made) if isinstance(each, Tensor))])
        return made


def test_no_tensor_is_larger_than_the_product(tmp_path: Path) -> None:
    """A vocabulary may have hundreds of thousands of rows, and a file some hundreds of them."""
    model, ids = peft_folders.net(), [*range(1, 9)]
    model.embed_tokens = torch.nn.Embedding(1000, 4)
    folder = peft_folders.folder(tmp_path, {"trainable_token_indices": ids}, with_rows(torch.ones(8, 4)))
    with Largest() as largest:
        tunerkit.load(model, folder)
    assert largest.size == 8 * 1000 * 4


def with_rows(rows: Tensor, key: str = KEY) -> dict[str, Tensor]:
    return {**peft_folders.tensors(), key: rows}


WRONG: dict[str, tuple[dict[str, Tensor], Any, str]] = {
    "a token twice": (with_rows(torch.ones(2, 4)), [3, 3], "[2, 4], for 1 tokens up to 3 in a table of [10, 4]"),
    "too few rows": (with_rows(torch.ones(1, 4)), [3, 4], "[1, 4], for 2 tokens"),
    "a token too many": (with_rows(torch.ones(1, 4)), [10], "up to 10 in a table of [10, 4]"),
    "no rows": (peft_folders.tensors(), {"embed_tokens": [1]}, "'embed_tokens' has no rows in the file"),
    "a module that is not there": (
        with_rows(torch.ones(1, 4), KEY.replace("embed_tokens", "other")),
        [1],
        "belongs to nothing here",
    ),
    "no ids": (with_rows(torch.ones(1, 4)), None, "belong to nothing in adapter_config.json"),
    "an adapted module": (
        with_rows(torch.ones(1, 4), KEY.replace("embed_tokens", "layers.0.query")),
        {"layers.0.query": [1]},
        "adapts 'layers.0.query' and trains rows of it",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_rows_that_do_not_fit_are_named(tmp_path: Path, what: str) -> None:
    """The model is unchanged."""
    tensors, given, part = WRONG[what]
    refused(peft_folders.folder(tmp_path, {"trainable_token_indices": given}, tensors), part)


def test_rows_need_a_base_with_values(tmp_path: Path) -> None:
    """They replace the base's, so what they add is not known without it; the command loads it then."""
    folder = peft_folders.folder(tmp_path, {"trainable_token_indices": [3]}, with_rows(torch.ones(1, 4)))
    with pytest.raises(NotImplementedError, match="load it with its weights"):
        serialization.open_unloaded(peft_folders.net().to("meta"), folder)
