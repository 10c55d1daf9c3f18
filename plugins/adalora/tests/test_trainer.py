"""AdaLoRA with a transformers Trainer: checkpoints, best model, logs, and the Trainer's own options."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit_adalora.svd_layer import SvdLayer

pytest.importorskip("transformers", reason="the Trainer is transformers'")
pytest.importorskip("accelerate", reason="the Trainer needs it")
from transformers import Trainer, TrainerCallback

from tests.support.trainer_toys import VOCABULARY, TokenRows, arguments, tokenizer
from tunerkit_testing.transformers_cases import bert

STEPS = 20
# Allocations at 3, 6, 9 and 10, where the ranks are final.
CONFIG: dict[str, Any] = {
    "target_rank": 2, "init_rank": 4, "exact_svd": True, "t_init": 2, "t_final": 10, "delta_t": 3,
    "train_modules": ["classifier"],
}  # fmt: skip
TARGETS = 2 * 6


class Plain(nn.Module):
    """Not a PreTrainedModel: the Trainer would save its whole state dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first, self.second = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.second(torch.tanh(self.first(self.embed(input_ids).mean(1))))
        found = {"logits": logits}
        return found if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), **found}


def trainer_of(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    metrics = {key: options.pop(key) for key in ("compute_metrics", "callbacks") if key in options}
    chosen = arguments(folder, **({"max_steps": STEPS, "learning_rate": 1e-2} | options))
    trainer = Trainer(model, chosen, train_dataset=TokenRows(32), eval_dataset=TokenRows(8), **metrics)
    tunerkit.attach(model, trainer)
    return trainer


def wrapped(model: nn.Module | None = None, **changes: Any) -> nn.Module:
    return tunerkit.wrap(bert() if model is None else model, "adalora", {**CONFIG, **changes}, seed=0)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model.eval()(input_ids=TokenRows(8).ids)
    result: Tensor = found["logits"]
    return result


def sizes(model: nn.Module) -> list[int]:
    return [len(layer.lam) for layer in tunerkit.tuner(model).adapters().values() if isinstance(layer, SvdLayer)]


@pytest.mark.parametrize("make", [bert, Plain], ids=["transformers model", "plain module"])
def test_a_checkpoint_holds_the_adapter_and_no_model(make: Any, tmp_path: Path) -> None:
    """Two files besides the Trainer's; each checkpoint loads into a fresh base, and `save_model` writes one too."""
    changes = {} if make is bert else {"targets": ["first", "second"], "train_modules": []}
    model = wrapped(make(), **changes)
    trainer = trainer_of(model, tmp_path, save_strategy="steps", save_steps=5, save_total_limit=2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-15", "checkpoint-20"]
    assert {path.name for path in (tmp_path / "checkpoint-20").iterdir()} == {
        "adapter.safetensors", "state.safetensors", "ranks.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
        "trainer_state.json", "training_args.bin",
    }  # fmt: skip
    trainer.save_model(str(tmp_path / "end"))
    for folder in (tmp_path / "checkpoint-20", tmp_path / "end"):
        assert torch.equal(logits(tunerkit.load(make(), folder)), logits(model))


def test_a_trainer_without_attach_stops_after_its_first_step(tmp_path: Path) -> None:
    """The error has the line to add; before, training ran to its end, and the adapter could not be saved."""
    chosen = arguments(tmp_path, max_steps=STEPS)
    trainer = Trainer(wrapped(), chosen, train_dataset=TokenRows(8))
    with pytest.raises(tunerkit.errors.StepError, match=r"with a Trainer tunerkit\.attach\(model, trainer\)"):
        trainer.train()
    assert trainer.state.global_step == 1


def best_of(model: nn.Module, folder: Path, best: int, **options: Any) -> Trainer:
    """A trainer for which the step ``best`` has the best metric."""
    made: list[Trainer] = []

    def score(_: Any) -> dict[str, float]:
        return {"score": -abs(made[0].state.global_step - best)}

    made.append(
        trainer_of(
            model, folder, save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3,
            load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True, compute_metrics=score,
            **options,
        )
    )  # fmt: skip
    return made[0]


@pytest.mark.parametrize("best", [3, 9, 15], ids=["before pruning", "while pruning", "shrunk"])
def test_the_best_model_is_reloaded_at_the_end_whatever_its_ranks(best: int, tmp_path: Path) -> None:
    """`load_best_model_at_end`: weights, ranks, masks and budget become those of the best step, in place."""
    model = wrapped()
    trainer = best_of(model, tmp_path, best, save_total_limit=1)
    before = [id(p) for p in tunerkit.tuner(model).parameters()]
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    loaded = tunerkit.load(bert(), tmp_path / f"checkpoint-{best}")
    tuner = tunerkit.tuner(model)
    assert torch.equal(logits(model), logits(loaded))
    assert tuner.ranks() == tunerkit.tuner(loaded).ranks()
    assert (tuner.steps, tuner.budget()) == (best, sum(tuner.ranks().values()))
    assert sizes(model) == sizes(loaded)
    assert sum(sizes(model)) == (2 * TARGETS if best > 10 else 4 * TARGETS)
    assert [id(p) for p in tuner.parameters()] == before
    assert all(change.step <= best for change in tuner.history)


def test_a_best_model_without_its_state_is_what_its_weights_say(tmp_path: Path) -> None:
    """With `save_only_model` the best step's ranks are restored; the training state after it is not."""
    model = wrapped()
    trainer = best_of(model, tmp_path, 3, save_only_model=True)
    with pytest.warns(tunerkit.TunerkitWarning, match="above the final"):
        trainer.train()
    tuner = tunerkit.tuner(model)
    assert tuner.steps == 3
    assert tuner.budget() == sum(tuner.ranks().values()) > 2 * TARGETS
    assert [change.step for change in tuner.history] == [3]
    with pytest.warns(tunerkit.TunerkitWarning, match="above the final"):
        tunerkit.save(model, tmp_path / "end")
    with pytest.raises(tunerkit.errors.StepError, match="not attached"):
        tuner.finish()


def test_training_again_after_the_best_model_was_reloaded(tmp_path: Path) -> None:
    """The optimizer's state belongs to other ranks; a second train() restarts and works."""
    model = wrapped()
    trainer = best_of(model, tmp_path, 3)
    trainer.train()
    assert tunerkit.tuner(model).steps == 3
    trainer.train()
    assert len(tunerkit.tuner(model).history) == 1  # the best step was 3 again


def test_a_second_training_after_shrinking_says_that_nothing_is_left_to_prune(tmp_path: Path) -> None:
    """The removed triplets do not come back: one warning says so, and training goes on at these ranks."""
    model = wrapped()
    trainer = trainer_of(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", tunerkit.TunerkitWarning)
        trainer.train()
    before = tunerkit.tuner(model).ranks()
    with pytest.warns(tunerkit.TunerkitWarning, match="nothing is left to prune.*wrap the model again.*shrink"):
        trainer.train()
    assert tunerkit.tuner(model).ranks() == before


def test_resuming_after_shrinking_says_nothing(tmp_path: Path) -> None:
    """That training did prune; it only goes on."""
    trainer_of(wrapped(), tmp_path, save_strategy="steps", save_steps=15).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", tunerkit.TunerkitWarning)
        trainer_of(wrapped(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))


def test_budget_and_a_summary_of_the_ranks_are_in_the_logs(tmp_path: Path) -> None:
    """Each row with a loss has four entries, however many targets there are; a file has every target's rank."""
    model = wrapped()
    trainer = trainer_of(
        model, tmp_path, logging_strategy="steps", logging_steps=1, save_strategy="steps", save_steps=5
    )
    trainer.train()
    tuner = tunerkit.tuner(model)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["budget"] for row in rows] == [tuner.budget(step) for step in range(1, STEPS + 1)]
    ranks = list(tuner.ranks().values())
    expected = {"rank_mean": sum(ranks) / len(ranks), "rank_min": min(ranks), "rank_max": max(ranks)}
    assert expected.items() <= rows[-1].items()
    assert not any(key.startswith("rank/") for row in rows for key in row)
    for step in (5, 20):
        found = json.loads((tmp_path / f"checkpoint-{step}" / "ranks.json").read_text())
        saved = tunerkit.tuner(tunerkit.load(bert(), tmp_path / f"checkpoint-{step}"))
        assert found == {"step": step, "budget": saved.budget(), "ranks": saved.ranks()}


def test_every_target_s_rank_is_in_the_logs_if_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the environment's variable, the first row after an allocation has them."""
    monkeypatch.setenv("TUNERKIT_LOG_TARGET_RANKS", "1")
    model = wrapped()
    trainer = trainer_of(model, tmp_path, logging_strategy="steps", logging_steps=1)
    trainer.train()
    tuner = tunerkit.tuner(model)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    told = {row["step"]: row for row in rows if any(key.startswith("rank/") for key in row)}
    assert list(told) == [1, 3, 6, 9, 10]
    assert {f"rank/{path}": rank for path, rank in tuner.ranks().items()}.items() <= told[10].items()


def test_ranks_and_budget_are_in_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer's TensorBoard callback writes them: one curve for the budget, and if asked for one per target."""
    monkeypatch.setenv("TUNERKIT_LOG_TARGET_RANKS", "1")
    pytest.importorskip("tensorboard", reason="the curves are read back with it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = wrapped()
    trainer_of(model, tmp_path, logging_strategy="steps", logging_steps=2, report_to=["tensorboard"]).train()
    events = next(tmp_path.rglob("events.out.*"))
    written = EventAccumulator(str(events.parent)).Reload()
    curve = written.Scalars("train/budget")
    assert [(point.step, point.value) for point in curve][-1] == (STEPS, 2 * TARGETS)
    ranks = [tag for tag in written.Tags()["scalars"] if tag.startswith("train/rank/")]
    assert len(ranks) == TARGETS


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 3},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "bf16": {"bf16": True},
    "fused": {"optim": "adamw_torch_fused"},
    "loop": {"optim": "adamw_torch"},
    "no clipping": {"max_grad_norm": 0.0},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "epochs": {"max_steps": -1, "num_train_epochs": 2.5},
    "compile": {"torch_compile": True, "torch_compile_backend": "eager"},
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated")
@pytest.mark.parametrize("name", OPTIONS)
def test_the_trainer_s_options_leave_the_budget_exact(name: str, tmp_path: Path) -> None:
    """One line attaches; every adapter was trained, final ranks are in memory, and the file has the trained values."""
    model = wrapped()
    trainer = trainer_of(model, tmp_path, **OPTIONS[name])
    trainer.train()
    tuner = tunerkit.tuner(model)
    assert tuner.steps == tuner.total_steps == trainer.state.max_steps
    assert sum(tuner.ranks().values()) == tuner.budget() == 2 * TARGETS == sum(sizes(model))
    # P starts at 0, so an adapter that learnt nothing would show.
    assert all(bool(layer.get_parameter("p").any()) or layer.rank == 0 for layer in tuner.adapters().values())
    # Weights and not outputs: the Trainer leaves its autocast around the model's forward.
    loaded = tunerkit.tuner(tunerkit.load(bert(), tunerkit.save(model, tmp_path / "end")))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), tuner.parameters(), strict=True))


def test_checkpointing_gives_the_gradients_of_the_plain_run(tmp_path: Path) -> None:
    """Both modes give the same end as the run without it."""
    ends = []
    for name in ("no clipping", "checkpointing", "reentrant"):
        model = wrapped()
        trainer_of(
            model, tmp_path / name, **OPTIONS[name], **({} if name == "no clipping" else {"max_grad_norm": 0.0})
        ).train()
        ends.append(logits(model))
    assert torch.allclose(ends[0], ends[1], atol=1e-6)
    assert torch.allclose(ends[0], ends[2], atol=1e-6)


def test_resuming_from_a_checkpoint_without_state_is_refused(tmp_path: Path) -> None:
    """`save_only_model` leaves the averages out, so pruning would have no scores: the error says what to do."""
    model = wrapped()
    trainer_of(model, tmp_path, save_strategy="steps", save_steps=5, save_only_model=True).train()
    assert not (tmp_path / "checkpoint-10" / "state.safetensors").exists()
    with pytest.raises(tunerkit.errors.FileError, match=r"no state\.safetensors"):
        trainer_of(wrapped(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


def test_a_resume_that_failed_leaves_no_state_to_the_next_training(tmp_path: Path) -> None:
    """State loaded for it is not used as averages and history of a training that restarts."""
    trainer_of(wrapped(), tmp_path, save_strategy="steps", save_steps=7).train()
    (tmp_path / "checkpoint-7" / "optimizer.pt").write_bytes(b"nothing")
    model = wrapped()
    trainer = trainer_of(model, tmp_path)
    with pytest.raises(Exception, match=r"."):  # torch's own words
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    trainer.train()
    assert [change.step for change in tunerkit.tuner(model).history] == [3, 6, 9, 10]


def test_resuming_with_another_config_or_length_is_refused(tmp_path: Path) -> None:
    """The error names the differences; with another config the model has nothing of the checkpoint."""
    trainer_of(wrapped(), tmp_path, save_strategy="steps", save_steps=5).train()
    checkpoint = str(tmp_path / "checkpoint-5")
    other = wrapped(delta_t=2)
    before = logits(other)
    with pytest.raises(tunerkit.errors.FileError, match="delta_t 3 -> 2"):
        trainer_of(other, tmp_path).train(resume_from_checkpoint=checkpoint)
    assert torch.equal(logits(other), before)
    with pytest.raises(tunerkit.errors.FileError, match="total_steps 20 -> 30"):
        trainer_of(wrapped(), tmp_path, max_steps=30).train(resume_from_checkpoint=checkpoint)


def test_a_checkpoint_whose_writing_was_interrupted_is_refused(tmp_path: Path) -> None:
    """The Trainer writes its own state last: a checkpoint without it is incomplete. By itself it resumes from another.

    Both ends are the same, bit for bit.
    """
    whole, model = wrapped(), wrapped()
    trainer_of(whole, tmp_path, save_strategy="steps", save_steps=5).train()
    (tmp_path / "checkpoint-20" / "trainer_state.json").unlink()
    with pytest.raises(tunerkit.errors.FileError, match="not complete"):
        trainer_of(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert tunerkit.tuner(model).steps == 0
    with pytest.warns(tunerkit.TunerkitWarning, match="resumes from .*checkpoint-15, the newest complete checkpoint"):
        trainer_of(model, tmp_path).train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True))


def test_steps_that_are_skipped_still_move_the_schedule(tmp_path: Path) -> None:
    """The Trainer's global step counts: an overflow at the last allocation only delays it."""
    model = wrapped()

    class Overflow(TrainerCallback):
        """Makes the optimizer skip steps 9 to 11, as GradScaler does."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = kwargs["optimizer"].optimizer
            optimizer.step = (
                (lambda *_: None) if state.global_step + 1 in (9, 10, 11) else type(optimizer).step.__get__(optimizer)
            )

    trainer = trainer_of(model, tmp_path, callbacks=[Overflow()])
    trainer.train()
    tuner = tunerkit.tuner(model)
    assert [change.step for change in tuner.history] == [3, 6, 12]
    assert tuner.steps == STEPS
    assert sum(tuner.ranks().values()) == 2 * TARGETS


def test_trl_s_trainer_is_attached_the_same_way(tmp_path: Path) -> None:
    """SFTTrainer on a causal model: pruned to the budget, adapter-only checkpoints, bit-identical resume."""
    trl = pytest.importorskip("trl", reason="the trainer is TRL's")
    datasets = pytest.importorskip("datasets", reason="TRL takes its data from it")
    from transformers import LlamaConfig, LlamaForCausalLM

    rows = datasets.Dataset.from_dict({"input_ids": TokenRows(32).ids.tolist()})

    def new(steps: int | None = None) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **sizes))  # type: ignore[arg-type]
        tunerkit.wrap(model, "adalora", {k: v for k, v in CONFIG.items() if k != "train_modules"}, seed=0)
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
            report_to=[], save_strategy="steps", save_steps=7, disable_tqdm=True, bf16=False,
            logging_strategy="no", eos_token=None, pad_token=None,
        )  # fmt: skip
        trainer = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer(tmp_path))
        tunerkit.attach(model, trainer)
        return model, trainer

    model, trainer = new()
    trainer.train()
    tuner = tunerkit.tuner(model)
    assert sum(tuner.ranks().values()) == tuner.budget() == 2 * len(tuner.ranks())
    names = {path.name for path in (tmp_path / "checkpoint-7").iterdir()}
    assert {"adapter.safetensors", "state.safetensors"} <= names
    assert not {name for name in names if name.startswith("model")}
    again, resumed = new()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
