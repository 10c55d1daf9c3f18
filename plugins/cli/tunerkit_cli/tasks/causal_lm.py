"""Language modelling: plain texts, prompts with completions, or conversations."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from tunerkit.errors import ConfigError, shown
from tunerkit.paths import few
from tunerkit_cli.rows.reading import DataError, Table
from tunerkit_cli.tasks.base import Column, Row, Task, name_in, require_package, require_text
from tunerkit_cli.tasks.generating import (
    GenerationTask,
    checked_messages,
    prompt_of,
    require_one_kind,
    require_tokens,
)
from tunerkit_cli.tasks.turns import encode_turns
from tunerkit_transformers.pretrained import Pretrained

_FORMS: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"), ("text",))


class CausalLm(GenerationTask):
    """Rows with ``messages``, with ``prompt`` and ``completion``, or with ``text``; TRL's `SFTTrainer`."""

    name: ClassVar[str] = "causal-lm"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("messages", ("conversations",)),
        Column("prompt", ("instruction", "question")),
        Column("completion", ("response", "answer", "output"), predicted=True),
        Column("text"),
    )

    def columns_for(self, table: Table, names: Mapping[str, str], *, predicting: bool) -> Sequence[Column]:
        """The columns of the first of the three forms that is there, among those with all columns the recipe names."""
        wanted = [each for each in self.columns if not (predicting and each.predicted)]
        for form in _forms_with(names):
            found = [each for each in wanted if each.name in form]
            if all(each.name in names or name_in(table, each, names) in table.columns for each in found):
                return found
        raise DataError(
            f"{table.source}: has the columns {few([shown(each) for each in table.columns], shown=10)}; causal-lm "
            "needs 'messages', 'prompt' and 'completion', or 'text' (set the columns' names with columns.NAME in "
            "the recipe)"
        )

    def checked(self, row: Row, where: str) -> Row:
        """Texts are not empty, and messages have roles, and an answer has something that it answers."""
        if "text" in row or not ("messages" in row or require_one_kind(row, where)):
            return {name: require_text(row, name, where) for name in row}
        found = {name: checked_messages(row[name], where, name) for name in row}
        if not prompt_of(found):
            raise DataError(f"{where}, column 'messages': the only message is the assistant's; add what it answers")
        return found

    def encode(self, rows: Sequence[Row], loaded: Pretrained) -> Any:
        """The rows as they are: the trainer tokenizes them. Of conversations, the tokens with their labels."""
        import datasets

        require_tokens(loaded, chat=isinstance(prompt_of(rows[0]), list))
        if "messages" in rows[0] and not self.trains_on_prompts:
            return encode_turns([row["messages"] for row in rows], loaded)
        return datasets.Dataset.from_list(list(rows))

    def trainer_classes(self) -> tuple[type[Any], type[Any]]:
        """TRL's."""
        require_package("trl", self.name, "lm")
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        return SFTTrainer, SFTConfig


def _forms_with(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The forms of data that have all columns of some names. Raises `DataError` if none has."""
    found = [form for form in _FORMS if {*names} <= {*form}]
    if not found:
        raise DataError(
            f"columns.{' and columns.'.join(names)}: no form of data has all of them; name 'messages', 'prompt' and "
            "'completion', or 'text'"
        )
    return found


def settle_prompts_(
    task: Task, row: Row, asked: bool | None, training: Mapping[str, Any], arguments: Any, *, earlier: bool = False
) -> None:
    """Decide whether the tokens of prompts are learned, for a task and in the arguments of its trainer.

    Args:
        task: The task.
        row: One of its rows.
        asked: The recipe's ``train_on_prompts``.
        training: The recipe's ``training``, which may have TRL's arguments for it.
        arguments: The trainer's arguments.
        earlier: Whether a run that was begun before asks. If its recipe does not have the key, an earlier version wrote
            it, which learned whole conversations.

    Raises:
        ConfigError: The task has no prompts to learn, or keys contradict each other.
    """
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
    default = earlier and "messages" in row
    task.trains_on_prompts = asked if asked is not None else default if only is None else not only
    late = [each for each in ("chat_template_path", "eos_token") if getattr(arguments, each) is not None]
    if late and "messages" in row and not task.trains_on_prompts:
        raise ConfigError(
            [
                f"training.{late[0]}: is read after the assistant's turns are found; write it into the files of the "
                "model's tokenizer, or set train_on_prompts: true"
            ]
        )
    # The labels of conversations come from `encode`; TRL's own masks need templates that mark the turns.
    arguments.assistant_only_loss = False
    arguments.completion_only_loss = None if "messages" in row else not task.trains_on_prompts
