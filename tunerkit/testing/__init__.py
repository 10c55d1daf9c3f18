"""The checks of a method, and test tools for authors of method plugins."""

from tunerkit.testing.cases import Case
from tunerkit.testing.kit import CheckResult, check_method
from tunerkit.testing.parametrizing import parametrize_with_checks

__all__ = ["Case", "CheckResult", "check_method", "parametrize_with_checks"]
