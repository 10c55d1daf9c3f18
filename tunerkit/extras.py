"""Which extra of tunerkit serves which library, for messages: the only file of core that names other distributions."""

from typing import Final

# By the root of the library's modules.
_EXTRAS: Final = dict.fromkeys(("transformers", "trl", "accelerate", "timm", "torchvision"), "transformers")

ENGINES: Final = "distributed"  # the extra that trains in several processes
RUNS: Final = "transformers"  # the extra that opens what `tunerkit train` writes


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f'pip install "tunerkit[{extra}]"'


def distribution(extra: str) -> str:
    """The distribution that an extra installs."""
    return f"tunerkit-{extra}"


def serving(thing: object) -> str | None:
    """The extra for a library's object, by the classes that it derives from; None if no extra serves it."""
    roots = (kind.__module__.partition(".")[0] for kind in type(thing).__mro__)
    return next((_EXTRAS[root] for root in roots if root in _EXTRAS), None)
