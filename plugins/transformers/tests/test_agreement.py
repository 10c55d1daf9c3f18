"""What the processes of a training tell each other; two real processes talk in tests/test_resuming.py."""

import pytest
from torch import distributed

from tunerkit_transformers.agreement import gathered, union


def test_a_single_process_calls_no_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own value is all there is, and no process group is needed."""

    def never(*args: object) -> None:
        raise AssertionError("a collective was called")

    monkeypatch.setattr(distributed, "all_gather_object", never)
    assert gathered(["a"]) == [["a"]]


def test_what_any_process_saw_is_said_once() -> None:
    """A sentence that not all share names the processes, in a bounded length."""
    assert union([["is cut"], ["is cut"]]) == ["is cut"]
    assert union([["is cut"]]) == ["is cut"]
    assert union([[], ["is cut"], ["is cut", "is gone"]]) == [
        "is cut (seen by process 1, 2 of 3)", "is gone (seen by process 2 of 3)"
    ]  # fmt: skip
    assert union([[], *[["is cut"]] * 99]) == ["is cut (seen by process 1, 2, 3, 4, 5, ... of 100)"]
