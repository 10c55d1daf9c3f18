"""The exceptions tunerkit raises, one class per mistake a caller may want to catch."""

import difflib
from collections.abc import Iterable


class TunerkitError(Exception):
    """The root of every error tunerkit raises on purpose."""


class ConfigError(TunerkitError, ValueError):
    """A configuration is wrong: one line per problem, each with its path (``$.target_rank``)."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class PluginError(TunerkitError):
    """A plugin is broken, collides with another, or does not do what its hook promises."""


class UnknownMethodError(TunerkitError, LookupError):
    """No installed plugin yields a method of that name."""


class TargetError(TunerkitError, ValueError):
    """A target cannot be found, or the module there cannot be adapted."""


class AdapterError(TunerkitError):
    """An adapter is missing, ambiguous, already there, or in the wrong state for what was asked."""


class StepError(TunerkitError):
    """What trains the model and the adapter disagree: attached wrongly, or stepped when it must not be."""


class FileError(TunerkitError, ValueError):
    """An adapter file is damaged, foreign, or lacks what it should hold."""


class BaseMismatchError(FileError):
    """The adapter file was trained on another base model."""


class TunerkitWarning(UserWarning):
    """Something was left out or looks unintended, and training can still go on."""


def closest(name: str, names: Iterable[str]) -> str:
    """The hint that ends an error about a mistyped name: ``; did you mean 'adalora'?``, or nothing."""
    found = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    if not found:
        return ""
    return "; did you mean " + " or ".join(repr(candidate) for candidate in found) + "?"
