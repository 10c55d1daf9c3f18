"""Language modelling: plain texts, prompts with completions, or conversations."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tunerkit.cli.rows.reading import DataError, Table
from tunerkit.cli.tasks.base import Column, Row, name_in, require_package, require_text
from tunerkit.cli.tasks.generating import GenerationTask, checked_messages, prompt_of, require_tokens
from tunerkit.errors import shown
from tunerkit.integrations.pretrained import Pretrained
from tunerkit.paths import few

_FORMS = (("messages",), ("prompt", "completion"), ("text",))


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
        """The columns of the first of the three forms that is there, or that the recipe names."""
        there = {each.name for each in self.columns if name_in(table, each, names) in table.columns}
        forms = (*_FORMS, ("prompt",)) if predicting else _FORMS
        found = next((form for form in forms if there | set(names) >= set(form)), None)
        if found is None:
            raise DataError(
                f"{table.source}: has the columns {few([shown(each) for each in table.columns], shown=10)}; causal-lm "
                "needs 'messages', 'prompt' and 'completion', or 'text' (set the columns' names with columns.NAME in "
                "the recipe)"
            )
        return [each for each in self.columns if each.name in found]

    def checked(self, row: Row, where: str) -> Row:
        """Texts are not empty, and messages have roles."""
        found: Row = {}
        for name in row:
            if name == "messages" or isinstance(row[name], list):
                found[name] = checked_messages(row[name], where, name)
            else:
                found[name] = require_text(row, name, where)
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
