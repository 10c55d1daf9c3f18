"""How a language model is asked to answer: the options of ``predict`` and ``chat``."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from tunerkit.errors import TunerkitError, shown

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
