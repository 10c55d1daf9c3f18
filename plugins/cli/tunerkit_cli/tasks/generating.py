"""How a language model answers: prompts as tokens, by the tokenizer's template, and generation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jinja2

from tunerkit.errors import shown
from tunerkit_cli.rows import DataError
from tunerkit_cli.tasks.answering import Answering
from tunerkit_cli.tasks.texts import positions_of
from tunerkit_cli.tasks.turns import rendered
from tunerkit_transformers.pretrained import Pretrained

NEW_TOKENS = 64
GREEDY = Answering()


def generate(
    loaded: Pretrained,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    batch_size: int,
    answering: Answering = GREEDY,
    max_length: int | None = None,
    streamer: Any = None,
) -> list[str]:
    """Continue prompts, or conversations by the tokenizer's template: all of them texts, or all lists of messages.

    A decoder reads prompt and answer at consecutive positions. Of a prompt that leaves no room for the answer only the
    end is read, and at most half of the positions are the answer's. Of encoder-decoders, ``max_length`` cuts the
    source. ``streamer`` prints the tokens of a single prompt as they come.
    """
    import torch

    processor, model = loaded.processor, loaded.model
    encoder = model.config.is_encoder_decoder
    cut: dict[str, Any] = {"truncation": True, "max_length": max_length} if encoder and max_length is not None else {}
    new_tokens = NEW_TOKENS if answering.new_tokens is None else answering.new_tokens
    kept, answer = None, new_tokens
    if not encoder and (positions := positions_of(loaded)) is not None:
        answer = min(new_tokens, positions - positions // 2)
        kept = positions - answer
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


def require_tokens(loaded: Pretrained, *, chat: bool) -> None:
    """Raise `DataError` if the tokenizer lacks what the trainer needs: an end token and, for chats, a template."""
    if loaded.processor.eos_token is None:
        raise DataError(
            f"the tokenizer of {loaded.source!r} has no end token (eos_token), so the model could not learn where an "
            "answer ends; set one in its tokenizer_config.json"
        )
    if chat and loaded.processor.chat_template is None:
        raise DataError(
            f"the tokenizer of {loaded.source!r} has no chat template; pass one with --set chat_template=FILE, or use "
            "the model's chat version, or texts in place of lists of messages"
        )


def _chat_text(loaded: Pretrained, messages: Sequence[dict[str, str]]) -> str:
    """Messages as text, by the tokenizer's template, ready for the assistant's answer."""
    require_tokens(loaded, chat=True)
    with refusing_template(loaded, f"the conversation that begins with {shown(messages[0]['content'])}"):
        return str(rendered(loaded.processor, messages, tokenize=False, add_generation_prompt=True))


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
