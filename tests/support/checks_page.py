"""The tables of the page about the kit, from the code: ``python -m tests.support.checks_page`` prints the page."""

from tests.support import mistakes
from tunerkit_testing.checks.order import BY_NAME

_INTRODUCTION = """# What the kit checks

`tunerkit check` and `tunerkit_testing.check_method` run these checks on each model, in this order. [Write a
plugin](write-a-plugin.md#check-your-method) shows how to call them.

## The checks

A check whose subject a method does not have is skipped, with the reason.
"""
_MISTAKES = """
## What a mistake looks like

Some plugins with one mistake each stand in the repository's tests. For each one, the first check that fails is the one
about its mistake, and most of those that depend on it are skipped. This is what the kit says on a network of three
linear layers, and for Conv1D on GPT-2:
"""
_GRID = """
## The full grid

With `TUNERKIT_LONG=1`, the tests run all checks on every model of `tunerkit_testing.matrix`, for LoRA, AdaLoRA and the
toy methods of the tests: 14 models of transformers, diffusers and timm. Without it they run on BERT and Llama.
Measured on one core of a CPU, without an accelerator; no check failed:

| method | models | passed | skipped | CPU seconds |
|---|---|---|---|---|
| `lora` | 14 | 629 | 99 | 79 |
| `adalora` | 14 | 643 | 85 | 88 |
"""


def law_of(check: object) -> str:
    """The docstring of a check in one line, as Markdown."""
    return " ".join((check.__doc__ or "").split()).replace("``", "`")


def checks_table() -> str:
    """One row for each check."""
    rows = [f"| `{name}` | {law_of(check)} |" for name, check in BY_NAME.items()]
    return "\n".join(["| check | law |", "|---|---|", *rows]) + "\n"


def page() -> str:
    """The whole page. The figures of the grid are those of the last time that it was run."""
    return f"{_INTRODUCTION}\n{checks_table()}{_MISTAKES}\n{mistakes.table()}\n{_GRID}"


if __name__ == "__main__":
    print(page(), end="")
