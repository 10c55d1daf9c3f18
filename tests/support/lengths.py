"""The short and the long form of tests that have two, and parts of the kit's matrix for tests of many configs."""

import os
from typing import Any

from tunerkit_testing.matrix import cases

LONG = "TUNERKIT_LONG"


def is_long() -> bool:
    """Whether the environment asks for the long form of tests that have one."""
    return os.environ.get(LONG) == "1"


def by_length() -> list[Any]:
    """Of `cases` a small BERT and a small Llama; all of them if the environment has ``TUNERKIT_LONG=1``.

    For tests that run many checks on each case.
    """
    return cases() if is_long() else [case for case in cases() if case.id in ("bert", "llama")]


def few() -> list[Any]:
    """Of `cases` one for each kind of base layer, for tests that have many configs."""
    return [case for case in cases() if case.id in ("bert", "gpt2", "gemma3", "resnet")]


def linear() -> list[Any]:
    """Those of `cases` that have linear layers beside a head."""
    return [case for case in cases() if case.id != "resnet"]
