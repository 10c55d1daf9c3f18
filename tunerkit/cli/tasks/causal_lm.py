"""Language modelling: plain texts, prompts with completions, or conversations."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from tunerkit.cli.rows.reading import DataError, Table
from tunerkit.cli.tasks.base import Column, Row, name_in, require_package, require_text
from tunerkit.cli.tasks.generating import (
    GenerationTask,
    checked_messages,
    prompt_of,
    require_one_kind,
    require_tokens,
)
from tunerkit.errors import shown
from tunerkit.integrations.pretrained import Pretrained
from tunerkit.paths import few

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
        """The rows as they are: the trainer tokenizes them."""
        import datasets

        require_tokens(loaded, chat=isinstance(prompt_of(rows[0]), list))
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
