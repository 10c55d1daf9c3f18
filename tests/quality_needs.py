"""What the benchmark of quality needs beyond the core."""

import pytest


def skip_without_what_quality_needs() -> None:
    """Skip the module that calls this, with a reason, where a package of the benchmark or a plugin is missing."""
    for module in (
        "filelock",
        "matplotlib",
        "peft",
        "PIL",
        "timm",
        "transformers",
        "typer",
        "rich",
        "platformdirs",
        "tunerkit_lora",
        "tunerkit_adalora",
    ):
        pytest.importorskip(module, reason=f"the benchmark needs {module}")
