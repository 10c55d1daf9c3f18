"""Trainable tokens change some rows, by default those of special tokens, and compute what PEFT's do."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit.errors import TargetError
from tunerkit_methods.trainable_tokens import Rows

IDS = torch.tensor([[2, 7, 3, 1], [7, 7, 0, 9]])


class Words(nn.Module):
    """An embedding and an output head, and the config of a model."""

    def __init__(self, **fields: object) -> None:
        super().__init__()
        self.embed_tokens, self.norm, self.head = nn.Embedding(10, 6), nn.LayerNorm(6), nn.Linear(6, 10)
        self.config = SimpleNamespace(**fields)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.norm(self.embed_tokens(ids))))
        return out


def words(**fields: object) -> Words:
    torch.manual_seed(0)
    return Words(**fields)


def rows_of(model: nn.Module, path: str = "embed_tokens") -> Rows:
    adapter = tunerkit.tuner(model).adapters()[path]
    assert isinstance(adapter, Rows)
    return adapter


def both(tokens: list[int]) -> tuple[nn.Module, Any]:
    base = words().double()
    config = peft.TrainableTokensConfig(token_indices=tokens, target_modules=["embed_tokens"], init_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = tunerkit.wrap(base, "trainable-tokens", {"tokens": tokens, "adapter_dtype": "float64"})
    with torch.no_grad():
        rows_of(ours).rows.copy_(theirs_of(theirs))
    return ours, theirs


def theirs_of(model: Any) -> nn.Parameter:
    found: nn.Parameter = model.base_model.model.embed_tokens.trainable_tokens_delta["default"]
    return found


def test_computes_and_trains_as_peft_does() -> None:
    """In fp64: output and gradients to 1e-12 of the largest, and the rows after 20 steps of AdamW to 1e-9."""
    ours, theirs = both([7, 2, 5])
    outputs = [model(IDS) for model in (ours, theirs)]
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-12 * outputs[1].abs().max()
    rows = [rows_of(ours).rows, theirs_of(theirs)]
    grads = [torch.autograd.grad(out.square().sum(), each)[0] for out, each in zip(outputs, rows, strict=True)]
    assert (grads[0] - grads[1]).abs().max() <= 1e-12 * grads[1].abs().max()
    for model, each in zip((ours, theirs), rows, strict=True):
        optimizer = torch.optim.AdamW([each], lr=1e-2)
        for _ in range(20):
            model(IDS).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (rows[0] - rows[1]).abs().max() <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter_dtype", ["float64", "float32", "bfloat16"])
def test_starts_at_the_base_whatever_the_dtypes(dtype: torch.dtype, adapter_dtype: str) -> None:
    """The first output is the base's, bit for bit: the difference is taken after rounding."""
    base = words().to(dtype)
    before = base(IDS)
    settings = {"tokens": [2, 7], "adapter_dtype": adapter_dtype, "targets": ["embed_tokens", "head"]}
    assert torch.equal(tunerkit.wrap(base, "trainable-tokens", settings)(IDS), before)


def test_trains_the_special_tokens_by_default() -> None:
    """Those that the model's config names, once each, without the padding row and what the embedding does not have."""
    fields = {"bos_token_id": 2, "eos_token_id": [7, 2], "pad_token_id": 4, "sep_token_id": None, "image_token_id": 99}
    base = words(**fields)
    base.embed_tokens.padding_idx = 4
    assert rows_of(tunerkit.wrap(base, "trainable-tokens")).ids.tolist() == [2, 7]


def test_adapts_all_that_is_tied_to_the_embedding_by_default() -> None:
    """With the ids of the config, and a head that has the embedding's weight."""
    base = words(eos_token_id=7)
    base.head.weight = base.embed_tokens.weight
    model = tunerkit.wrap(base, "trainable-tokens")
    assert {path: rows_of(model, path).ids.tolist() for path in tunerkit.tuner(model).adapters()} == {
        "embed_tokens": [7],
        "head": [7],
    }


@pytest.mark.parametrize("path", ["embed_tokens", "head"])
def test_changes_only_its_rows(path: str) -> None:
    """After merging, an embedding's or a head's other rows are the base's own, bit for bit."""
    model: Any = tunerkit.wrap(words(), "trainable-tokens", {"tokens": [2, 7], "targets": [path]})
    before = model.get_submodule(path).weight.detach().clone()
    with torch.no_grad():
        rows_of(model, path).rows.add_(1.0)
    adapted = model(IDS)
    merged: Any = tunerkit.unwrap(model, keep_merged=True)
    after = merged.get_submodule(path).weight
    assert [row for row in range(10) if not torch.equal(before[row], after[row])] == [2, 7]
    torch.testing.assert_close(merged(IDS), adapted)


def test_a_file_knows_its_tokens(tmp_path: Path) -> None:
    """Loaded onto a base whose config names other special tokens, the rows are those that were trained."""
    model = tunerkit.wrap(words(eos_token_id=7, pad_token_id=3), "trainable-tokens")
    with torch.no_grad():
        rows_of(model).rows.add_(1.0)
    again = tunerkit.load(words(eos_token_id=1), tunerkit.save(model, tmp_path))
    assert rows_of(again).ids.tolist() == [7, 3]
    torch.testing.assert_close(again(IDS), model(IDS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"say tokens=tokenizer.all_special_ids"),
        ({"tokens": [3, 10]}, "it has 10 rows, and tokens names row 10"),
        ({"tokens": [1], "targets": ["norm"]}, "norm"),
    ],
)
def test_refuses_what_has_no_row(settings: dict[str, object], message: str) -> None:
    """One line says which token or which module, and what to do."""
    with pytest.raises(TargetError, match=message):
        tunerkit.wrap(words(), "trainable-tokens", settings)


def test_refuses_the_padding_row() -> None:
    """Its output is not changed by any adapter, so it is never trained."""
    base = words()
    base.embed_tokens.padding_idx = 4
    with pytest.raises(TargetError, match="row 4, the padding's"):
        tunerkit.wrap(base, "trainable-tokens", {"tokens": [4]})


def raising(error: type[Exception]) -> Any:
    def get_input_embeddings() -> nn.Module:
        raise error("weight")

    return get_input_embeddings


ANSWERS = {
    "NotImplementedError": raising(NotImplementedError),
    "AttributeError": raising(AttributeError),
    "None": lambda: None,
    "another class": lambda: nn.Conv2d(3, 6, 1),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_model_that_names_no_embedding_must_be_told_both(answer: str) -> None:
    """As models of images do; one that gets both settings is not asked."""
    base: Any = words(eos_token_id=7)
    base.get_input_embeddings = ANSWERS[answer]
    for settings in ({}, {"tokens": [2]}, {"targets": ["embed_tokens"]}):
        with pytest.raises(TargetError, match=r"say both targets=\[...\] and tokens=\[...\]"):
            tunerkit.wrap(base, "trainable-tokens", settings)
    model = tunerkit.wrap(base, "trainable-tokens", {"targets": ["embed_tokens"], "tokens": [2]})
    assert rows_of(model).ids.tolist() == [2]


def test_a_config_may_be_a_dictionary() -> None:
    """Its special tokens are found; a config that is None has none."""
    base: Any = words()
    base.config = {"eos_token_id": 7}
    assert rows_of(tunerkit.wrap(base, "trainable-tokens")).ids.tolist() == [7]
    base = words()
    base.config = None
    with pytest.raises(TargetError, match="names no token"):
        tunerkit.wrap(base, "trainable-tokens")
