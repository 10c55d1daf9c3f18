"""transformers for tunerkit: its Trainer and TRL's, checkpoints, default targets, and models loaded by name."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "plan":
        from tunerkit_transformers.memory_plan import plan  # importing transformers takes seconds

        return plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
