"""How a language model answers: the options of ``predict`` and ``chat``, prompts as tokens, and generation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import jinja2

from tunerkit.errors import TunerkitError, shown
from tunerkit_cli.rows import DataError
from tunerkit_cli.tasks.texts import positions_of
from tunerkit_cli.tasks.turns import rendered
from tunerkit_transformers.pretrained import Pretrained

NEW_TOKENS = 64
# Outside of these, quotients of logits overflow, or nothing of them is left.
_COLDEST, _HOTTEST = 0.01, 100.0
# For each option, what its value should be, and whether one is.
_RANGES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "system": ("a text that is not empty", lambda text: bool(text.strip())),
    "temperature": (
        f"0, or a number from {_COLDEST:g} to {_HOTTEST:g}",
        lambda value: value == 0 or _COLDEST <= value <= _HOTTEST,
    ),
    "top_p": ("a number above 0 and up to 1", lambda value: 0 < value <= 1),
    "top_k": ("a whole number above 0", lambda value: value >= 1),
    "seed": ("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32),
}


@attrs.frozen
class Answering:
    """The options that were given; the others are None."""

    new_tokens: int | None = None  # the greatest number of tokens of an answer
    system: str | None = None  # the system's message, before the user's
    temperature: float | None = None  # what logits are divided by; with 0 or None the likeliest token is taken
    top_p: float | None = None  # draw from the likeliest tokens with at least this probability together
    top_k: int | None = None  # draw from so many of the likeliest tokens
    seed: int | None = None  # what the draws begin with, 0 by default

    def __attrs_post_init__(self) -> None:
        """Raise `TunerkitError` if a value is out of its range, or would have no effect."""
        for name, (wanted, is_right) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not is_right(value):
                raise TunerkitError(f"--{name.replace('_', '-')}: expected {wanted}, got {shown(value)}")
        idle = [name for name in ("top_p", "top_k", "seed") if getattr(self, name) is not None]
        if idle and not self.temperature:
            raise TunerkitError(
                f"--{idle[0].replace('_', '-')}: has no effect without --temperature above 0, as the likeliest "
                "token is always taken; pass --temperature too, or leave it out"
            )

    @property
    def given(self) -> list[str]:
        """The options that were given."""
        return [f"--{name.replace('_', '-')}" for name, value in attrs.asdict(self).items() if value is not None]

    @property
    def sampling(self) -> dict[str, Any]:
        """The arguments of transformers' ``generate``; what the model's files say of sampling does not count."""
        if not self.temperature:
            return {"do_sample": False}
        top_p, top_k = 1.0 if self.top_p is None else self.top_p, 0 if self.top_k is None else self.top_k
        return {"do_sample": True, "temperature": self.temperature, "top_p": top_p, "top_k": top_k}

    def seed_draws(self) -> None:
        """Seed the random numbers that answers are drawn with."""
        import torch

        torch.manual_seed(self.seed or 0)


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
