"""The exceptions that tunerkit raises: one class per mistake that a caller may want to catch. Texts have a limit."""

import difflib
import re
import reprlib
import signal
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from inspect import isfunction
from typing import Final

# Messages quote files, models and plugins, so they are limited to this many lines of this length.
LINES: Final = 60
WIDTH: Final = 1000
_PROBLEMS: Final = 20
_LONGEST_NAME: Final = 200  # comparing longer names takes seconds
_INSIDE: Final = re.compile(r"(tunerkit(_\w+)?|pluggy)(\.|$)")  # the modules of tunerkit, of its plugins, and pluggy
_SHORT: Final = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 2


class TunerkitError(Exception):
    """The base class of every error that tunerkit raises on purpose. Its text is cut to 60 lines of 1000 characters."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(bounded(each) if isinstance(each, str) else each for each in arguments))


class ConfigError(TunerkitError, ValueError):
    """A config is invalid.

    Args:
        problems: One line per problem, each with its path, such as ``"expected >= 1, got 0 @ $.target_rank"``.

    Attributes:
        problems: The same lines, as a tuple. The text of the error has the first 20, and counts the others.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(cut(problem) for problem in problems)
        super().__init__("\n".join(first(self.problems)))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class PluginError(TunerkitError):
    """A plugin is broken, conflicts with another one, or violates the contract of a hook."""


class VerbError(PluginError, AttributeError):
    """A verb's distribution is not installed or cannot be loaded, or two distributions provide the verb."""


class UnknownMethodError(TunerkitError, LookupError):
    """No installed plugin provides a method with that name."""


class UnknownFormatError(TunerkitError, LookupError):
    """No installed plugin provides a format with that name."""


class TargetError(TunerkitError, ValueError):
    """A target cannot be found, or its module cannot be adapted."""


class AdapterError(TunerkitError):
    """An adapter is missing, ambiguous or already there, or its state does not allow the operation."""


class StepError(TunerkitError):
    """An adapter is attached incorrectly, or the optimizer steps at a time when it must not."""


class FileError(TunerkitError, ValueError):
    """An adapter file is damaged or incomplete, or tunerkit did not write it."""


class BaseMismatchError(FileError):
    """The adapter in the file was trained on a different base model."""


class TunerkitWarning(UserWarning):
    """Something was left out or looks unintended, but training can continue. The text is shortened like an error's."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(bounded(each) if isinstance(each, str) else each for each in arguments))


def warn(text: str) -> None:
    """Warn, and attribute the warning to the first calling frame outside tunerkit, its plugins and pluggy."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _INSIDE.match(str(frame.f_globals.get("__name__", ""))):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, TunerkitWarning, stacklevel=level)


def cut(text: str, width: int = WIDTH) -> str:
    """Shorten ``text`` to ``width`` characters by cutting its middle, since the end of a message has the advice."""
    if len(text) <= width:
        return text
    gap = f" ...({len(text) - width} characters)... "
    kept = width - len(gap)
    return text[: kept - kept // 3] + gap + text[len(text) - kept // 3 :]


def first(lines: Sequence[str], shown: int = _PROBLEMS) -> list[str]:
    """Return the first ``shown`` lines; if there are more, also a line that counts the others."""
    return [*lines[:shown], *([f"and {len(lines) - shown} more problems"] if len(lines) > shown else [])]


def bounded(text: str) -> str:
    """Return ``text`` with at most `LINES` lines of `WIDTH` characters each."""
    if len(text) <= WIDTH and text.count("\n") < LINES:
        return text
    lines = text.split("\n")
    more = [f"... {len(lines) - LINES + 1} more lines"] if len(lines) > LINES else []
    return "\n".join([cut(line) for line in (lines[: LINES - 1] if more else lines)] + more)


def shown(value: object) -> str:
    """Return a short repr of any value in one line, even if ``repr(value)`` is long or raises."""
    try:
        text = _SHORT.repr(value)
    except BaseException:  # a plugin's object may raise anything; Python refuses to print integers of 5,000 digits
        text = f"a {type(value).__name__} that cannot be printed"
    return cut(" ".join(map(str.strip, text.splitlines())), 200)


def error_text(error: BaseException) -> str:
    """Return an exception's class and message in one short line; for a `PluginError`, only the message."""
    try:
        text = " ".join(str(error).split())
    except BaseException as second:  # the exception of a plugin may raise another when it is printed
        text = f"(printing its message raised {type(second).__name__})"
    return cut(text if isinstance(error, PluginError) else f"{type(error).__name__}: {text}", 500)


def is_of_user(error: BaseException) -> bool:
    """Whether an exception was raised by Ctrl-C or inside a Python signal handler, rather than by the running code."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {handler.__code__ for handler in handlers if isfunction(handler)}
    frames = traceback.walk_tb(error.__traceback__)
    return isinstance(error, KeyboardInterrupt) or any(frame.f_code in codes for frame, _ in frames)


def closest(name: str, names: Iterable[str]) -> str:
    """Return a hint on a mistyped name, such as ``; did you mean 'adalora'?``; "" if no name is similar."""
    if len(name) > _LONGEST_NAME:
        return ""
    found = difflib.get_close_matches(name, list(dict.fromkeys(names)), n=3, cutoff=0.6)
    if not found:
        return ""
    return "; did you mean " + " or ".join(repr(candidate) for candidate in found) + "?"


def half_character(text: str) -> str | None:
    """Return a message about the first character of ``text`` that UTF-8 cannot encode; None if it can encode all."""
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        found = problem.object[problem.start]
        what = "a byte that is not UTF-8" if "\udc80" <= found <= "\udcff" else "half of a surrogate pair"
        return f"{found!r} is not a character but {what}; replace it"
    return None
