"""The command line as a whole: what it costs to ask it something, and how it answers."""

import subprocess
import sys

import pytest

import tunerkit

for _module in ("rich", "typer", "yaml"):
    pytest.importorskip(_module, reason="the command needs the extra [cli]")

# Importing torch or transformers takes seconds, and pyarrow a part of one.
SLOW = ("torch", "transformers", "pyarrow", "numpy", "matplotlib", "tunerkit_lora", "tunerkit_adalora")


def told(*arguments: str) -> tuple[int, str, list[str]]:
    """The exit code of ``tunerkit``, all its output, and the slow modules it imported."""
    script = f"""
import sys
from tunerkit.cli import main
sys.argv = ["tunerkit", *{list(arguments)!r}]
try:
    main()
except SystemExit as end:
    code = end.code
print("imported", [name for name in {SLOW!r} if name in sys.modules], code or 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=1800, check=True)
    output, _, end = done.stdout.rpartition("imported ")
    names, _, code = end.strip().rpartition(" ")
    return int(code), output + done.stderr, [name for name in SLOW if name in names]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "Commands"),
        (["train", "--help"], 0, "--epochs"),
        (["--version"], 0, f"tunerkit {tunerkit.__version__}"),
        (["trian"], 2, "Did you mean 'train'?"),
        (["train", "--epoch", "2"], 2, "--epochs"),
        (["train", "--lr", "0"], 2, "--lr: expected a number above 0, got 0.0"),
        (["train", "--config", "gone.yaml"], 2, "gone.yaml: no such file"),
        (["report", "gone"], 2, "gone: no such folder"),
        (["check", "lora", "--config", "{rank"], 2, "--config: cannot be read"),
        (["init", "causal-lm"], 0, "task: causal-lm"),
        (["init", "casual-lm"], 2, "no task 'casual-lm'; did you mean 'causal-lm'?"),
        (["schema"], 0, '"title": "A recipe of tunerkit"'),
    ],
)
def test_help_and_errors_import_nothing_slow(arguments: list[str], code: int, words: str) -> None:
    """They cost a fraction of a CPU second: neither torch nor a method's plugin is needed for them."""
    found, output, slow = told(*arguments)
    assert (found, slow) == (code, [])
    assert words in output


def test_the_module_is_the_command() -> None:
    """``python -m tunerkit`` is there where installed scripts are not on the PATH."""
    done = subprocess.run([sys.executable, "-m", "tunerkit", "--version"], capture_output=True, text=True, timeout=1800)
    assert (done.returncode, done.stdout) == (0, f"tunerkit {tunerkit.__version__}\n")
