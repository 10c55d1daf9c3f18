"""Preferences: of two answers to a prompt, the chosen one (DPO)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import tunerkit
from tunerkit_cli.tasks.base import Column, Results, Row, require_package, require_text
from tunerkit_cli.tasks.generating import GenerationTask, checked_messages, measured, require_one_kind, require_tokens
from tunerkit_transformers.pretrained import Pretrained


class Preference(GenerationTask):
    """Rows with ``prompt``, ``chosen`` and ``rejected``, texts or conversations; TRL's `DPOTrainer`."""

    name: ClassVar[str] = "preference"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("prompt", ("question", "instruction")),
        Column("chosen", predicted=True),
        Column("rejected", predicted=True),
    )
    main_metric: ClassVar[str] = "reward_accuracy"
    greater_is_better: ClassVar[bool] = True

    def checked(self, row: Row, where: str) -> Row:
        """All three are texts, or all three are lists of messages."""
        if require_one_kind(row, where):
            return {name: checked_messages(row[name], where, name) for name in row}
        return {name: require_text(row, name, where) for name in row}

    def encode(self, rows: Sequence[Row], loaded: Pretrained) -> Any:
        """The rows as they are: the trainer tokenizes them."""
        import datasets

        require_tokens(loaded, chat=isinstance(rows[0]["prompt"], list))
        return datasets.Dataset.from_list(list(rows))

    @property
    def defaults(self) -> dict[str, Any]:
        """A lower learning rate than for supervised training, as is usual for DPO."""
        return {**super().defaults, "learning_rate": 5e-5}

    def trainer_classes(self) -> tuple[type[Any], type[Any]]:
        """TRL's."""
        require_package("trl", self.name, "lm")
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        return DPOTrainer, DPOConfig

    def trainer_settings(self, loaded: Pretrained) -> dict[str, Any]:
        """The reference is the model without its adapter, which may be trained already; no second model is loaded."""
        name = tunerkit.tuner(loaded.model).name
        tunerkit.activate(loaded.model, ())
        try:
            return {"ref_model": tunerkit.reference(loaded.model)}
        finally:
            tunerkit.activate(loaded.model, name)

    def evaluate(self, trainer: Any, dataset: Any) -> Results:
        """The loss, and how often the chosen answer has the greater reward."""
        found = measured(trainer, dataset)
        accuracy, margin = found["eval_rewards/accuracies"], found["eval_rewards/margins"]
        metrics = {
            "reward_accuracy": float(accuracy),
            "reward_margin": float(margin),
            "loss": float(found["eval_loss"]),
        }
        return Results(metrics, seconds=found.get("eval_runtime"))
