"""The README and the pages in docs are true: their examples run, and their options exist."""

import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs
import pytest

from scripts import notebooks
from tests.support import warm_python
from tests.support.py_blocks import settings_of

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("plugins/*/README.md"))]
EXAMPLES_NEED = ("tunerkit_adalora", "tunerkit_lora", "transformers", "accelerate")
MORE_NEEDED = {
    "README.md": ("tunerkit_peft", "tunerkit_gguf", "gguf", "datasets"),
    "docs/how-to/from-peft.md": ("tunerkit_peft", "peft"),
    "docs/how-to/experts.md": ("tunerkit_experts",),
    "docs/how-to/diffusion.md": ("tunerkit_diffusers", "diffusers"),
    "docs/how-to/images.md": ("timm",),
    "docs/how-to/memory.md": ("datasets",),
    "docs/how-to/preference-training.md": ("trl", "datasets", "tokenizers"),
    "plugins/diffusers/README.md": ("tunerkit_diffusers", "diffusers"),
    "plugins/gguf/README.md": ("tunerkit_gguf", "gguf"),
    "plugins/peft/README.md": ("tunerkit_peft", "tunerkit_verbs"),
    "plugins/verbs/README.md": ("tunerkit_verbs",),
    "docs/authors/write-a-method.md": ("tunerkit_verbs",),
    "docs/authors/write-a-plugin.md": ("tunerkit_verbs",),
    "docs/authors/base-layers.md": ("tunerkit_quant",),
    "docs/how-to/training.md": ("trl", "datasets", "tokenizers", "tunerkit_verbs"),
    "docs/how-to/quantised-models.md": ("bitsandbytes", "tunerkit_quant"),
}
# Blocks may be indented, as they are in tabs.
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


@attrs.frozen
class Block:
    """A fenced block of a page: its language, its text, and the page's line on which the text begins."""

    language: str
    text: str
    line: int


def blocks(page: str, language: str) -> list[Block]:
    return [
        Block(found["language"], textwrap.dedent(found["text"]), page.count("\n", 0, found.start("text")) + 1)
        for found in FENCE.finditer(page)
        if found["language"] == language
    ]


def script(page: str) -> str:
    """All Python blocks of a page as one script with the page's line numbers, so tracebacks point into the page."""
    lines: list[str] = []
    for block in blocks(page, "python"):
        lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
    return "\n".join(lines) + "\n"


def changed_lines(one: Block, other: Block) -> list[tuple[str, str]]:
    pairs = zip(one.text.splitlines(), other.text.splitlines(), strict=True)
    return [(before, after) for before, after in pairs if before != after]


def training_block(method: str) -> Block:
    """The README's whole example of a method: the one block that imports its plugin and trains."""
    found = [
        b for b in blocks(README.read_text(encoding="utf-8"), "python") if f"from tunerkit_{method} import" in b.text
    ]
    assert len(found) == 1, f"expected one example of {method}, found {len(found)}"
    return found[0]


def libraries(block: Block) -> list[str]:
    """The libraries of others that a block needs, which the Makefile chooses tests by."""
    return [name for setting in settings_of(block.text) for name in setting.needs if not name.startswith("tunerkit")]


def shell_lines() -> Iterator[str]:
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8"), "sh"):
            yield from (line.partition("#")[0].strip() for line in block.text.splitlines())


def test_lora_becomes_adalora_by_changing_two_lines() -> None:
    """The README's examples of the two methods differ in the import and in the call of ``wrap``, nowhere else."""
    changed = changed_lines(training_block("lora"), training_block("adalora"))
    assert [after.split("(")[0].split(" ")[0] for _, after in changed] == ["from", "model"]
    assert all("wrap(" in line or "import" in line for pair in changed for line in pair)


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if "```python" in p.read_text(encoding="utf-8") and p not in notebooks.PAGES],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_examples_run_in_the_order_of_their_page(page: Path, tmp_path: Path) -> None:
    """The Python blocks of a page, in one offline process and an empty folder; notebooks run as such too."""
    needed = (*EXAMPLES_NEED, *MORE_NEEDED.get(page.relative_to(ROOT).as_posix(), ()))
    absent = [name for name in needed if find_spec(name) is None]
    if absent:
        pytest.skip(f"the examples need {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not installed")
    example = tmp_path / f"{page.stem}.py"
    example.write_text(script(page.read_text(encoding="utf-8")), encoding="utf-8")
    done = run_in(tmp_path, str(example))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "TunerkitWarning" not in done.stderr
    for arguments in commands_on_results(page, tmp_path):
        done = run_in(tmp_path, "-m", "tunerkit_cli", *arguments)
        assert done.returncode == 0, (arguments, done.stdout[-3000:], done.stderr[-3000:])


@pytest.mark.parametrize(
    ("page", "number"),
    [
        pytest.param(page, number, id="-".join([str(page.relative_to(ROOT)), str(number), *libraries(block)]))
        for page in PAGES
        for number, block in enumerate(blocks(page.read_text(encoding="utf-8"), "py"))
    ],
)
def test_a_block_that_needs_more_runs_in_its_setting(page: Path, number: int, tmp_path: Path) -> None:
    """A block marked ``py`` runs in a process of its own, after the lines that its setting says, where that can run."""
    text = page.read_text(encoding="utf-8")
    block = blocks(text, "py")[number]
    settings = settings_of(block.text)
    assert len(settings) == 1, f"{page.name}, line {block.line}: tests/support/py_blocks.py has {len(settings)} for it"
    (setting,) = settings
    absent = [name for name in (*EXAMPLES_NEED, *setting.needs) if find_spec(name) is None]
    if absent:
        pytest.skip(f"the block needs {', '.join(absent)}")
    before = script(text[: text.index(block.text)]) if setting.after_the_page else ""
    example = tmp_path / f"{page.stem}.py"
    example.write_text(f"{before}{setting.before}\n{block.text}{setting.after}\n", encoding="utf-8")
    done = run_in(tmp_path, str(example), processes=setting.processes, **setting.environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "TunerkitWarning" not in done.stderr


def run_in(folder: Path, *arguments: str, processes: int = 1, **variables: str) -> Any:
    """Run Python in a folder, offline, with the variables added to the environment, in some processes of one group."""
    if sys.platform == "linux" and processes > 1:
        return warm_python.run_together(folder, *arguments, processes=processes, **variables)
    if sys.platform == "linux":
        return warm_python.run(folder, *arguments, **variables)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)


def commands_on_results(page: Path, folder: Path) -> list[list[str]]:
    """The page's commands that read a file or folder which its examples wrote into ``folder``."""
    found = []
    for block in blocks(page.read_text(encoding="utf-8"), "sh"):
        for line in block.text.splitlines():
            if line.startswith(("tunerkit check-serving ", "tunerkit show ")):
                arguments = shlex.split(line, comments=True)[1:]
                found += [arguments] if (folder / arguments[1]).exists() else []
    return found


def test_the_make_targets_that_the_pages_name_exist() -> None:
    """``make demo`` and the others are in the Makefile."""
    named = {line.split()[1] for line in shell_lines() if line.startswith("make ")}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize(
    ("command", "shown"), [("train", {"--out", "--method"}), ("new", {"--form"}), ("report", {"--out"})]
)
def test_the_options_that_the_pages_name_exist(command: str, shown: set[str], tmp_path: Path) -> None:
    """Every option after ``tunerkit train``, ``new`` or ``report`` is one of the command's own."""
    absent = [name for name in ("tunerkit_cli", "typer", "rich") if find_spec(name) is None]
    if absent:
        pytest.skip(f"the command needs the extra [cli]: {', '.join(absent)} not installed")
    lines = [line for line in shell_lines() if line.startswith(f"tunerkit {command}")]
    named = {option for line in lines for option in options_in(line)}
    # A wide and plain terminal, so that the help breaks no option's name.
    plain: dict[str, Any] = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    told = run_in(tmp_path, "-m", "tunerkit_cli", command, "--help", **plain)
    assert told.returncode == 0, told.stderr[-3000:]
    assert shown <= named <= options_in(told.stdout)


def options_in(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]*", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    """Relative links of a page work in a clone."""
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
