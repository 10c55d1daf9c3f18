"""What ``tunerkit train`` leaves of a folder: all that is a user's, and nothing of a run that is refused."""

import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import transformers
import yaml

import tunerkit
from tests.support.train_command import arguments_of, command, in_process, killed, record_of, signalled, succeeded
from tunerkit_cli import outputs
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin

OWN = {
    "logs/mine.txt": "mine",
    "logs/deep/events": "mine",
    "checkpoints/mine.bin": "mine",
    "checkpoints/best/optimizer.pt": "mine",
    "pictures/cat.png": "mine",
    "notes.txt": "mine",
}
NAMED = {"data.sha256": f"{64 * '0'}  data.csv\n", "run.json": '{"loss": 0.5}'}


@pytest.fixture(autouse=True, scope="module")
def _toys() -> Iterator[None]:
    with registered(LowRankPlugin()):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny classifier, ``tiny``, and forty rows, ``data.csv``."""
    return tmp_path_factory.mktemp("written")


@pytest.fixture(scope="module")
def arguments(folder: Path) -> list[str]:
    """The arguments of a run of two steps, with a checkpoint after each, without ``--out``."""
    return [*arguments_of(folder, "toy-low-rank", "{rank: 2}"), "--set", "max_steps=2", "--set", "save_steps=1"]


@pytest.fixture(scope="module")
def run(arguments: list[str], folder: Path) -> Path:
    """The folder of that run, ended."""
    succeeded(*arguments, "--out", folder / "run")
    return folder / "run"


def put(folder: Path, files: dict[str, str]) -> None:
    """Write files with some text."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, by path; those of links too."""
    places = [Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names]
    return {str(place.relative_to(folder)): place.read_bytes() for place in places}


# --- the forms of --overwrite: each puts files of the user's into a folder, and says whether the command refuses it ---

Form = Callable[[Path, Path], None]
FORMS: dict[str, tuple[Form, bool]] = {}


def form(name: str, *, refused: bool) -> Callable[[Form], Form]:
    """Add a form: a function of the folder of an ended run and of the folder to write."""

    def add(function: Form) -> Form:
        FORMS[name] = function, refused
        return function

    return add


def _no_run(**files: str) -> Form:
    return lambda run, out: put(out, {**OWN, **{name.replace("_", "."): text for name, text in files.items()}})


form("names of a run alone", refused=True)(lambda run, out: put(out, {**OWN, **NAMED}))
form("a record of another program", refused=True)(_no_run(run_json='{"version": 1, "task": "x"}'))
form("a record that is a list", refused=True)(_no_run(run_json="[1]"))
form("a record that is no JSON", refused=True)(_no_run(run_json="{"))
form("a record that is a folder", refused=True)(lambda run, out: put(out, {**OWN, "run.json/a.txt": "mine"}))
form("digests and a recipe of his own", refused=True)(
    lambda run, out: put(out, {**OWN, **NAMED, "recipe.yaml": "model: bert\n"})
)
form("no digests", refused=True)(_no_run(data_sha256=""))
form("a recipe and checkpoints", refused=True)(_no_run(recipe_yaml="version: 1\n"))
form("a list of another program", refused=True)(_no_run(written_json='{"files": ["notes.txt"]}'))
form("a list that is no JSON", refused=True)(_no_run(written_json="notes.txt"))


@form("a list that points outside", refused=True)
def _outside(run: Path, out: Path) -> None:
    paths = ["../outside.txt", str(out / "notes.txt"), "link/notes.txt", ""]
    put(out, {**OWN, "../outside.txt": "mine", "../far/notes.txt": "mine"})
    (out / "link").symlink_to(out.parent / "far")
    put(out, {"written.json": json.dumps({"tunerkit": "0.1.0", "files": paths}), "report.html": "mine"})


@form("an ended run", refused=False)
def _ended(run: Path, out: Path) -> None:
    shutil.copytree(run, out, dirs_exist_ok=True)
    put(out, OWN)


@form("a run that was killed", refused=False)
def _killed(run: Path, out: Path) -> None:
    _ended(run, out)
    (out / "run.json").unlink()


@form("a file in a checkpoint", refused=True)
def _in_checkpoint(run: Path, out: Path) -> None:
    _ended(run, out)
    put(out, {"checkpoints/checkpoint-2/mine.txt": "mine"})


@form("a checkpoint of his own", refused=True)
def _own_checkpoint(run: Path, out: Path) -> None:
    _ended(run, out)
    put(out, {"checkpoints/checkpoint-99/optimizer.pt": "mine"})


@form("links to folders of his own", refused=True)
def _links(run: Path, out: Path) -> None:
    shutil.copytree(run, out, dirs_exist_ok=True)
    put(out.parent / "far", {"checkpoint-2/optimizer.pt": "mine", "mine.txt": "mine"})
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints").symlink_to(out.parent / "far")


@form("a link in place of logs", refused=True)
def _linked_logs(run: Path, out: Path) -> None:
    _ended(run, out)
    put(out.parent / "far", {"events.out.tfevents.1": "mine"})
    shutil.rmtree(out / "logs")
    (out / "logs").symlink_to(out.parent / "far")


@form("a report of his own in a run that was killed", refused=True)
def _own_report(run: Path, out: Path) -> None:
    _killed(run, out)
    _list_without(out, "report.html")
    put(out, {"report.html": "mine"})


@form("a tokenizer of his own in a run that was killed", refused=True)
def _own_tokenizer(run: Path, out: Path) -> None:
    _killed(run, out)
    _list_without(out, "tokenizer.json")
    put(out, {"tokenizer.json": "mine"})


@form("a picture with a name of the run's", refused=False)
def _own_picture(run: Path, out: Path) -> None:
    _ended(run, out)
    put(out, {"pictures/loss.png": "mine"})


def _list_without(out: Path, name: str) -> None:
    found = json.loads((out / "written.json").read_text())
    found["files"].remove(name)
    (out / "written.json").write_text(json.dumps(found))


@pytest.mark.parametrize("name", FORMS)
def test_overwrite_removes_no_file_of_the_users(name: str, arguments: list[str], run: Path, tmp_path: Path) -> None:
    """Whatever a folder holds, every file that no run wrote has the same bytes afterwards."""
    make, refused = FORMS[name]
    (tmp_path / "out").mkdir()
    make(run, tmp_path / "out")
    before = content(tmp_path)
    theirs = {path: data for path, data in before.items() if data == b"mine" or refused}
    assert theirs
    done = command(*arguments, "--out", tmp_path / "out", "--overwrite")
    after = content(tmp_path)
    assert {path: after.get(path) for path in theirs} == theirs
    assert done.exit_code == (2 if refused else 0), done.output
    if refused:
        assert after.keys() == before.keys()
        assert done.stderr.startswith(f"tunerkit: --out {tmp_path / 'out'}: ")
        assert done.stderr.count("\n") == 1
    else:
        assert json.loads(after["out/run.json"])["recipe"]["out"] == str(tmp_path / "out")


def test_overwrite_keeps_the_earlier_run_until_there_is_a_new_adapter(
    arguments: list[str], run: Path, tmp_path: Path
) -> None:
    """Its adapter can be used all the time, and then nothing of it is left. What would be resumed goes at once."""
    out = shutil.copytree(run, tmp_path / "out")
    (out / "checkpoints" / "checkpoint-2").rename(out / "checkpoints" / "checkpoint-77")
    (out / "tokenizer.json").rename(out / "vocab.txt")  # a file that the new run does not write
    text = (out / "written.json").read_text().replace("checkpoint-2/", "checkpoint-77/")
    (out / "written.json").write_text(text.replace('"tokenizer.json"', '"vocab.txt"'))
    before = content(out)
    for _ in range(2):  # the second one replaces a run that has not ended
        with signalled(1, signal.SIGINT, times=2):
            done = command(*arguments, "--out", out, "--overwrite")
        assert done.exit_code == 130, done.output
        assert f"{out / 'adapter.safetensors'} is still that of the earlier run" in done.stderr
        after = content(out)
        kept = {"adapter.safetensors", "run.json", "report.html", "environment.json", "vocab.txt"}
        assert {path: after[path] for path in kept} == {path: before[path] for path in kept}
        assert after.keys() <= before.keys()
        assert not [path for path in after if path.startswith("checkpoints/")]
    assert "holds a run that has not ended; pass --overwrite" in command(*arguments, "--out", out).stderr
    with mock.patch.object(tunerkit, "save", side_effect=tunerkit.errors.StepError("no room")):
        assert command("train", "--out", out, "--resume").exit_code == 2
    assert (out / "adapter.safetensors").read_bytes() == before["adapter.safetensors"]
    succeeded("train", "--out", out, "--resume")
    assert content(out).keys() == content(run).keys()
    assert "earlier" not in json.loads((out / "written.json").read_text())


def test_a_run_of_a_version_that_kept_no_list_is_resumed(arguments: list[str], run: Path, tmp_path: Path) -> None:
    """Its files are listed from then on. Before, it is not replaced: nothing says which of the files are the run's."""
    out = tmp_path / "out"
    with signalled(1, signal.SIGINT):
        assert command(*arguments, "--out", out).exit_code == 130
    (out / "written.json").unlink()
    done = command(*arguments, "--out", out, "--overwrite")
    assert done.exit_code == 2
    assert "the folder holds other files, such as data.sha256 (written.json does not say" in done.stderr
    succeeded("train", "--out", out, "--resume")
    assert content(out).keys() == content(run).keys()


def test_a_run_that_was_killed_before_its_report_gets_it_by_resuming(run: Path, tmp_path: Path) -> None:
    """The record is drawn, as it is; with a report, there is nothing to resume."""
    out = shutil.copytree(run, tmp_path / "out")
    before = content(out)
    (out / "report.html").unlink()
    assert "the run in" in succeeded("train", "--out", out, "--resume", "--dry-run").output
    assert not (out / "report.html").exists()
    succeeded("train", "--out", out, "--resume")
    assert content(out) == before
    assert "this run has ended" in command("train", "--out", out, "--resume").stderr


def test_a_run_and_the_data_in_its_folder_may_move(arguments: list[str], run: Path, tmp_path: Path) -> None:
    """Paths below the folder are relative to it: the run is resumed and evaluated where it is now."""
    out = shutil.copytree(run, tmp_path / "out")
    inside = out / "data.csv"
    shutil.copy(arguments[arguments.index("--data") + 1], inside)
    shutil.copytree(arguments[arguments.index("--model") + 1], out / "base")
    there = {"--data": inside, "--model": out / "base"}
    given = [there.get(before, value) for before, value in zip(["", *arguments], arguments, strict=False)]
    with signalled(1, signal.SIGINT):
        assert command(*given, "--out", out, "--overwrite").exit_code == 130
    kept = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (kept["data"], kept["model"]) == ("./data.csv", "./base")
    assert (out / "data.sha256").read_text().endswith("  ./data.csv\n")
    moved = out.rename(tmp_path / "moved")
    inside = moved / "data.csv"
    succeeded("train", moved / "recipe.yaml", "--out", moved, "--resume")
    assert record_of(moved)["model"]["source"] == "./base"
    assert record_of(moved)["data"] == {"train": "./data.csv", "eval": "a fifth of each class of ./data.csv"}
    again = moved.rename(tmp_path / "again")
    assert tunerkit.from_folder(again)[0].name_or_path == str(again / "base")


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_run_that_is_refused_before_its_first_step_changes_nothing(
    options: list[str], arguments: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new folder is gone afterwards, and an earlier run is as it was. The same call works once the cause is gone."""
    out = tmp_path / "new" / "out"
    if options:
        shutil.copytree(run, out)
    before = content(tmp_path)
    logging = ["--set", "report_to=tensorboard"] if importlib.util.find_spec("tensorboard") else []

    def fail(*_: object, **__: object) -> None:
        raise tunerkit.errors.StepError("no memory")

    places = [
        (transformers.AutoModelForSequenceClassification, "from_pretrained"),
        (transformers.Trainer, "training_step"),
    ]
    for owner, name in places:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            done = command(*arguments, "--out", out, *options, *logging)
        assert done.exit_code == 2
        assert "no memory" in done.stderr
        assert content(tmp_path) == before
        assert options or not list(tmp_path.iterdir())
    succeeded(*arguments, "--out", out, *options)


def test_the_logs_of_an_earlier_run_are_replaced(arguments: list[str], tmp_path: Path) -> None:
    """Those that the new run has begun to write, before its first step, stay."""
    pytest.importorskip("tensorboard")
    out, logging = tmp_path / "out", ("--set", "report_to=tensorboard")
    succeeded(*arguments, *logging, "--out", out)
    earlier = {path.name for path in (out / "logs").rglob("*tfevents*")}
    succeeded(*arguments, *logging, "--out", out, "--overwrite")
    later = {path.name for path in (out / "logs").rglob("*tfevents*")}
    assert later
    assert not earlier & later


def test_a_refused_run_leaves_the_card_of_an_earlier_one(arguments: list[str], run: Path, tmp_path: Path) -> None:
    """TRL writes it beside the checkpoints."""
    out = shutil.copytree(run, tmp_path / "out")
    card = out / "checkpoints" / "README.md"
    card.write_text("a card")
    listed = json.loads((out / "written.json").read_text())
    (out / "written.json").write_text(json.dumps({**listed, "files": [*listed["files"], "checkpoints/README.md"]}))
    with mock.patch.object(transformers.Trainer, "training_step", side_effect=tunerkit.errors.StepError("no memory")):
        assert command(*arguments, "--out", out, "--overwrite").exit_code == 2
    assert card.read_text() == "a card"


def test_a_dry_run_is_refused_where_another_run_trains(arguments: list[str], tmp_path: Path) -> None:
    """As the run itself would be."""
    with outputs.claimed(tmp_path / "out"):
        done = command(*arguments, "--out", tmp_path / "out", "--dry-run")
    assert (done.exit_code, "another process is training into this folder" in done.stderr) == (2, True)


def test_two_runs_into_one_folder_are_refused(arguments: list[str], tmp_path: Path) -> None:
    """The second one says so, and the first one is not disturbed. The lock of a process that was killed is gone."""
    with outputs.claimed(tmp_path / "out"):
        done = command(*arguments, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert done.stderr == (
        f"tunerkit: --out {tmp_path / 'out'}: another process is training into this folder; wait until it has ended, "
        "or pass another folder\n"
    )
    assert in_process(killed, [*arguments, "--out", str(tmp_path / "out")], [LowRankPlugin], 1) == -signal.SIGKILL
    succeeded("train", "--out", tmp_path / "out", "--resume")


@pytest.mark.skipif(sys.platform == "win32", reason="no folder can be locked there")
def test_two_merges_into_one_folder_are_refused(run: Path, tmp_path: Path) -> None:
    """And what a merge left that was killed is removed by the next one."""
    with outputs.scratch_beside(tmp_path, "plain"):
        done = command("merge", run, "--out", tmp_path / "plain")
    assert done.exit_code == 2
    assert "another process is writing this folder" in done.stderr
    put(tmp_path, {".writing-plain-abcd/whole/model.safetensors": "half", ".writing-other-abcd/mine.txt": "mine"})
    succeeded("merge", run, "--out", tmp_path / "plain")
    assert {path.name for path in tmp_path.iterdir()} == {"plain", ".writing-other-abcd"}
