"""What tasks on language models share: the trainers of TRL, loss and perplexity, and generation."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from tunerkit.cli.rows.reading import DataError
from tunerkit.cli.tasks.base import Results, Row, Task
from tunerkit.errors import shown
from tunerkit.integrations.pretrained import Pretrained

NEW_TOKENS = 64
SAMPLES = 3
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

    @property
    def defaults(self) -> dict[str, Any]:
        """Language models are larger, and their rows longer."""
        return {
            **super().defaults,
            "num_train_epochs": 1,
            "learning_rate": 2e-4,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
        }

    def evaluate(self, trainer: Any, dataset: Any, rows: Sequence[Row], labels: Sequence[str]) -> Results:
        """The loss and the perplexity."""
        found = trainer.evaluate(dataset)
        loss = float(found["eval_loss"])
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if "eval_mean_token_accuracy" in found:
            metrics["token_accuracy"] = float(found["eval_mean_token_accuracy"])
        return Results(metrics)

    def samples(self, loaded: Pretrained, rows: Sequence[Row]) -> list[dict[str, str]]:
        """The answers to the first three held-out prompts."""
        chosen = [prompt_of(row) for row in rows[:SAMPLES]]
        texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in chosen]
        answers = generate(loaded, chosen, batch_size=SAMPLES) if chosen else []
        return [{"prompt": text, "answer": answer} for text, answer in zip(texts, answers, strict=True)]

    def predict(self, loaded: Pretrained, rows: Sequence[Row], *, batch_size: int) -> list[dict[str, Any]]:
        """Continue each row's prompt by up to 64 tokens, without sampling."""
        return [
            {"completion": text} for text in generate(loaded, [prompt_of(row) for row in rows], batch_size=batch_size)
        ]


def generate(
    loaded: Pretrained,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    batch_size: int,
    new_tokens: int = NEW_TOKENS,
    max_length: int | None = None,
) -> list[str]:
    """Continue prompts, or conversations by the tokenizer's template, greedily.

    Args:
        loaded: The model and its tokenizer.
        prompts: All of them texts, or all of them lists of messages.
        batch_size: How many are generated at once.
        new_tokens: The greatest number of tokens of an answer.
        max_length: The greatest number of tokens of a prompt, whose end is cut; None: prompts are not cut.
    """
    import torch

    processor, model = loaded.processor, loaded.model
    cut: dict[str, Any] = {} if max_length is None else {"truncation": True, "max_length": max_length}
    encoder = model.config.is_encoder_decoder
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
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        skip = 0 if encoder else inputs["input_ids"].shape[1]
        answers += processor.batch_decode(out[:, skip:], skip_special_tokens=True)
    return answers


def _chat_text(loaded: Pretrained, messages: Sequence[dict[str, str]]) -> str:
    """Messages as text, by the tokenizer's template, ready for the assistant's answer."""
    require_tokens(loaded, chat=True)
    return str(loaded.processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


def prompt_of(row: Row) -> str | list[dict[str, str]]:
    """What a row asks the model: the messages before the last answer, the prompt, or the text."""
    if "messages" in row:
        messages: list[dict[str, str]] = row["messages"]
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    prompt: str | list[dict[str, str]] = row["prompt"] if "prompt" in row else row["text"]
    return prompt


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
