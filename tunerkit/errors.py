"""The exceptions that tunerkit raises: one class per mistake that a caller may want to catch."""

import difflib
from collections.abc import Iterable


class TunerkitError(Exception):
    """The base class of every error that tunerkit raises on purpose."""


class ConfigError(TunerkitError, ValueError):
    """A config is invalid.

    Args:
        problems: One line per problem, each with its path, such as ``"expected >= 1, got 0 @ $.target_rank"``.

    Attributes:
        problems: The same lines, as a tuple.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class PluginError(TunerkitError):
    """A plugin is broken, conflicts with another one, or violates the contract of a hook."""


class UnknownMethodError(TunerkitError, LookupError):
    """No installed plugin provides a method with that name."""


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
    """Something was left out or looks unintended, but training can continue."""


def closest(name: str, names: Iterable[str]) -> str:
    """Return a hint for an error about a mistyped name, ``; did you mean 'adalora'?``, or an empty string."""
    found = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    if not found:
        return ""
    return "; did you mean " + " or ".join(repr(candidate) for candidate in found) + "?"
