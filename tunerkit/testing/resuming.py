"""Stop a Trainer, by hand or by force, and resume it in a fresh process: the end must not tell.

@pytest.mark.parametrize("accumulation", [1, 3])
def test_resumes(tmp_path, accumulation):
run = resuming.Run("my-method", {"rank": 2}, tmp_path, accumulation=accumulation)
resuming.check_stopped_after_every_step(run)
"""

import multiprocessing
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import tunerkit
from tunerkit.testing.trainer_toys import VOCABULARY, TokenRows

_END = "end.pt"


@attrs.frozen
class Run:
    """One training of a small BERT, with dropout, that writes its checkpoints and its end into ``folder``.

    It is stopped after the step ``stop_after``, or killed (SIGKILL) at the end of the step ``kill_at``; with
    ``resume`` it goes on from the last checkpoint there. ``save_steps`` are the steps between two checkpoints.
    With ``best`` it evaluates at each checkpoint, to which that step looks best, and reloads it at the end.
    """

    method: str
    config: Mapping[str, object]
    folder: Path
    steps: int = 30
    accumulation: int = 1
    save_steps: int = 1
    stop_after: int | None = None
    kill_at: int | None = None
    resume: bool = False
    best: int | None = None


def check_stopped_after_every_step(run: Run) -> None:
    """A fresh process for each step, each resuming what the one before left, ends as the run never stopped."""
    whole = attrs.evolve(run, folder=run.folder / "whole")
    assert in_fresh_process(whole) == 0
    for step in range(1, run.steps + 1):
        part = attrs.evolve(run, folder=run.folder / "parts", stop_after=step, resume=step > 1)
        assert in_fresh_process(part) == 0
    assert_same(end_of(whole.folder), end_of(run.folder / "parts"))


def check_killed(run: Run, at: tuple[int, ...]) -> None:
    """Killed at the end of each of the steps ``at`` in turn and resumed from its last checkpoint, it ends the same."""
    whole = attrs.evolve(run, folder=run.folder / "whole", save_steps=run.steps)
    assert in_fresh_process(whole) == 0
    parts = run.folder / "parts"
    for number, step in enumerate(at):
        assert in_fresh_process(attrs.evolve(run, folder=parts, kill_at=step, resume=number > 0)) == -signal.SIGKILL
        assert not (parts / _END).exists()
    assert in_fresh_process(attrs.evolve(run, folder=parts, resume=True)) == 0
    assert_same(end_of(whole.folder), end_of(parts))


def in_fresh_process(run: Run) -> int:
    """Run it in an interpreter that has imported its modules and done nothing else; the exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=train, args=(run,))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def train(run: Run) -> None:
    """Train, or go on training, and write all that the end consists of."""
    torch.set_num_threads(1)
    model = tunerkit.wrap(_model(), run.method, run.config, seed=0)
    interrupt = _Interrupt(run)
    trainer = Trainer(
        model,
        _arguments(run),
        train_dataset=TokenRows(24),
        eval_dataset=TokenRows(4),
        callbacks=[interrupt],
        compute_metrics=interrupt.score,
    )
    tunerkit.attach(model, trainer)
    trainer.train(resume_from_checkpoint=True if run.resume else None)
    tuner = tunerkit.tuner(model)
    state = tuner.training_state()
    assert trainer.optimizer is not None
    end = {
        "model": model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "averages and masks": dict(state.tensors),
        "values": dict(state.values),
        "history": [(change.step, change.budget, dict(change.ranks)) for change in tuner.history],
        "steps": (tuner.steps, trainer.state.global_step),
        "storage": [p.untyped_storage().nbytes() for p in tuner.parameters()],
        "random state": torch.get_rng_state(),
    }
    torch.save(end, run.folder / _END)


def end_of(folder: Path) -> dict[str, Any]:
    """What `train` wrote at the end of a run."""
    found: dict[str, Any] = torch.load(folder / _END)
    return found


def assert_same(one: object, other: object, where: str = "end") -> None:
    """Bit for bit, and key for key."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        assert one.keys() == other.keys(), f"{where}: {sorted(map(str, one.keys() ^ other.keys()))}"
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}.{number}")
    elif isinstance(one, Tensor) and isinstance(other, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    else:
        assert one == other, f"{where}: {one} and {other}"


class _Interrupt(TrainerCallback):
    """Stops or kills the training where the run says so, and says how good a step is."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.step = 0

    def score(self, _: object) -> dict[str, float]:
        """The nearer to the best step, the better."""
        return {"score": -abs(self.step - (self.run.best or 0))}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step
        if state.global_step == self.run.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if state.global_step == self.run.stop_after:
            control.should_training_stop = True


def _model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=8,
        )
    )


def _arguments(run: Run) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(run.folder),
        max_steps=run.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=run.accumulation,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=run.save_steps,
        save_total_limit=2,
        eval_strategy="no" if run.best is None else "steps",
        eval_steps=run.save_steps,
        load_best_model_at_end=run.best is not None,
        metric_for_best_model="score",
        greater_is_better=True,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
