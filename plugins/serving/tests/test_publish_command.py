"""``tunerkit publish``: a folder as it is, a run by its model; what it prints, and its exit codes."""

from pathlib import Path
from typing import Any

import pytest
import torch

for _module in ("rich", "typer", "yaml", "tunerkit_peft"):
    pytest.importorskip(_module, reason="the command needs the extras [cli,peft]")

from typer.testing import CliRunner  # noqa: E402

import tunerkit  # noqa: E402
from plugins.serving.tests.serving_folders import Decoder, random_folder  # noqa: E402
from plugins.serving.tests.stub_vllm import StubVllm, perturb_  # noqa: E402
from tunerkit_cli import app  # noqa: E402
from tunerkit_serving import read_folder  # noqa: E402


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app.build(), ["publish", *map(str, arguments)])


def test_a_peft_folder_is_published_as_it_is(stub: StubVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name starts with the folder's, and stdout has nothing else; --keep counts over several calls."""
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        random_folder(tmp_path / "my news", rank=12)
        done = run("my news", "--to", stub.url, "--keep", 2)
        assert done.exit_code == 0, done.output
        names.append(done.stdout.strip())
    assert names[0].startswith("my-news-")
    assert tuple(stub.adapters) == tuple(names[1:])
    assert read_folder(tmp_path / "tunerkit-published" / names[2]).ranks == {12}


def test_a_run_is_published_by_its_model(stub: StubVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rank and the folder that are asked for."""
    torch.manual_seed(0)
    model = tunerkit.wrap(Decoder(), "lora", {"rank": 4, "targets": ["q_proj"]})
    perturb_(model)
    opened: list[Path] = []

    def from_folder(path: Path) -> tuple[Decoder, None]:
        opened.append(path)
        return model, None

    monkeypatch.setattr(tunerkit, "from_folder", from_folder)
    done = run(tmp_path / "run", "--to", stub.url, "--rank", 16, "--folder", tmp_path / "there")
    assert done.exit_code == 0, done.output
    assert (opened, [*stub.adapters]) == ([tmp_path / "run"], [done.stdout.strip()])
    assert read_folder(tmp_path / "there" / done.stdout.strip()).ranks == {16}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("adapter", "--to", "localhost"), "expected a URL such as http://host:8000"),
        (("missing", "--to", "http://localhost:8000"), "missing"),
        (("adapter", "--to", "URL", "--rank", "8"), "a folder is published as it is"),
        (("adapter",), "--to"),
    ],
)
def test_bad_input_ends_with_two(
    arguments: tuple[str, ...], says: str, stub: StubVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line on stderr, and nothing on stdout or at the server."""
    monkeypatch.chdir(tmp_path)
    random_folder(tmp_path / "adapter")
    done = run(*(stub.url if each == "URL" else each for each in arguments))
    assert (done.exit_code, done.stdout, stub.adapters) == (2, "", {})
    assert says in done.stderr
    assert "Traceback" not in done.output
