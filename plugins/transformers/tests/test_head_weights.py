"""TRL's losses read an output head's weight themselves: values and gradients are those of the model's own forward."""

import copy
import math
import warnings
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit

pytest.importorskip("trl", reason="the trainers are TRL's")
pytest.importorskip("datasets", reason="TRL takes its data from it")
import datasets
import trl
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
from transformers.integrations import deepspeed

from tests.support.trainer_toys import VOCABULARY, arguments, tokenizer
from tunerkit.layers import LinearLayer
from tunerkit.plugin import Packing
from tunerkit_testing.toy_methods import LowRankConfig
from tunerkit_transformers import head_weights
from tunerkit_transformers.head_weights import refuse_heads

TRL: Any = trl  # it is untyped in part
QUIET: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "report_to": [],
    "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "bf16": False,
}  # fmt: skip
pytestmark = [
    pytest.mark.usefixtures("toys"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:GRPOTrainer had loaded:tunerkit.TunerkitWarning"),
    pytest.mark.filterwarnings("ignore:RLOOTrainer had loaded:tunerkit.TunerkitWarning"),
]
PROMPTS = ["w1 w2 w3"] * 8
ENDS = [f"w{i} w{i + 1} w{i + 2}" for i in range(8)]
ROWS: dict[str, dict[str, list[Any]]] = {
    "SFT": {"text": [f"w1 {end}" for end in ENDS]},
    "DPO": {"prompt": PROMPTS, "chosen": ENDS, "rejected": [f"w9 {end}" for end in ENDS]},
    "KTO": {"prompt": PROMPTS, "completion": ENDS, "label": [True, False] * 4},
    "GRPO": {"prompt": PROMPTS},
    "RLOO": {"prompt": PROMPTS},
    "Distillation": {"prompt": PROMPTS},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "GRPO": {"num_generations": 4, "max_completion_length": 5, "beta": 0.1},
    "RLOO": {"num_generations": 4, "max_completion_length": 5, "beta": 0.1},
    "Distillation": {"max_completion_length": 5},
}
# What stands at the head: an adapter, one that adds a bias to a head without one, or a trained copy.
PLACES: dict[str, tuple[str, dict[str, Any]]] = {
    "adapter": ("toy-low-rank", {"targets": ["q_proj", "lm_head"]}),
    "bias": ("toy-shift", {"targets": ["q_proj", "lm_head"]}),
    "copy": ("toy-low-rank", {"targets": ["q_proj"], "train_modules": ["lm_head"]}),
}


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes))  # type: ignore[arg-type]


def adapted(place: str, *, moved: float = 0.0) -> Any:
    """A small Llama with something at its head, which adds something if ``moved`` is not 0."""
    method, config = PLACES[place]
    model = tunerkit.wrap(llama(), method, config, seed=0)
    with torch.no_grad():
        for parameter in tunerkit.tuner(model).parameters():
            parameter.add_(moved * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def trainer_of(kind: str, model: Any, folder: Path, *, attach: bool = True, **options: Any) -> Any:
    llama().save_pretrained(folder)
    model.config._name_or_path = str(folder)  # from where GRPO and RLOO load a reference
    given: dict[str, Any] = {
        "processing_class": tokenizer(folder),
        "train_dataset": datasets.Dataset.from_dict(ROWS[kind]),
    }
    if kind in ("DPO", "KTO"):
        given["ref_model"] = options.pop("ref_model", None) or tunerkit.reference(model)
    if kind in ("GRPO", "RLOO"):
        given["reward_funcs"] = lambda completions, **_: [float(len(text) % 3) for text in completions]
    if kind == "Distillation":
        given["teacher_model"] = llama(3)
    chosen = getattr(TRL, f"{kind}Config")(output_dir=str(folder), **(QUIET | OPTIONS.get(kind, {}) | options))
    trainer = getattr(TRL, f"{kind}Trainer")(model, args=chosen, **given)
    if attach:
        tunerkit.attach(model, trainer)
    return trainer


def own_forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
    """What TRL's forward returns, from the logits of the model's own."""
    logits = type(self).forward(self, *args, **kwargs).logits[:, :-1]
    if not fused_lm_head:
        return type(self).forward(self, *args, **kwargs)
    mask = labels[:, 1:] != -100
    every = logits.log_softmax(-1)
    found = every.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    entropy = -(every.exp() * every).sum(-1)
    return trl.trainer.utils.FusedCausalLMOutput(
        log_probs=found * mask, entropy=entropy * mask, label_mask=mask, is_top1=mask,
        log_sum_sq_probs=(2 * every).logsumexp(-1) * mask, mean_logits=logits.mean(-1) * mask,
    )  # fmt: skip


def gradients(trainer: Any, model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    trained = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **trained}


@pytest.mark.parametrize(
    ("kind", "place"),
    [("SFT", "bias"), ("DPO", "copy"), ("KTO", "adapter"), ("GRPO", "copy"), ("RLOO", "adapter")],
)
def test_losses_and_gradients_are_those_of_the_models_own_forward(kind: str, place: str, tmp_path: Path) -> None:
    """On the same batch. The own forward calls the head; what is trained there has a gradient in both."""
    model = adapted(place, moved=0.1)
    trainer = trainer_of(kind, model, tmp_path)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model.eval()  # TRL switches dropout off in some of them
    found = gradients(trainer, model, inputs)
    model.forward = MethodType(own_forward, model)
    expected = gradients(trainer, model, inputs)
    assert any(name.startswith("lm_head.") for name in expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Measured: up to 1.5e-7 of the largest.
        assert (found[name] - value).abs().max() <= 1e-6 * max(1.0, float(value.abs().max())), name


def test_a_loss_that_trl_runs_in_place_of_the_forward_trains_the_head_too(tmp_path: Path) -> None:
    """Distillation multiplies by the weight itself. A copy has the gradient of the weight of a dense twin."""
    model, dense = adapted("copy", moved=0.1), llama()
    slot = model.lm_head.tunerkit.get("default")
    trainers = [trainer_of("Distillation", model, tmp_path), trainer_of("Distillation", dense, tmp_path, attach=False)]
    inputs = trainers[0]._prepare_inputs(next(iter(trainers[0].get_train_dataloader())))
    tunerkit.activate(model, [])
    unadapted = trainers[0].compute_loss(model, inputs).item()
    tunerkit.activate(model, "default")
    dense.load_state_dict(tunerkit.unwrap(tunerkit.merge(copy.deepcopy(model)), keep_merged=True).state_dict())
    found, expected = (gradients(trainer, each, inputs) for trainer, each in zip(trainers, (model, dense), strict=True))
    assert abs(found["loss"] - expected["loss"]) < 1e-6
    assert abs(found["loss"] - unadapted) > 1e-3
    assert torch.allclose(slot.copy.weight.grad, expected["lm_head.weight"], rtol=1e-5, atol=1e-7)


def test_a_training_moves_the_head_and_leaves_the_models_weights_alone(tmp_path: Path) -> None:
    """The steps of a generation call the head as always. After training, and after an interrupt, nothing is left."""
    model = adapted("adapter")
    trainer = trainer_of("GRPO", model, tmp_path)
    trained = model.lm_head.tunerkit.get("default").adapter
    before, base = trained.b.detach().clone(), model.lm_head.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "these adapters never ran", tunerkit.TunerkitWarning)
        trainer.train()
    assert not torch.equal(trained.b, before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.model, "forward", interrupted)
        ids = torch.ones(1, 3, dtype=torch.int64)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert type(model.lm_head.weight) is nn.Parameter
    assert torch.equal(model.lm_head.weight, base)
    assert model.lm_head.tunerkit.enabled


def interrupted(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def test_a_generation_computes_no_dense_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be one for each token; the head's own hook adds the adapter there, as it does in a plain call."""
    model = adapted("adapter", moved=0.1)
    trainer_of("SFT", model, tmp_path)
    shown: list[nn.Module] = []
    monkeypatch.setattr(head_weights, "_show_", lambda model, undo: shown.append(model))
    ids = torch.tensor([[1, 2, 3]])
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    model(input_ids=ids)
    assert not shown
    model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert shown == [model]


def test_a_forward_of_an_earlier_trl_is_shown_the_heads_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no argument that says so: each call reads the weight, except the steps of a generation."""
    model = adapted("adapter", moved=0.1)
    trainer = trainer_of("SFT", model, tmp_path, attach=False)
    earlier: dict[str, Any] = {"__name__": "trl.trainer.sft_trainer"}
    exec("def forward(self, *args, **kwargs): return type(self).forward(self, *args, **kwargs)", earlier)
    model.forward = MethodType(earlier["forward"], model)
    tunerkit.attach(model, trainer)
    shown: list[nn.Module] = []
    monkeypatch.setattr(head_weights, "_show_", lambda model, undo: shown.append(model))
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, use_cache=True)
    assert not shown
    model(input_ids=ids)
    model(input_ids=ids, labels=ids, use_cache=True)
    assert shown == [model, model]


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}], ids=["in training", "in advance"])
def test_a_reference_has_the_head_of_the_model_as_it_stood(options: dict[str, Any], tmp_path: Path) -> None:
    """So the first loss of DPO is ln 2, also of a model whose head is trained on; the next one is not."""
    model = adapted("adapter", moved=0.1)
    trainer = trainer_of("DPO", model, tmp_path, logging_strategy="steps", logging_steps=1, **options)
    trainer.train()
    first, second = (row["loss"] for row in trainer.state.log_history if "loss" in row)
    assert abs(first - math.log(2)) < 1e-5
    assert abs(second - math.log(2)) > 1e-5


UNFIT: dict[str, tuple[object, str, object]] = {
    "weight is divided among the processes": (deepspeed, "is_deepspeed_zero3_enabled", lambda: True),
    "method 'toy-low-rank' implements neither": (head_weights, "has_delta", lambda method: False),
    "weight is stored as q4": (LinearLayer, "packing", Packing("q4", 4)),
}


def test_a_head_that_cannot_be_shown_is_refused_at_attach(tmp_path: Path) -> None:
    """The loss would ignore its adapter. The error names the head and what to do; lost dropout is a warning."""
    model = adapted("adapter")
    trainer = trainer_of("SFT", model, tmp_path, attach=False)
    for reason, (owner, name, value) in UNFIT.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, value)
            with pytest.raises(
                tunerkit.errors.StepError, match=f"SFTTrainer multiplies by the weight of 'lm_head' .*{reason}.*Leave"
            ):
                refuse_heads(trainer, [tunerkit.tuner(model)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LowRankConfig, "dropout", 0.5)
        with pytest.warns(
            tunerkit.TunerkitWarning, match="dropout is not applied at 'lm_head': the loss of SFTTrainer"
        ):
            tunerkit.attach(model, trainer)


def test_a_trainer_that_calls_its_head_is_left_alone(tmp_path: Path) -> None:
    """Its forward stays, a head whose weight cannot be replaced is no matter, and dropout is applied: no warning."""
    model = adapted("adapter")
    trainer = trainer_of("SFT", model, tmp_path, attach=False)
    del model.forward  # as `CPOTrainer` leaves it
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error", tunerkit.TunerkitWarning)
        patch.setattr(LowRankConfig, "dropout", 0.5)
        patch.setattr(LinearLayer, "packing", Packing("q4", 4))
        tunerkit.attach(model, trainer)
    assert "forward" not in vars(model)


def test_a_refused_trainer_is_left_as_it_was(tmp_path: Path) -> None:
    """What TRL loaded as the reference stays, and no forward is changed, until nothing is left to refuse."""
    model = adapted("adapter")
    trainer = trainer_of("DPO", model, tmp_path, attach=False)
    trainer.ref_model = held = LlamaForCausalLM.from_pretrained(tmp_path)  # as TRL loads it
    forward = model.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_weights, "has_delta", lambda method: False)
        with pytest.raises(tunerkit.errors.StepError, match="implements neither tunerkit_delta"):
            tunerkit.attach(model, trainer)
    assert trainer.ref_model is held
    assert model.forward == forward


def test_values_that_trl_computed_without_the_heads_adapter_are_refused(tmp_path: Path) -> None:
    """Without a `ref_model`, it runs the model itself in the constructor, before `attach`."""
    model = adapted("adapter", moved=0.1)
    trainer = trainer_of("DPO", model, tmp_path, attach=False, precompute_ref_log_probs=True)
    trainer.ref_model = None
    with pytest.raises(tunerkit.errors.StepError, match=r"without the adapter of 'lm_head'. Pass ref_model=tunerkit"):
        tunerkit.attach(model, trainer)


def test_a_kernel_that_replaces_the_forward_later_is_refused_in_any_trainer(tmp_path: Path) -> None:
    """Liger's reads the head's weight. Its other kernels are no matter."""
    model = adapted("adapter")
    trainer = Trainer(model, arguments(tmp_path))
    trainer.args.use_liger_kernel = True
    with pytest.raises(
        tunerkit.errors.StepError, match=r"multiplies by the weight of 'lm_head' .*liger_kernel_config="
    ):
        tunerkit.attach(model, trainer)
    trainer.args.liger_kernel_config = {"fused_linear_cross_entropy": False}
    tunerkit.attach(model, trainer)
