"""Losses at the learned positions: values and gradients are those of all logits, with heads of every kind."""

import copy
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="the trainers are TRL's")
pytest.importorskip("datasets", reason="TRL takes its data from it")

from plugins.transformers.tests.test_head_weights import (
    PLACES,
    ROWS,
    adapted,
    gradients,
    llama,
    own_forward,
    trainer_of,
)
from tunerkit_transformers import learned_positions
from tunerkit_transformers.learned_positions import is_scored, may_overwrite, obstacle, score_learned_

pytestmark = [
    pytest.mark.usefixtures("toys"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]
# Of the first row one token is learned, of the second three, and so on, up to all but the first.
IDS = [[*range(2, 6 + number), 1] for number in range(8)]
PROMPTS = [max(1, len(ids) - 1 - 2 * number) for number, ids in enumerate(IDS)]
LABELS = [[-100] * prompt + ids[prompt:] for prompt, ids in zip(PROMPTS, IDS, strict=True)]
ANSWERS = {"input_ids": IDS, "labels": LABELS}


def prepared(
    kind: str, place: str, folder: Path, patch: pytest.MonkeyPatch, dtype: torch.dtype
) -> tuple[Any, Any, Any]:
    """A model with something at its head, its trainer, and a batch."""
    if kind == "SFT":
        patch.setitem(ROWS, "SFT", ANSWERS)
    model = adapted(place, moved=0.1).to(dtype)
    trainer = trainer_of(kind, model, folder, per_device_train_batch_size=8)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model.eval()
    return model, trainer, inputs


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
@pytest.mark.parametrize("place", ["adapter", "bias", "copy"])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_losses_and_gradients_are_those_of_all_logits(
    kind: str, place: str, dtype: torch.dtype, within: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain way computes the logits of all positions and leaves out what is not learned."""
    model, trainer, inputs = prepared(kind, place, tmp_path, monkeypatch, dtype)
    assert obstacle(trainer) is None
    score_learned_(trainer)
    score_learned_(trainer)  # once is enough
    found = gradients(trainer, model, inputs)
    model.forward = MethodType(own_forward, model)
    expected = gradients(trainer, model, inputs)
    assert any(name.startswith("lm_head.") for name in expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= within * max(1e-3, float(value.abs().max())), name


def test_probabilities_take_the_place_of_a_plain_heads_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same bits of loss and gradients as in a tensor beside them."""
    monkeypatch.setitem(PLACES, "elsewhere", ("toy-low-rank", {"targets": ["q_proj"]}))
    model, trainer, inputs = prepared("SFT", "elsewhere", tmp_path, monkeypatch, torch.float32)
    score_learned_(trainer)
    seen: list[bool] = []

    def noted(logits: Tensor) -> bool:
        seen.append(may_overwrite(logits))
        return seen[-1]

    monkeypatch.setattr(learned_positions, "may_overwrite", noted)
    found = gradients(trainer, model, inputs)
    assert seen == [True]
    monkeypatch.setattr(learned_positions, "may_overwrite", lambda logits: False)
    assert all(torch.equal(found[name], each) for name, each in gradients(trainer, model, inputs).items())


def test_logits_that_a_backward_reads_are_not_overwritten() -> None:
    """As of a cap by tanh, or those that have no gradient, or are rounded."""
    hidden, weight = torch.ones(3, 4, requires_grad=True), torch.ones(5, 4)
    assert may_overwrite(hidden @ weight.T)
    assert may_overwrite(torch.nn.functional.linear(hidden[None], weight))
    assert not may_overwrite(torch.tanh(hidden @ weight.T))
    assert not may_overwrite((hidden @ weight.T).exp())
    assert not may_overwrite(hidden.bfloat16() @ weight.T.bfloat16())
    assert not may_overwrite(hidden.detach() @ weight.T)


def test_logits_are_computed_where_a_token_is_learned_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a call of the head, with as many rows; in a batch that is too large, by TRL, which does not call it."""
    model, trainer, inputs = prepared("SFT", "adapter", tmp_path, monkeypatch, torch.float32)
    rows: list[Any] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(tuple(args[0].shape)))
    with torch.no_grad():
        before = trainer.compute_loss(model, dict(inputs))
        assert not rows
        score_learned_(trainer)
        after = trainer.compute_loss(model, dict(inputs))
        learned = int((inputs["labels"][:, 1:] != -100).sum())
        assert rows == [(learned, 16)]
        monkeypatch.setattr(learned_positions, "_MOST", learned)
        assert torch.equal(trainer.compute_loss(model, dict(inputs)), before)
    assert len(rows) == 1
    assert abs(after - before) <= 1e-5 * before
    logged = trainer._metrics["eval"]
    for name in ("entropy", "mean_token_accuracy"):
        trl, ours = logged[name][0], logged[name][1]
        assert abs(ours - trl) <= 1e-5 * max(1.0, abs(trl)), name


def test_what_is_logged_is_not_rounded_under_autocast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits are in bf16 then, and all sums over them in fp32."""
    model, trainer, inputs = prepared("SFT", "adapter", tmp_path, monkeypatch, torch.float32)
    score_learned_(trainer)
    logits: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(**inputs, fused_lm_head=True)
    assert logits[0].dtype is torch.bfloat16
    exact = logits[0].double().log_softmax(-1)
    assert (found.entropy[found.label_mask] + (exact.exp() * exact).sum(-1)).abs().max() < 1e-5
    assert (found.log_sum_sq_probs[found.label_mask] - (2 * exact).logsumexp(-1)).abs().max() < 1e-5


def test_a_batch_without_a_learned_token_has_the_loss_0_and_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with TRL: such a batch must not end a training."""
    model, trainer, inputs = prepared("SFT", "adapter", tmp_path, monkeypatch, torch.float32)
    score_learned_(trainer)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    assert loss.item() == 0


def test_other_calls_and_copies_of_the_model_are_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation and a plain call give logits; a deep copy computes by its own weights."""
    model, trainer, inputs = prepared("SFT", "copy", tmp_path, monkeypatch, torch.float32)
    ids = inputs["input_ids"][:1, :4]
    before = [model(input_ids=ids).logits, model.generate(ids, max_new_tokens=3, do_sample=False)]
    score_learned_(trainer)
    after = [model(input_ids=ids).logits, model.generate(ids, max_new_tokens=3, do_sample=False)]
    assert all(map(torch.equal, before, after))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.tunerkit.get("default").copy.weight.zero_()
        losses = [each(**inputs, fused_lm_head=True).loss for each in (model, twin)]
    assert losses[0] > losses[1] + 0.01 or losses[0] < losses[1] - 0.01


def test_what_stands_in_the_way_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another trainer, an accelerator, another version of TRL, or a forward without a mask of positions."""
    _, trainer, _ = prepared("SFT", "adapter", tmp_path, monkeypatch, torch.float32)
    own = SimpleNamespace(args=trainer.args, model=trainer.model)
    assert obstacle(own) == "SimpleNamespace is neither TRL's SFTTrainer nor its DPOTrainer"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "args", SimpleNamespace(device=torch.device("cuda")))
        assert obstacle(trainer) == "on cuda, TRL's own computes logits at the learned positions alone"
        patch.setattr(trainer, "args", SimpleNamespace(device=torch.device("mps")))
        assert obstacle(trainer) == "on mps, TRL's own is not replaced"
    with monkeypatch.context() as patch:
        patch.setattr(trainer.model, "forward", type(trainer.model).forward)
        assert obstacle(trainer) == "this version of TRL computes its losses in another way"

    def forward(self: Any, input_ids: Tensor) -> Tensor:
        return input_ids

    monkeypatch.setattr(type(llama()), "forward", forward)
    assert obstacle(trainer) == "the forward of LlamaForCausalLM takes no mask of positions (logits_to_keep)"
    score_learned_(trainer)
    assert not is_scored(trainer)
