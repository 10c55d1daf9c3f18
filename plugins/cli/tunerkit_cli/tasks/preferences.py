"""The tasks on answers that are better or worse than others: in pairs (DPO, ORPO), alone (KTO), or as rewards."""

import math
import random
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, ClassVar

import tunerkit
from tunerkit_cli.rows import BadValue, DataError, Table
from tunerkit_cli.tasks.base import Column, MissingPackageError, Results, Row, Task, name_in
from tunerkit_cli.tasks.generating import refusing_template, require_tokens
from tunerkit_cli.tasks.language import COMPLETION, PROMPT, GenerationTask, measured
from tunerkit_cli.tasks.texts import token_limit
from tunerkit_cli.tasks.turns import messages_of, one_kind, refuse_lost, rendered
from tunerkit_transformers.pretrained import Pretrained

_TRUTH: Mapping[object, bool] = {
    **{True: True, False: False, "true": True, "false": False},
    **{"1": True, "0": False, "1.0": True, "0.0": False},
}
_PAIR = (Column("chosen", predicted=True), Column("rejected", predicted=True))


class Preference(GenerationTask):
    """Rows with ``prompt``, ``chosen`` and ``rejected``, texts or conversations; TRL's `DPOTrainer`."""

    trainer: ClassVar[tuple[str, str]] = ("trl.trainer.dpo_trainer:DPOTrainer", "trl.trainer.dpo_config:DPOConfig")
    columns: ClassVar[tuple[Column, ...]] = (PROMPT, *_PAIR)
    main_metric: ClassVar[str] = "reward_accuracy"
    measures: ClassVar[tuple[str, ...]] = ("loss", "reward_accuracy", "reward_margin")
    # A lower learning rate than for supervised training, as is usual for DPO.
    defaults: ClassVar[Mapping[str, Any]] = {**GenerationTask.defaults, "learning_rate": 5e-5}

    def trainer_settings(self, loaded: Pretrained) -> dict[str, Any]:
        """The reference is the model without its adapter."""
        return {"ref_model": _reference(loaded)}

    def metrics_of(self, found: Mapping[str, Any]) -> dict[str, float]:
        """The loss, and how often the chosen answer has the greater reward."""
        names = {"reward_accuracy": "rewards/accuracies", "reward_margin": "rewards/margins", "loss": "loss"}
        return {ours: float(found[f"eval_{name}"]) for ours, name in names.items()}


class Orpo(Preference):
    """The same rows, learned without a reference: the chosen answer as in supervised training, and its odds."""

    trainer: ClassVar[tuple[str, str]] = ("trl.experimental.orpo:ORPOTrainer", "trl.experimental.orpo:ORPOConfig")
    drops_long_prompts: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Any]] = {**Preference.defaults, "remove_unused_columns": False}

    def trainer_classes(self) -> tuple[type[Any], type[Any]]:
        """The classes of the trainer and of its arguments. Raises `MissingPackageError` if TRL has them no more."""
        try:
            return super().trainer_classes()
        except (ImportError, AttributeError) as problem:  # it calls them experimental
            raise MissingPackageError(
                f"the task {self.name} needs TRL's ORPOTrainer, which the installed TRL {version('trl')} does not have "
                "in trl.experimental.orpo; install TRL 1.16, or use --task preference"
            ) from problem

    def trainer_settings(self, loaded: Pretrained) -> dict[str, Any]:
        """Nothing: there is no reference."""
        return {}


class Kto(GenerationTask):
    """Rows with ``prompt``, ``completion`` and ``label``: whether the answer is a good one; TRL's `KTOTrainer`."""

    trainer: ClassVar[tuple[str, str]] = ("trl.trainer.kto_trainer:KTOTrainer", "trl.trainer.kto_config:KTOConfig")
    columns: ClassVar[tuple[Column, ...]] = (PROMPT, COMPLETION, Column("label", ("kto_tag",), predicted=True))
    main_metric: ClassVar[str] = "reward_margin"
    measures: ClassVar[tuple[str, ...]] = ("loss", "reward_margin")
    defaults: ClassVar[Mapping[str, Any]] = {**GenerationTask.defaults, "learning_rate": 5e-5}
    keeps_order: ClassVar[bool] = True  # a row's completion is compared with its neighbour's

    def checked(self, row: Row) -> Row:
        """Prompt and answer as of other language models; the label is true or false, also as a text or a number."""
        label = row.get("label")
        key = label.strip().lower() if isinstance(label, str) else label
        if "label" in row and (isinstance(key, list | dict) or key not in _TRUTH):
            raise BadValue("label", "expected true for a good answer or false for a bad one, got %s", label)
        found = super().checked({name: value for name, value in row.items() if name != "label"})
        return {**found, "label": _TRUTH[key]} if "label" in row else found

    def labels(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """None; rows of one kind alone raise `DataError`."""
        if len(kinds := {row["label"] for row in rows}) == 1:
            kind = "good" if kinds == {True} else "bad"
            do = "add others" if kind == "bad" else "add bad ones, or learn these with --task causal-lm"
            raise DataError(f"every training row is a {kind} answer; kto learns from good and bad ones: {do}")
        return ()

    def encode(self, rows: Sequence[Row], loaded: Pretrained) -> Any:
        """The rows, shuffled: the trainer takes them in their order, in which answers of one label often stand."""
        return super().encode(random.Random(0).sample(list(rows), len(rows)), loaded)

    def trainer_settings(self, loaded: Pretrained) -> dict[str, Any]:
        """The reference is the model without its adapter."""
        return {"ref_model": _reference(loaded)}

    def metrics_of(self, found: Mapping[str, Any]) -> dict[str, float]:
        """The loss, and how much greater the reward of good answers is; without it where one kind is missing."""
        rewards = [found.get(f"eval_rewards/{kind}") for kind in ("chosen", "rejected")]
        good, bad = (math.nan if each is None else float(each) for each in rewards)
        margin = {} if math.isnan(good - bad) else {"reward_margin": good - bad}
        return {**margin, "loss": float(found["eval_loss"])}


class Reward(Task):
    """Rows with ``chosen`` and ``rejected``, and mostly ``prompt``: a model that scores answers; `RewardTrainer`."""

    trainer: ClassVar[tuple[str, str]] = (
        "trl.trainer.reward_trainer:RewardTrainer",
        "trl.trainer.reward_config:RewardConfig",
    )
    columns: ClassVar[tuple[Column, ...]] = (Column("prompt", PROMPT.other_names, needed=False), *_PAIR, COMPLETION)
    max_length: ClassVar[int] = 1024
    main_metric: ClassVar[str] = "accuracy"
    measures: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin")
    defaults: ClassVar[Mapping[str, Any]] = {
        **Task.defaults,
        **{"num_train_epochs": 1, "learning_rate": 2e-4},
        **{"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8},
    }

    def columns_for(self, table: Table, names: Mapping[str, str], *, predicting: bool) -> Sequence[Column]:
        """A pair to train; to predict, one answer."""
        prompt, chosen, rejected, completion = self.columns
        if not predicting:
            return prompt, chosen, rejected
        one = Column("completion", completion.other_names)
        if name_in(table, one, names) not in table.columns and {"chosen", "rejected"} <= {*table.columns}:
            do = "say which of a pair with --column completion=chosen or --column completion=rejected"
            raise DataError(f"{table.source}: {self.name} scores one answer of each row; {do}")
        return prompt, one

    def checked(self, row: Row) -> Row:
        """All values are texts, or all are messages."""
        return {name: messages_of(row[name], name) for name in row} if one_kind(row) else super().checked(row)

    def guess_loss(self, rows: Sequence[Row]) -> float | None:
        """The loss of equal rewards."""
        return math.log(2)

    def encode(self, rows: Sequence[Row], loaded: Pretrained) -> Any:
        """Both answers of each row as tokens, each with its prompt, cut at the greatest length."""
        import datasets

        names = ("chosen", "rejected")
        return datasets.Dataset.from_dict({f"{name}_ids": self._tokens(rows, name, loaded) for name in names})

    def evaluate(self, trainer: Any, dataset: Any) -> Results:
        """How often the chosen answer has the greater reward, and by how much on average."""
        found = measured(trainer, dataset)
        metrics = {name: float(found[f"eval_{name}"]) for name in ("accuracy", "margin", "loss")}
        return Results(metrics, seconds=found.get("eval_runtime"))

    def predict(self, loaded: Pretrained, rows: Sequence[Row], *, batch_size: int) -> list[dict[str, Any]]:
        """The reward of each row's answer; of a pair, that of the chosen one."""
        import torch

        found: list[dict[str, Any]] = []
        tokens = self._tokens(rows, "completion" if "completion" in rows[0] else "chosen", loaded)
        loaded.model.eval()
        for start in range(0, len(tokens), batch_size):
            batch = loaded.processor.pad({"input_ids": tokens[start : start + batch_size]}, return_tensors="pt")
            with torch.inference_mode():
                logits = loaded.model(**batch.to(loaded.model.device)).logits
            found += [{"value": float(value)} for value in logits.reshape(-1)]
        return found

    def _tokens(self, rows: Sequence[Row], name: str, loaded: Pretrained) -> list[list[int]]:
        """The tokens of each row's prompt and one of its answers, as a conversation, or as a text with its end."""
        chats = isinstance(rows[0][name], list)
        if chats:
            require_tokens(loaded, chat=True)
            refuse_lost([[*row.get("prompt", ()), *row[name]] for row in rows], loaded)
        limit, end = token_limit(loaded, self.limit), loaded.processor.eos_token or ""  # encoders mark it themselves
        found = []
        for row in rows:
            if chats:
                with refusing_template(loaded, "a conversation"):
                    text = str(rendered(loaded.processor, [*row.get("prompt", ()), *row[name]], tokenize=False))
            else:
                text = row.get("prompt", "") + row[name]
                text = text if text.endswith(end) else text + end
            ids = loaded.processor(text, add_special_tokens=not chats, truncation=True, max_length=limit)["input_ids"]
            found.append(ids)
        return found


def _reference(loaded: Pretrained) -> Any:
    """The model without its adapter, which may be trained already; no second model is loaded."""
    name = tunerkit.tuner(loaded.model).name
    tunerkit.activate(loaded.model, ())
    try:
        return tunerkit.reference(loaded.model)
    finally:
        tunerkit.activate(loaded.model, name)
