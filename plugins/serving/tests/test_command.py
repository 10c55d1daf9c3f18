"""``tunerkit check-serving``: its exit codes, its text and its JSON."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

for _module in ("rich", "typer", "yaml"):
    pytest.importorskip(_module, reason="the command needs the extra [cli]")

from typer.testing import CliRunner  # noqa: E402

from plugins.serving.tests.serving_folders import random_folder  # noqa: E402
from tunerkit_cli import app  # noqa: E402

ROOT = Path(__file__).parents[3]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app.build(), ["check-serving", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return random_folder(tmp_path / "adapter", rank=16)


def test_a_fit_folder_ends_with_zero(folder: Path) -> None:
    """Without --for, the engines that read folders are asked, and each says how to serve it."""
    done = run(folder)
    assert done.exit_code == 0, done.output
    assert done.stdout.count(": fine: ") == 3
    assert "  serve: vllm serve base --enable-lora --max-lora-rank 16 --lora-modules " in done.stdout
    assert done.stdout.splitlines()[-1] == f"{folder}: fit for all of them"


def test_what_is_refused_or_wrong_ends_with_one(folder: Path) -> None:
    """Each finding has its rule, what was found, the source and the command."""
    done = run(folder, "--for", "vllm,llama.cpp", "--max-rank", 8)
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[0].startswith("vllm: refused: the rank must not exceed --max-lora-rank")
    assert lines[1] == "  found: adapter_config.json: rank 16, the server allows 8"
    assert lines[2] == "  source: vllm/lora/peft_helper.py, vLLM 0.33.0"
    assert lines[3].startswith("  mend: vllm serve ")
    assert lines[-1] == f"{folder}: not for vllm, llama.cpp"


def test_json_has_the_same(folder: Path) -> None:
    """An object with the path, whether it is fit, and the findings."""
    done = run(folder, "--for", "sglang,mlx", "--json")
    assert done.exit_code == 1
    said = json.loads(done.stdout)
    assert (said["path"], said["fit"]) == (str(folder), False)
    assert [(row["engine"], row["severity"]) for row in said["findings"]] == [("sglang", "fine"), ("mlx", "refused")]


@pytest.mark.parametrize("arguments", [("missing",), ("missing", "--for", "vlm"), ("missing", "--max-rank", "0")])
def test_bad_input_ends_with_two(arguments: tuple[str, ...]) -> None:
    """One line on stderr, and nothing on stdout."""
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Traceback" not in done.output


EXAMPLES = [
    found
    for page in (ROOT / "README.md", ROOT / "plugins/serving/README.md")
    for found in re.findall(r"^tunerkit check-serving out/peft( .*?)?(?: +#.*)?$", page.read_text("utf-8"), re.M)
]


@pytest.mark.parametrize("options", EXAMPLES)
def test_the_examples_of_the_readmes_are_not_refused(options: str, folder: Path) -> None:
    """They check a folder of PEFT's form for engines that read one."""
    assert EXAMPLES
    done = run(folder, *options.split())
    assert done.exit_code == 0, done.output
