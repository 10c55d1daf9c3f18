"""What tasks on language models share: the trainers of TRL, loss and perplexity, and generation."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import jinja2

from tunerkit.errors import shown
from tunerkit_cli.rows.reading import DataError, Table
from tunerkit_cli.tasks.answering import Answering
from tunerkit_cli.tasks.base import USUAL, Results, Row, Task
from tunerkit_cli.tasks.texts import positions_of
from tunerkit_transformers.pretrained import Pretrained

NEW_TOKENS = 64
GREEDY = Answering()
SAMPLES = 3
_MOST = 230.0  # e to this power is within what a record may hold
_SECOND = ("input", "context")  # columns that continue an instruction, in Alpaca's and Dolly's data
_ROLES = ("system", "user", "assistant", "tool")


def require_tokens(loaded: Pretrained, *, chat: bool) -> None:
    """Raise `DataError` if the tokenizer lacks what the trainer needs: an end token and, for chats, a template."""
    if loaded.processor.eos_token is None:
        raise DataError(
            f"the tokenizer of {loaded.source!r} has no end token (eos_token), so the model could not learn where an "
            "answer ends; set one in its tokenizer_config.json"
        )
    if chat and loaded.processor.chat_template is None:
        raise DataError(
            f"the tokenizer of {loaded.source!r} has no chat template; use the model's chat version, or texts in place "
            "of lists of messages"
        )


class GenerationTask(Task):
    """A task that trains a language model."""

    max_length: ClassVar[int] = 1024

    def rows(
        self, table: Table, names: Mapping[str, str], *, predicting: bool = False, renaming: bool = True
    ) -> list[Row]:
        """The rows: all of texts, or all of lists of messages."""
        read = {each.name: name for each, name in self.columns_read(table, names, predicting=predicting)}
        if "prompt" not in names:
            _refuse_second(table, read.get("prompt", "prompt"), renaming=renaming)
        rows = super().rows(table, names, predicting=predicting, renaming=renaming)
        _refuse_mixed(rows, table.source)
        return rows

    @property
    def defaults(self) -> dict[str, Any]:
        """Language models are larger, and their rows longer."""
        sizes = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
        return {**super().defaults, "num_train_epochs": 1, "learning_rate": 2e-4, **sizes, **USUAL}

    def evaluate(self, trainer: Any, dataset: Any) -> Results:
        """The loss and the perplexity."""
        found = measured(trainer, dataset)
        loss = float(found["eval_loss"])
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, _MOST))}
        if "eval_mean_token_accuracy" in found:
            metrics["token_accuracy"] = float(found["eval_mean_token_accuracy"])
        return Results(metrics, seconds=found.get("eval_runtime"))

    def samples(self, loaded: Pretrained, rows: Sequence[Row]) -> list[dict[str, str]]:
        """The answers to the first three held-out prompts."""
        chosen = [prompt_of(row) for row in rows[:SAMPLES]]
        texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in chosen]
        answers = generate(loaded, chosen, batch_size=SAMPLES) if chosen else []
        return [{"prompt": text, "answer": answer} for text, answer in zip(texts, answers, strict=True)]

    def predict(
        self, loaded: Pretrained, rows: Sequence[Row], *, batch_size: int, answering: Answering = GREEDY
    ) -> list[dict[str, Any]]:
        """Continue each row's prompt."""
        prompts = [prompt_of(row) for row in rows]
        answers = generate(loaded, prompts, batch_size=batch_size, answering=answering)
        return [{"completion": text} for text in answers]


def measured(trainer: Any, dataset: Any) -> Mapping[str, Any]:
    """Evaluate encoded rows by the trainer's loss; what it found in its last step counts, as the model is the same."""
    step, history = trainer.state.global_step, trainer.state.log_history
    if dataset is trainer.eval_dataset and step > 0 and not trainer.args.load_best_model_at_end:
        found = [entry for entry in history if "eval_loss" in entry and entry["step"] == step]
        if found:
            return found[-1]  # type: ignore[no-any-return]  # a trainer is of any class here
    return trainer.evaluate(dataset)  # type: ignore[no-any-return]


def generate(
    loaded: Pretrained,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    batch_size: int,
    answering: Answering = GREEDY,
    max_length: int | None = None,
    streamer: Any = None,
) -> list[str]:
    """Continue prompts, or conversations by the tokenizer's template.

    A decoder reads prompt and answer at consecutive positions. Of a prompt that leaves no room for the answer only the
    end is read, and at most half of the positions are the answer's.

    Args:
        loaded: The model and its tokenizer.
        prompts: All of them texts, or all of them lists of messages.
        batch_size: How many are generated at once.
        answering: How, greedily by default. Its system's message is in the prompts.
        max_length: For encoder-decoders, the greatest number of tokens of a source, whose end is cut.
        streamer: A streamer of transformers, which prints tokens as they come; for single prompts.
    """
    import torch

    processor, model = loaded.processor, loaded.model
    encoder = model.config.is_encoder_decoder
    cut: dict[str, Any] = {"truncation": True, "max_length": max_length} if encoder and max_length is not None else {}
    new_tokens = NEW_TOKENS if answering.new_tokens is None else answering.new_tokens
    kept, answer = (None, new_tokens) if encoder else _room(loaded, new_tokens)
    model.eval()
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        texts = [prompt if isinstance(prompt, str) else _chat_text(loaded, prompt) for prompt in batch]
        inputs = processor(
            texts,
            return_tensors="pt",
            padding=True,
            padding_side="right" if encoder else "left",  # what is generated follows the prompt
            add_special_tokens=isinstance(batch[0], str),  # a chat template writes its own
            **cut,
        ).to(model.device)
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        if kept is not None:  # the padding is on the left, so shorter prompts stay whole
            inputs = {name: values[:, -kept:] for name, values in inputs.items()}
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=answer, streamer=streamer, **answering.sampling)
        skip = 0 if encoder else inputs["input_ids"].shape[1]
        answers += processor.batch_decode(out[:, skip:], skip_special_tokens=True)
    return answers


def _room(loaded: Pretrained, new_tokens: int) -> tuple[int | None, int]:
    """How many tokens a decoder may read of a prompt, and how many it may answer; None if it has no limit."""
    positions = positions_of(loaded)
    if positions is None:
        return None, new_tokens
    answer = min(new_tokens, positions - positions // 2)
    return positions - answer, answer


def _refuse_second(table: Table, prompt: str, *, renaming: bool) -> None:
    """Raise `DataError` if a prompt that was found by another name goes on in a second column, which would be lost."""
    second = next((name for name in _SECOND if name in table.columns), None)
    if prompt == "prompt" or second is None:
        return
    leave = f"set columns.prompt to {prompt} in the recipe" if renaming else "remove that column"
    raise DataError(
        f"{table.source}: has the columns {prompt!r} and {second!r}, and a prompt is one column; join them into one, "
        f"or, to leave {second!r} out, {leave}"
    )


def require_one_kind(row: Row, where: str) -> bool:
    """Return whether the values of a row are lists of messages. Raises `DataError` if only some of them are lists."""
    kinds = {isinstance(value, list) for value in row.values()}
    if len(kinds) > 1:
        seen = ", ".join(f"{name} is a {_kind(value)}" for name, value in row.items())
        raise DataError(f"{where}: {seen}; write all of them as texts, or all of them as lists of messages")
    return kinds == {True}


def _refuse_mixed(rows: Sequence[Row], source: str) -> None:
    """Raise `DataError` if a column has texts in some rows and lists of messages in others."""
    for number, row in enumerate(rows, start=1):
        for name, value in row.items():
            if _kind(value) != _kind(rows[0][name]):
                raise DataError(
                    f"{source}: row {number}, column {name!r}: is a {_kind(value)}, and row 1 has a "
                    f"{_kind(rows[0][name])}; write all rows as texts, or all as lists of messages"
                )


def _kind(value: object) -> str:
    return "list" if isinstance(value, list) else "text"


def _chat_text(loaded: Pretrained, messages: Sequence[dict[str, str]]) -> str:
    """Messages as text, by the tokenizer's template, ready for the assistant's answer."""
    require_tokens(loaded, chat=True)
    with refusing_template(loaded, f"the conversation that begins with {shown(messages[0]['content'])}"):
        return str(loaded.processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


@contextmanager
def refusing_template(loaded: Pretrained, what: str) -> Iterator[None]:
    """Inside the block, an error that the tokenizer's template raises is a `DataError`, which says what it refuses."""
    try:
        yield
    except jinja2.TemplateError as problem:
        raise DataError(
            f"the chat template of {loaded.source!r} refuses {what}: {problem}; change the messages"
        ) from problem


def require_system(loaded: Pretrained, system: str) -> None:
    """Raise `DataError` if the tokenizer's template does not show a system's message."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
    if system.strip() not in _chat_text(loaded, messages):
        raise DataError(
            f"--system: the chat template of {loaded.source!r} has no place for it; write it into your message"
        )


def prompt_length(loaded: Pretrained, prompt: str | Sequence[dict[str, str]]) -> int:
    """How many tokens a prompt has, ready for an answer."""
    text = prompt if isinstance(prompt, str) else _chat_text(loaded, prompt)
    return len(loaded.processor(text, add_special_tokens=isinstance(prompt, str))["input_ids"])


def prompt_of(row: Row) -> str | list[dict[str, str]]:
    """What a row asks the model: the messages before the last answer, the prompt, or the text."""
    if "messages" in row:
        messages: list[dict[str, str]] = row["messages"]
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    prompt: str | list[dict[str, str]] = row["prompt"] if "prompt" in row else row["text"]
    return prompt


def are_conversations(task: Task, rows: Sequence[Row]) -> bool | None:
    """Whether the prompts of a language model's rows are lists of messages; None for other tasks."""
    if not isinstance(task, GenerationTask) or not {"messages", "prompt", "text"} & {*rows[0]}:
        return None
    return isinstance(prompt_of(rows[0]), list)


def checked_messages(value: object, where: str, name: str) -> list[dict[str, str]]:
    """Return a conversation. Raises `DataError`."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}, column {name!r}: expected a list of messages, got {shown(value)}")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise DataError(f"{where}, column {name!r}: a message has a role and a content, got {shown(message)}")
        if message["role"] not in _ROLES or not isinstance(message["content"], str):
            raise DataError(
                f"{where}, column {name!r}: expected a role of {', '.join(_ROLES)} and a text, got {shown(message)}"
            )
    return [{"role": message["role"], "content": message["content"]} for message in value]
