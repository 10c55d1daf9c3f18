"""`plan`: its parts against a training's tensors, its activations against what autograd keeps, and its words."""

import gc
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import tunerkit
from tunerkit.errors import ConfigError
from tunerkit_transformers import activations, memory_plan, plan
from tunerkit_transformers.activations import kept_by
from tunerkit_transformers.memory_plan import MIB, Plan, plan_of
from tunerkit_transformers.out_of_memory import advice_on, is_out_of_memory, note_memory_

pytestmark = [
    pytest.mark.usefixtures("toys"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:classifier may be newly initialized"),
    pytest.mark.filterwarnings("ignore:.*update their running statistics:tunerkit.TunerkitWarning"),
]
SHAPES: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8}
LLAMA: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 688, "num_key_value_heads": 2, **SHAPES}


def bert(**more: Any) -> Any:
    return BertForSequenceClassification(BertConfig(hidden_size=64, intermediate_size=128, **SHAPES, **more))


def vit() -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **sizes))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=3, n_head=8, vocab_size=64)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(d_model=256, d_kv=32, d_ff=512, num_layers=3, vocab_size=64)),
}


def adapted(model: Any, method: str = "toy-low-rank", **config: Any) -> Any:
    return tunerkit.wrap(model, method, {"targets": "all-linear", **config}, seed=0)


def batch(model: Any, rows: int, tokens: int) -> dict[str, Any]:
    ids = torch.ones(rows, tokens, dtype=torch.int64)
    mask = ids.clone()
    mask[:, -1] = 0
    of_pairs = isinstance(model, T5ForConditionalGeneration)
    more = {"decoder_input_ids": ids} if of_pairs else {} if model.config.num_labels == 3 else {"logits_to_keep": 1}
    return {"input_ids": ids, "attention_mask": mask, **more}


def kept_bytes(model: Any, inputs: dict[str, Any]) -> int:
    """What a forward keeps for its backward, beside parameters; each storage counts once."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**inputs)
    assert output.logits.requires_grad
    return sum(size for place, size in kept.items() if place not in own)


@pytest.mark.parametrize("name", MODELS)
def test_the_estimate_is_what_autograd_keeps(name: str) -> None:
    """Law: within 3 % for 6 x 64 tokens. Random numbers and the mode of the model stay as they were."""
    model = adapted(MODELS[name]()).eval()
    state = torch.get_rng_state()
    found = kept_by(model, 6, (64,))
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert found.at(6, 0, checkpointing=False) == pytest.approx(
        kept_bytes(model.train(), batch(model, 6, 64)), rel=0.03
    )
    weights = sum(each.numel() for each in model.parameters() if not each.requires_grad)  # cast once, and kept
    cast = kept_by(model, 6, (64,), torch.bfloat16)
    assert 0.4 < (cast.at(6, 0, checkpointing=False) - 2 * weights) / found.at(6, 0, checkpointing=False) < 1


def test_few_rows_and_short_ones_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where attention keeps a number for each pair of tokens."""
    monkeypatch.setattr(activations, "_ENOUGH", 1)
    monkeypatch.setattr(activations, "_LONGEST", 32)
    model = adapted(bert(attn_implementation="eager", num_labels=3))
    found = kept_by(model, 5, (128,)).at(5, 0, checkpointing=False)
    assert found == pytest.approx(kept_bytes(model.train(), batch(model, 5, 128)), rel=0.05)


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer() -> None:
    """Also if it is on while the estimate is made; logits are gone before a layer is recomputed."""
    model = adapted(MODELS["llama"]())
    off = kept_by(model, 4, (64,))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    on = kept_by(model, 4, (64,))
    torch.testing.assert_close(on.each, off.each, rtol=0.03, atol=0)
    assert model.is_gradient_checkpointing
    outside, layers, inputs, largest = (4 * on.each).tolist()
    assert inputs == 3 * 4 * 64 * 256 * 4
    assert largest == pytest.approx(layers / 3, rel=0.02)
    assert on.at(4, 0, checkpointing=True) == pytest.approx(outside + inputs + largest, abs=1)
    assert on.at(4, 10**9, checkpointing=True) == pytest.approx(outside + inputs + 10**9, abs=1)


def test_nothing_is_left_of_the_forward() -> None:
    """Torch never frees an output that its own node keeps, if a hook returns it as it is."""
    model = adapted(bert())
    seen: list[Any] = []
    model.bert.pooler.activation.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    kept_by(model, 2, (8,))
    gc.collect()
    assert seen
    assert [each() for each in seen] == [None] * len(seen)


@pytest.mark.parametrize(("name", "states"), [("adamw_torch", 2), ("sgd", 0), ("adafactor", 0.5)])
def test_what_is_counted_is_what_a_training_holds(name: str, states: float) -> None:
    """Base, adapter and gradients to the byte; the optimizer's state as it makes it of tensors of these shapes."""
    model = bert()
    base = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    adapted(model)
    trained = sum(each.nbytes for each in model.parameters() if each.requires_grad)
    found = plan(model, rows=4, tokens=16, optimizer=name)
    assert (found.base, found.adapter, found.gradients, found.averages) == (base, trained, trained, 0)
    assert found.optimizer == pytest.approx(states * trained, rel=0.5 if name == "adafactor" else 0.01, abs=1000)
    assert found.total == base + 2 * trained + found.optimizer + found.activations + found.overhead


def test_an_optimizer_may_be_made_or_have_stepped() -> None:
    """Its own state counts, if it has any."""
    model = adapted(bert())
    trained = [each for each in model.parameters() if each.requires_grad]
    made = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    assert plan(model, rows=1, tokens=8, optimizer=made).optimizer == sum(each.nbytes for each in trained)
    model(**batch(bert(num_labels=3), 2, 8)).logits.sum().backward()
    made.step()
    held = sum(each["momentum_buffer"].nbytes for each in made.state.values())
    assert plan(model, rows=1, tokens=8, optimizer=made).optimizer == held
    assert plan(model, rows=1, tokens=8, optimizer=torch.optim.Adam).optimizer > held


class Unknown(torch.optim.SGD):
    """An optimizer whose steps need values."""

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["params"][0].item()


def test_a_trainer_is_planned_with_its_own_optimizer(tmp_path: Path) -> None:
    """Law: the class and settings it was given, or the optimizer, which may hold a part; what is not known is said."""
    model = adapted(bert())
    trained = [each for each in model.parameters() if each.requires_grad]
    held, arguments = sum(each.nbytes for each in trained), TrainingArguments(str(tmp_path), report_to="none")
    rows: Any = [{"input_ids": [2] * 8, "labels": 0}] * 8
    momentum: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    half = torch.optim.SGD([{"params": trained[:2], **momentum}, {"params": trained[2:], "lr": 0.1}])
    given: list[tuple[dict[str, Any], int, tuple[str, ...]]] = [
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, momentum)}, held, ()),
        ({"optimizers": (half, None)}, sum(each.nbytes for each in trained[:2]), ()),
        ({"optimizers": (Unknown(trained, 0.1), None)}, 2 * held, ("optimizer",)),
    ]
    for options, size, assumed in given:
        found = plan_of(Trainer(model, arguments, train_dataset=rows, **options))
        assert found is not None
        assert (found.optimizer, found.assumed) == (size, assumed)
        assert ("state is not known, and taken to be Adam's" in found.parts()) == bool(assumed)
        assert ("  (not known: as Adam's)" in str(found)) == bool(assumed)
    assert not half.state


def test_averages_are_known_before_attach_and_counted_after() -> None:
    """Law: an estimate within a fifth of what the method's state then holds."""
    pytest.importorskip("tunerkit_adalora", reason="it is the method with averages")
    model = adapted(bert(), "adalora")
    before = plan(model, rows=1, tokens=8).averages
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
    tunerkit.attach(model, optimizer, total_steps=20)
    after = plan(model, rows=1, tokens=8).averages
    assert before > 0
    assert before == pytest.approx(after, rel=0.2)


def test_other_settings_save_what_they_take_away() -> None:
    """Checkpointing and half of the rows, by plans with them; 4 bits, of the weights that are multiplied."""
    model = adapted(MODELS["llama"]())
    settings: dict[str, Any] = {"rows": 4, "tokens": 64, "logits": 0}
    found, on = plan(model, **settings), plan(model, **settings, checkpointing=True)
    half = plan(model, rows=2, tokens=64, logits=0)
    assert found.checkpointing == pytest.approx(found.total - on.total, abs=4)
    assert on.checkpointing == 0
    assert found.half_batch == pytest.approx(found.total - half.total, rel=0.01)
    linear = [each for name, each in model.named_modules() if isinstance(each, nn.Linear) and name != "lm_head"]
    assert found.four_bit == pytest.approx(sum((4 - 0.516) * each.weight.numel() for each in linear), rel=0.001)
    assert plan(model, rows=1, tokens=64).half_batch == 0
    more = plan(model, rows=4, tokens=64)
    assert more.activations - found.activations == 3 * 4 * 64 * 64 * 4  # logits, and what their loss makes of them


def test_it_reads_as_a_small_table() -> None:
    """A line for each part, the total, and what would take less."""
    parts: dict[str, Any] = {
        "base": 512,
        "adapter": 2,
        "gradients": 2,
        "optimizer": 4,
        "averages": 0,
        "activations": 700,
        "overhead": 80,
    }
    saved = {"checkpointing": 500, "four_bit": 400, "half_batch": 350}
    found = Plan(**{name: size * MIB for name, size in {**parts, **saved}.items()})
    assert str(found).splitlines() == [
        "base             512 MiB",
        "adapter          2.0 MiB",
        "gradients        2.0 MiB",
        "optimizer        4.0 MiB",
        "averages         0.0 MiB",
        "activations      700 MiB  (estimated)",
        "overhead        80.0 MiB  (estimated)",
        "total          1,300 MiB",
        "would save about: gradient checkpointing 500 MiB, a 4-bit base 400 MiB, batches of half the rows 350 MiB",
    ]
    assert found.parts() == (
        "about 1,300 MiB (base 512 MiB, adapter 2.0 MiB, gradients 2.0 MiB, optimizer 4.0 MiB, activations 700 MiB, "
        "overhead 80.0 MiB; activations and overhead are estimated)"
    )


@pytest.mark.parametrize("is_training", [True, False])
def test_the_model_stays_as_it_was(is_training: bool) -> None:
    """Its statistics and each module's mode: batch norm in training counts what it sees; and gradients may be off."""
    sizes: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}
    model = adapted(ResNetForImageClassification(ResNetConfig(**sizes)), targets=["classifier.1"]).train(is_training)
    model.resnet.embedder.eval()
    before = {name: value.clone() for name, value in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        found = plan(model, rows=2, image=(3, 32, 32), precision=torch.bfloat16)
    assert found.activations > 0
    assert before
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())
    assert [module.training for module in model.modules()] == modes


class Augmented:
    """Rows that draw from three generators."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"pixel_values": torch.rand(3, 32, 32) + random.random() + float(np.random.rand()), "labels": 0}


def test_a_plan_draws_no_random_number(tmp_path: Path) -> None:
    """Else a seeded training would differ with and without it."""
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    rows: Any = Augmented()
    trainer = Trainer(adapted(vit()), arguments, train_dataset=rows)
    states = random.getstate(), float(np.random.get_state()[1].sum()), torch.get_rng_state().tolist()  # type: ignore[union-attr,index]
    assert plan_of(trainer) is not None
    now = random.getstate(), float(np.random.get_state()[1].sum()), torch.get_rng_state().tolist()  # type: ignore[union-attr,index]
    assert now == states


def test_only_the_losses_of_trl_compute_logits_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain Trainer's loss keeps all of them at once."""
    monkeypatch.setattr(memory_plan, "_LOGITS", 1)
    rows: Any = [{"input_ids": [1] * 16, "labels": [1] * 16} for _ in range(4)]
    model = adapted(MODELS["llama"]())
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, per_device_train_batch_size=4)
    found = plan_of(Trainer(model, arguments, train_dataset=rows))
    assert found is not None
    assert found.activations == plan(model, rows=4, tokens=16).activations


def test_wrong_arguments_are_named() -> None:
    """Each with what is allowed, and the closest name."""
    model = adapted(bert())
    wrong: dict[str, dict[str, Any]] = {
        "either tokens, or image": {"rows": 1},
        "rows: expected 1 or more, got 0": {"rows": 0, "tokens": 8},
        "tokens or image: expected 1 or more, got 0": {"rows": 1, "tokens": 0},
        "no optimizer 'adamw_torhc'.*'adamw_torch'": {"rows": 1, "tokens": 8, "optimizer": "adamw_torhc"},
    }
    for words, arguments in wrong.items():
        with pytest.raises(ConfigError, match=words):
            plan(model, **arguments)
    with pytest.raises(ConfigError, match="expected a model of transformers, got Linear"):
        plan(nn.Linear(2, 2), rows=1, tokens=8)
    with pytest.raises(ConfigError, match="meta device; load them"):
        plan(model.to("meta"), rows=1, tokens=8)


def test_a_trainer_of_images_is_planned(tmp_path: Path) -> None:
    """By the first row's image; what has rows of unknown shape is not."""
    model = adapted(vit())
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, per_device_train_batch_size=6)
    rows: Any = [{"pixel_values": torch.zeros(3, 32, 32), "labels": 0}]
    found = plan_of(Trainer(model, arguments, train_dataset=rows))
    assert found is not None
    assert found == plan(model, rows=6, image=(3, 32, 32), optimizer="adamw_torch_fused")
    assert plan_of(Trainer(model, arguments, train_dataset=[{"sound": 0}])) is None  # type: ignore[arg-type]


def test_running_out_of_memory_is_recognized() -> None:
    """By class on accelerators; by torch's words on a CPU, which has no class for it."""
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(found.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(OSError("can't allocate memory"))


def test_an_error_of_memory_gets_one_note(tmp_path: Path) -> None:
    """With what the training takes and what would take less; other errors stay as they are."""
    model = adapted(bert())
    rows: Any = [{"input_ids": [2] * 8, "labels": 0}] * 8
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True), train_dataset=rows)
    planned = plan_of(trainer)
    assert planned is not None
    for _ in range(2):
        note_memory_(trainer, planned)
    raised: list[Exception] = [torch.OutOfMemoryError("no room"), RuntimeError("something else")]

    def fail(*arguments: Any) -> Any:
        raise raised[0]

    trainer.training_step = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(torch.OutOfMemoryError) as found:
        trainer.train()
    assert found.value.__notes__ == [f"tunerkit: {advice_on(planned)}"]
    assert "would save about: gradient checkpointing" in found.value.__notes__[0]
    raised.pop(0)
    with pytest.raises(RuntimeError, match="something else") as other:
        trainer.train()
    assert not hasattr(other.value, "__notes__")
    assert advice_on(None) == "gradient checkpointing, smaller batches or a 4-bit base take less"
