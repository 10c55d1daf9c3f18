"""The checks of a method, and test tools for authors of method plugins."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunerkit_testing.cases import Case
    from tunerkit_testing.runner import CheckResult, check_method, parametrize_with_checks

__all__ = ["Case", "CheckResult", "check_method", "parametrize_with_checks"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the command imports this package for ``--help``, without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tunerkit_testing import runner

    globals().update({each: getattr(runner, each) for each in __all__})
    return globals()[name]
