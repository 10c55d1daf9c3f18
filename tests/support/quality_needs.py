"""The packages that the quality benchmark needs besides the core."""

import pytest


def skip_without_what_quality_needs() -> None:
    """Skip the calling module, with a reason, if a package of the benchmark or a plugin is missing."""
    libraries = ("filelock", "matplotlib", "peft", "PIL", "timm", "transformers", "typer", "rich", "platformdirs")
    for module in (*libraries, "tunerkit_lora", "tunerkit_adalora", "tunerkit_cli"):
        pytest.importorskip(module, reason=f"the benchmark needs {module}")
