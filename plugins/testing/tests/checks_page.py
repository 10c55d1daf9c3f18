"""The page about the kit, from the code: ``python -m plugins.testing.tests.checks_page`` prints it."""

from plugins.testing.tests.bad_methods import MISTAKES, first_failure, results
from tunerkit_testing.checks.order import BY_NAME

_INTRODUCTION = """# What the kit checks

`tunerkit check` and `tunerkit_testing.check_method` run these checks on each model, in this order. [Write a
plugin](write-a-plugin.md#check-your-method) shows how to call them.

## The checks

A check whose subject a method does not have is skipped, with the reason. So are the checks on a model that the method
refuses with a `TargetError`, if it fits another one. If it fits none, give a model that it fits, or leave out the
targets that the error names, as with `--case network --config '{"exclude": ["2"]}'`.
"""
_MISTAKES = """
## The models

For `--case` and for `cases=`:

- `network`, of torch's own layers. It is the default where transformers is not installed.
- With transformers: `bert`, `gpt2` and `llama`, which are the default, and `deberta-v2`, `qwen3`, `gemma3`, `t5`,
  `whisper`, `vit` and `clip`.
- With diffusers: `unet` and `unet-convolutions`. With timm: `convnext` and `resnet`.

LoRA and AdaLoRA pass every check that applies on the 14 models of these libraries.

`check_method` and `parametrize_with_checks` take these names, a [`Case`](write-a-plugin.md#a-model-of-your-own) of
yours, or both. `loss_falls` and other checks train a few steps at the model's rate, 0.01. A correct method whose ΔW is
scaled by something small, such as the entries of W, may need a larger one. The command takes `--lr 0.1`, and Python a
changed case:

```python
import attrs

from tunerkit_testing import check_method
from tunerkit_testing.known_cases import named

(network,) = named(["network"])
results = check_method("lora", {"rank": 2}, [attrs.evolve(network, lr=0.1)], checks=["start", "loss_falls"])
assert [result.status for result in results] == ["passed", "passed"]
```

## What a mistake looks like

What the kit finds in plugins with one mistake each, on a network of three linear layers, and for Conv1D on GPT-2. Each
sentence goes on with what to change:
"""
_ADVICE = "; "  # stands between what is found and what to change


def law_of(check: object) -> str:
    """The docstring of a check in one line, as Markdown."""
    return " ".join((check.__doc__ or "").split()).replace("``", "`")


def checks_table() -> str:
    """One row for each check."""
    rows = [f"| `{name}` | {law_of(check)} |" for name, check in BY_NAME.items()]
    return "\n".join(["| check | law |", "|---|---|", *rows]) + "\n"


def mistakes_table() -> str:
    """One row for each mistake of the page: what the kit finds, without its advice."""
    shown = [(each, first_failure(results(each.plugin, each.case))) for each in MISTAKES if each.what]
    rows = [f"| {each.what} | `{found.check}` | {found.reason.split(_ADVICE)[0]} |" for each, found in shown]
    return "\n".join(["| mistake | check | what is found |", "|---|---|---|", *rows])


def page() -> str:
    """The whole page."""
    return f"{_INTRODUCTION}\n{checks_table()}{_MISTAKES}\n{mistakes_table()}\n"


if __name__ == "__main__":
    print(page(), end="")
