"""What publishing and sampling need of a running engine, and the errors for all that can go wrong."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs

from tunerkit.errors import TunerkitError
from tunerkit_serving.findings import Engine

PROBE = tuple(range(10, 26))  # token ids that every vocabulary has, for prompts


class PublishError(TunerkitError):
    """An adapter cannot be published to a running engine. The versions that were published before are unchanged."""


class ServerGone(PublishError):
    """The engine does not answer, or has lost the version asked for: it may have been restarted."""


@attrs.frozen
class Listing:
    """What a server answers for.

    Attributes:
        base: The name of the base model in requests.
        adapters: The names of the adapters that are loaded.
    """

    base: str
    adapters: frozenset[str]


@attrs.frozen(kw_only=True)
class Sampling:
    """How an engine draws answers. The defaults are the model's own distribution.

    Attributes:
        max_tokens: The most tokens of an answer.
        n: How many answers to each prompt.
        temperature: What logits are divided by; 0 for the likeliest token.
        top_p: Draw from the likeliest tokens with at least this probability together.
        top_k: Draw from so many of the likeliest tokens; 0 for all.
        min_p: The least probability, as a share of the largest one.
        repetition_penalty: Above 1, tokens that were there become less likely.
        seed: Of the draws; None for the engine's own.
        stop: Token ids that end an answer, beside the model's own.
        more: Further fields of the request.
    """

    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[int, ...] = ()
    more: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class Answer:
    """An answer, and how likely each of its tokens was for the engine.

    Attributes:
        tokens: The token ids, with the one that ended it.
        logprobs: The natural logarithms of their probabilities, one for each token.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]


Draw = tuple[Sequence[int], Sampling]
"""A prompt's token ids, and how its answers are drawn."""


class Server(Protocol):
    """A running engine that loads adapters. Each method raises `PublishError`."""

    @property
    def rules(self) -> Engine:
        """What such an engine refuses or scales wrongly."""
        ...

    def listed(self) -> Listing:
        """Ask for the models and the adapters."""
        ...

    def load(self, name: str, folder: Path) -> None:
        """Load the adapter in an absolute folder, which must be the same for the server. A loaded name is no error."""
        ...

    def unload(self, name: str) -> None:
        """Unload an adapter. A name that is not loaded is no error."""
        ...

    def sample(self, model: str, draws: Sequence[Draw]) -> Sequence[Sequence[Answer]]:
        """Return ``sampling.n`` answers to each prompt, by the base model or by an adapter."""
        ...

    def chat_prompt(self, model: str, messages: Sequence[Mapping[str, Any]]) -> Sequence[int]:
        """Return the token ids that the engine's own chat template makes of messages, ready for an answer."""
        ...
