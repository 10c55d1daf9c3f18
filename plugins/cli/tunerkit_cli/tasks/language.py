"""The tasks on language models that learn what to say: plain texts, prompts with completions, chats, translation."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tunerkit.errors import ConfigError, shown
from tunerkit.paths import few
from tunerkit_cli.rows import BadValue, DataError, Table
from tunerkit_cli.tasks.base import USUAL, Column, Results, Row, Task, name_in
from tunerkit_cli.tasks.generating import GREEDY, Answering, generate, require_tokens
from tunerkit_cli.tasks.texts import token_limit
from tunerkit_cli.tasks.turns import dataset_of, encode_turns, messages_of, one_kind, refuse_lost
from tunerkit_transformers.pretrained import Pretrained

SAMPLES, _SHORT = 2, Answering(24)
_MOST = 230.0  # e to this power is within what a record may hold
PROMPT = Column("prompt", ("instruction", "question"))
COMPLETION = Column("completion", ("response", "answer", "output"), predicted=True)
_FORMS: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"), ("text",))


class GenerationTask(Task):
    """A task that trains a language model."""

    max_length: ClassVar[int] = 1024
    measures: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy", "mean_token_accuracy")
    answer: ClassVar[str] = "completion"  # the name of what is predicted
    # Whether the trainer itself leaves out rows whose prompt fills its greatest length.
    drops_long_prompts: ClassVar[bool] = True
    # Whether rows are trained in the order that they are given in: else in another, and those of one length together.
    keeps_order: ClassVar[bool] = False
    # Language models are larger, and their rows longer.
    defaults: ClassVar[Mapping[str, Any]] = {
        **Task.defaults,
        **{"num_train_epochs": 1, "learning_rate": 2e-4},
        **{"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8},
        **USUAL,
    }

    def checked(self, row: Row) -> Row:
        """Texts are not empty, or all values are messages with roles, which ask something."""
        if not ("messages" in row or (not {"text", "source"} & row.keys() and one_kind(row))):
            return super().checked(row)
        found = {name: messages_of(row[name], name) for name in row}
        if not prompt_of(found):
            raise BadValue("messages", "the only message is the assistant's; add what it answers")
        return found

    def encode(self, rows: Sequence[Row], loaded: Pretrained) -> Any:
        """The rows as they are: the trainer tokenizes them. Of conversations, the tokens with their labels."""
        require_tokens(loaded, chat=isinstance(prompt_of(rows[0]), list))
        refuse_lost([prompt_of(row) for row in rows], loaded)
        if "messages" in rows[0] and not self.trains_on_prompts:
            return encode_turns([row["messages"] for row in rows], loaded)
        return dataset_of(rows)

    def room(self, arguments: Any, loaded: Pretrained) -> tuple[int | None, int]:
        """The greatest length of a row, None if rows are not cut, and how many of its tokens a prompt must leave."""
        return arguments.max_length, 1

    def evaluate(self, trainer: Any, dataset: Any) -> Results:
        """The metrics by the trainer's loss."""
        found = measured(trainer, dataset)
        return Results(self.metrics_of(found), seconds=found.get("eval_runtime"))

    def metrics_of(self, found: Mapping[str, Any]) -> dict[str, float]:
        """The loss and the perplexity, from an evaluation of the trainer."""
        loss, accuracy = float(found["eval_loss"]), found.get("eval_mean_token_accuracy")
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, _MOST))}
        return metrics if accuracy is None else {**metrics, "token_accuracy": float(accuracy)}

    def samples(self, loaded: Pretrained, rows: Sequence[Row], count: int) -> list[dict[str, str]]:
        """The beginnings of the answers to the first held-out prompts."""
        chosen = rows[:count]
        prompts = [prompt_of(row) for row in chosen]
        texts = [prompt if isinstance(prompt, str) else _asked(prompt) for prompt in prompts]
        found = self.predict(loaded, chosen, batch_size=max(1, len(chosen)), answering=_SHORT)
        return [{"prompt": text, "after": each[self.answer]} for text, each in zip(texts, found, strict=True)]

    def predict(
        self, loaded: Pretrained, rows: Sequence[Row], *, batch_size: int, answering: Answering = GREEDY
    ) -> list[dict[str, Any]]:
        """Continue each row's prompt. Sources are cut as in training."""
        prompts, limit = [prompt_of(row) for row in rows], token_limit(loaded, self.limit)
        answers = generate(loaded, prompts, batch_size=batch_size, answering=answering, max_length=limit)
        return [{self.answer: text} for text in answers]


class CausalLm(GenerationTask):
    """Rows with ``messages``, with ``prompt`` and ``completion``, or with ``text``; TRL's `SFTTrainer`."""

    trainer: ClassVar[tuple[str, str]] = ("trl.trainer.sft_trainer:SFTTrainer", "trl.trainer.sft_config:SFTConfig")
    columns: ClassVar[tuple[Column, ...]] = (
        Column("messages", ("conversations",)),
        PROMPT,
        COMPLETION,
        Column("text"),
    )

    def columns_for(self, table: Table, names: Mapping[str, str], *, predicting: bool) -> Sequence[Column]:
        """The columns of the first of the three forms that is there, among those with all columns the recipe names."""
        forms = [form for form in _FORMS if {*names} <= {*form}]
        if not forms:
            raise DataError(
                f"columns.{' and columns.'.join(names)}: no form of data has all of them; name 'messages', 'prompt' "
                "and 'completion', or 'text'"
            )
        wanted = [each for each in self.columns if not (predicting and each.predicted)]
        for form in forms:
            found = [each for each in wanted if each.name in form]
            if all(each.name in names or name_in(table, each, names) in table.columns for each in found):
                return found
        raise DataError(
            f"{table.source}: has the columns {few([shown(each) for each in table.columns], shown=10)}; causal-lm "
            "needs 'messages', 'prompt' and 'completion', or 'text' (set the columns' names with columns.NAME in "
            "the recipe)"
        )


def settle_prompts_(
    task: Task, row: Row, asked: bool | None, training: Mapping[str, Any], arguments: Any, *, earlier: bool = False
) -> None:
    """Decide whether prompts are learned, for a task and its trainer; ``earlier`` if a run that was begun asks."""
    if not isinstance(task, CausalLm):
        if asked is not None:
            raise ConfigError([f"train_on_prompts: {task.name} learns no prompts; leave the key out"])
        return
    if "text" in row:
        if asked is not None and not earlier:
            raise ConfigError(["train_on_prompts: rows of texts have no prompts; leave the key out"])
        return
    name = "assistant_only_loss" if "messages" in row else "completion_only_loss"
    only = training.get(name)
    if asked is not None and only is not None and asked == bool(only):
        raise ConfigError(
            [f"train_on_prompts is {str(asked).lower()}, and so is training.{name}, which is its opposite; set one"]
        )
    default = earlier and "messages" in row  # an earlier version, whose recipes lack the key, learned all of them
    task.trains_on_prompts = asked if asked is not None else default if only is None else not only
    late = [each for each in ("chat_template_path", "eos_token") if getattr(arguments, each) is not None]
    if late and "messages" in row and not task.trains_on_prompts:
        do = "write it into the files of the model's tokenizer, or set train_on_prompts: true"
        raise ConfigError([f"training.{late[0]}: is read after the assistant's turns are found; {do}"])
    # The labels of conversations come from `encode`; TRL's own masks need templates that mark the turns.
    arguments.assistant_only_loss = False
    arguments.completion_only_loss = None if "messages" in row else not task.trains_on_prompts


class Seq2Seq(GenerationTask):
    """Rows with ``source`` and ``target``."""

    trainer: ClassVar[tuple[str, str]] = ("transformers:Seq2SeqTrainer", "transformers:Seq2SeqTrainingArguments")
    columns: ClassVar[tuple[Column, ...]] = (
        Column("source", ("input", "text", "document")),
        Column("target", ("output", "summary", "translation"), predicted=True),
    )
    max_length: ClassVar[int] = 256
    answer: ClassVar[str] = "target"
    # Encoder-decoder models are trained longer than other language models, at a higher rate.
    defaults: ClassVar[Mapping[str, Any]] = {**GenerationTask.defaults, "num_train_epochs": 3, "learning_rate": 1e-3}

    def encode(self, rows: Sequence[Row], loaded: Pretrained) -> Any:
        """Tokenize sources and targets, each truncated."""
        import datasets

        targets = [row["target"] for row in rows] if rows and "target" in rows[0] else None
        limit = token_limit(loaded, self.limit)
        encoded = loaded.processor(
            [row["source"] for row in rows], text_target=targets, truncation=True, max_length=limit
        )
        return datasets.Dataset.from_dict(dict(encoded))

    def trainer_settings(self, loaded: Pretrained) -> dict[str, Any]:
        """Pad sources and targets, and shift the targets for the decoder."""
        from transformers import DataCollatorForSeq2Seq

        return {"data_collator": DataCollatorForSeq2Seq(loaded.processor, model=loaded.model)}


# --- rows ---


def prompt_of(row: Row) -> str | list[dict[str, str]]:
    """What a row asks the model: the prompt, the messages before the last answer, the source, or the text."""
    if "messages" in row and "prompt" not in row:
        messages: list[dict[str, str]] = row["messages"]
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    prompt: str | list[dict[str, str]] = next(row[name] for name in ("prompt", "source", "text") if name in row)
    return prompt


def _asked(messages: Sequence[Mapping[str, str]]) -> str:
    """What a user said last in a conversation."""
    said = [each["content"] for each in messages if each["role"] == "user"]
    return said[-1] if said else messages[-1]["content"]


def are_conversations(task: Task, rows: Sequence[Row]) -> bool | None:
    """Whether the prompts of a language model's rows are lists of messages; None for other tasks."""
    if not isinstance(task, GenerationTask) or not {"messages", "prompt", "text"} & {*rows[0]}:
        return None
    return isinstance(prompt_of(rows[0]), list)


def measured(trainer: Any, dataset: Any) -> Mapping[str, Any]:
    """Evaluate encoded rows by the trainer's loss; what it found in its last step counts, as the model is the same."""
    step, history = trainer.state.global_step, trainer.state.log_history
    if dataset is trainer.eval_dataset and step > 0 and not trainer.args.load_best_model_at_end:
        found = [entry for entry in history if "eval_loss" in entry and entry["step"] == step]
        if found:
            return found[-1]  # type: ignore[no-any-return]  # a trainer is of any class here
    return trainer.evaluate(dataset)  # type: ignore[no-any-return]
