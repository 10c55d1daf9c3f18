"""``tunerkit train --from``: go on training an adapter of tunerkit's, or of another program."""

import json
import shutil
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tunerkit
from tests.support import toy_formats
from tests.support.toy_growing import GrowingPlugin
from tests.support.train_command import (
    arguments_of,
    assert_same_end,
    command,
    record_of,
    signalled,
    succeeded,
)
from tunerkit.plugin import Description, Foreign, Format
from tunerkit_cli.folder import RunFolder
from tunerkit_cli.preparing import starting
from tunerkit_cli.recipes.recipe import Recipe
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_adapters import SCALE
from tunerkit_testing.toy_methods import LowRankPlugin
from tunerkit_transformers.pretrained import load_pretrained


class ToyFormat:
    """The toy format, whose adapters become ``toy-growing``, and which a file beside them describes."""

    @tunerkit.hookimpl
    def tunerkit_formats(self) -> Iterable[Format]:
        """Register it."""
        return [
            Format("toy", toy_formats.sniff, read_growing, toy_formats.write, describe=described),
        ]


def read_growing(path: Path, model: torch.nn.Module) -> Foreign:
    factors = toy_formats.read(path, model).factors
    tensors = {path: {"a": each.q, "b": each.p / SCALE} for path, each in factors.items()}
    return Foreign(factors, "toy-growing", tensors=tensors)


def described(path: Path) -> Description:
    file = path / "about.json"
    return Description(**json.loads(file.read_text())) if file.exists() else Description("LoHa")


@pytest.fixture(autouse=True, scope="module")
def _toys() -> Iterator[None]:
    with registered(GrowingPlugin(), LowRankPlugin(), ToyFormat()):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny classifier, ``tiny``, and forty rows, ``data.csv``."""
    return tmp_path_factory.mktemp("from")


@pytest.fixture(scope="module")
def first(folder: Path) -> Path:
    """The output folder of a first training, whose ranks have grown."""
    call = arguments_of(folder, "toy-growing", "{every: 6, max_rank: 3}")
    succeeded(*call, "--set", "training.max_steps=8", "--out", folder / "first")
    return folder / "first"


def going_on(folder: Path, source: object, *more: object) -> list[object]:
    """The arguments of a training that goes on, without ``--out`` and ``--model``."""
    rates = ("--epochs", "1", "--batch-size", "8", "--lr", "0.01", "--max-length", "8")
    return ["train", "--from", source, "--data", folder / "data.csv", *rates, *more]


def logits(out: Path) -> torch.Tensor:
    model, tokenizer = tunerkit.from_folder(out)
    with torch.no_grad():
        found: torch.Tensor = model(**tokenizer(["good film", "bad plot"], return_tensors="pt", padding=True)).logits
    return found


def refusal(*arguments: object) -> str:
    """Call the command, which must refuse; return its line."""
    done = command(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1
    return str(done.stderr)


def test_a_training_goes_on_with_method_model_task_and_ranks(first: Path, folder: Path, tmp_path: Path) -> None:
    """The output folder says all of them; the record is of the second training alone."""
    done = succeeded(*going_on(folder, first, "--out", tmp_path / "more"))
    assert f"goes on from {first}" in done.output
    before, after = record_of(first), record_of(tmp_path / "more")
    assert after["method"] == "toy-growing"
    assert after["config"] == before["config"]
    assert after["model"]["source"] == before["model"]["source"]
    assert after["steps"] == 4
    assert after["history"][0]["ranks"] == list(before["ranks"].values())
    assert after["rows"] == {"train": 32, "eval": 8}
    kept = yaml.safe_load((tmp_path / "more" / "recipe.yaml").read_text())
    assert kept["from_adapter"] == str(first)
    assert (kept["method"], kept["task"], kept["model"]) == ("toy-growing", "text-classification", str(folder / "tiny"))
    assert not torch.equal(logits(tmp_path / "more"), logits(first))


def test_a_learning_rate_near_0_leaves_the_adapter_as_it_was(first: Path, folder: Path, tmp_path: Path) -> None:
    """So the second training begins where the first one ended, its head included."""
    succeeded(*going_on(folder, first, "--out", tmp_path / "more", "--lr", "1e-12"))
    assert torch.allclose(logits(tmp_path / "more"), logits(first), atol=1e-6)


def test_a_recipe_may_name_the_adapter(first: Path, folder: Path, tmp_path: Path) -> None:
    """The folder's own recipe repeats the run; --set works without naming the method."""
    succeeded(*going_on(folder, first, "--out", tmp_path / "more", "--set", "max_steps=2"))
    succeeded("train", tmp_path / "more" / "recipe.yaml", "--out", tmp_path / "again")
    assert_same_end(tmp_path / "more", tmp_path / "again")
    assert record_of(tmp_path / "again")["steps"] == 2


def test_a_dry_run_writes_nothing(first: Path, folder: Path, tmp_path: Path) -> None:
    """It says where the training goes on from, and its steps."""
    done = succeeded(*going_on(folder, first, "--out", tmp_path / "more", "--dry-run", "--method", "Toy-Growing"))
    assert f"goes on from {first}" in done.output
    assert "4 steps" in done.output
    assert not (tmp_path / "more").exists()


def test_the_run_may_be_replaced_by_the_one_that_goes_on(first: Path, folder: Path, tmp_path: Path) -> None:
    """With --overwrite, in the same folder: the adapter is read before its file is removed."""
    shutil.copytree(first, tmp_path / "run")
    assert "pass --overwrite" in refusal(*going_on(folder, tmp_path / "run", "--out", tmp_path / "run"))
    succeeded(*going_on(folder, tmp_path / "run", "--out", tmp_path / "run", "--overwrite"))
    assert record_of(tmp_path / "run")["steps"] == 4


def test_a_file_of_tunerkit_needs_the_model_alone(first: Path, folder: Path, tmp_path: Path) -> None:
    """It has no record, so its classes have no names: their order is printed."""
    file = Path(shutil.copy(first / "adapter.safetensors", tmp_path / "mine.safetensors"))
    assert "does not say which base model it is for; pass --model" in refusal(
        *going_on(folder, file, "--out", tmp_path / "more")
    )
    done = succeeded(*going_on(folder, file, "--out", tmp_path / "more", "--model", folder / "tiny"))
    assert "mine.safetensors does not name the classes of its head; they are taken in this order: 'bad', 'g" in (
        done.output
    )
    assert record_of(tmp_path / "more")["method"] == "toy-growing"
    succeeded(*going_on(folder, first / "adapter.safetensors", "--out", tmp_path / "other"))


def test_the_order_of_the_classes_is_that_of_the_head(folder: Path, tmp_path: Path) -> None:
    """Data with some of the classes is enough, and the head keeps all of them."""
    rows = "".join(f"{word} film,{label}\n" for word, label in (("good", "c"), ("bad", "b"), ("not", "a")) * 8)
    (tmp_path / "three.csv").write_text("text,label\n" + rows)
    (tmp_path / "two.csv").write_text("text,label\n" + "good film,c\nbad plot,b\n" * 8)
    more = ("--epochs", "1", "--batch-size", "8", "--out")
    call = ("train", "--method", "toy-low-rank", "--model", folder / "tiny", "--data", tmp_path / "three.csv", *more)
    succeeded(*call, tmp_path / "first")
    succeeded("train", "--from", tmp_path / "first", "--data", tmp_path / "two.csv", *more, tmp_path / "more")
    record = record_of(tmp_path / "more")
    assert record["labels"] == ["a", "b", "c"]
    assert len(record["confusion"]) == 3
    (tmp_path / "new.csv").write_text("text,label\n" + "good film,c\nbad plot,ugly\n" * 8)
    told = refusal("train", "--from", tmp_path / "first", "--data", tmp_path / "new.csv", *more, tmp_path / "other")
    assert "new.csv: has the classes ['ugly'], and the head of the adapter" in told
    assert "is for ['a', 'b', 'c']; leave these rows out" in told


def test_a_head_with_untidy_names_of_an_earlier_version_goes_on(folder: Path, first: Path, tmp_path: Path) -> None:
    """It kept white space around labels, which is not read any more: the head's classes are found all the same."""
    shutil.copytree(first, tmp_path / "old")
    (tmp_path / "old" / "run.json").write_text(json.dumps({**record_of(first), "labels": ["bad ", " good"]}))
    succeeded(*going_on(folder, tmp_path / "old", "--out", tmp_path / "more"))
    succeeded(*going_on(folder, first, "--out", tmp_path / "same"))
    old, same = (record_of(tmp_path / name) for name in ("more", "same"))
    assert old["labels"] == ["bad ", " good"]
    assert (old["metrics"], old["confusion"]) == (same["metrics"], same["confusion"])
    found = [
        json.loads(succeeded("eval", each, "--data", folder / "data.csv").stdout) for each in (tmp_path / "old", first)
    ]
    assert found[0] == found[1]


# --- other programs ---


@pytest.fixture
def foreign(folder: Path, tmp_path: Path) -> Path:
    """A toy folder of an adapter without a head, on a checkpoint that has one."""
    model = load_pretrained("text-classification", str(folder / "tiny"), labels=("bad", "good")).model
    tunerkit.wrap(model, "toy-growing", seed=0)
    for path, parameter in model.named_parameters():
        if path.endswith("adapter.b"):
            torch.nn.init.normal_(parameter, std=0.1)
    place = tmp_path / "foreign"
    place.mkdir()
    toy_formats.write(tunerkit.tuner(model), place, None)
    return place


def about(place: Path, **facts: Any) -> None:
    (place / "about.json").write_text(json.dumps(facts))


@pytest.mark.usefixtures("first")
def test_an_adapter_of_another_program_goes_on_with_the_base_that_it_names(
    foreign: Path, folder: Path, tmp_path: Path
) -> None:
    """Its method is what core makes of it, and the head of the checkpoint stays as it is."""
    assert "pass --model" in refusal(*going_on(folder, foreign, "--out", tmp_path / "more"))
    about(foreign, method="LORA", base=str(folder / "tiny"))
    succeeded(*going_on(folder, foreign, "--out", tmp_path / "more"))
    record = record_of(tmp_path / "more")
    assert record["method"] == "toy-growing"
    assert "--method is toy-low-rank" in refusal(
        *going_on(folder, foreign, "--out", tmp_path / "other", "--method", "toy-low-rank")
    )
    assert record["model"]["source"] == str(folder / "tiny")
    assert record["parameters"]["copies"] == 0
    assert (tmp_path / "more" / "adapter.safetensors").is_file()
    succeeded(*going_on(folder, tmp_path / "more", "--out", tmp_path / "again"))


# --- resuming ---


def test_a_stopped_run_is_resumed_without_its_start(first: Path, folder: Path, tmp_path: Path) -> None:
    """Before and after its first checkpoint: the run has a copy of the adapter, with the names of its classes."""
    source = tmp_path / "source"
    shutil.copytree(first, source)
    call = going_on(folder, source, "--batch-size", "4", "--seed", "3")
    succeeded(*call, "--out", tmp_path / "whole")
    with signalled(2, signal.SIGINT):
        done = command(*call, "--out", tmp_path / "parts")
    assert done.exit_code == 130, done.output
    assert (tmp_path / "parts" / "checkpoints" / "start" / "adapter.safetensors").is_file()
    with signalled(4, signal.SIGINT):
        assert command(*call, "--out", tmp_path / "parts", "--resume").exit_code == 130  # the same options
    shutil.rmtree(source)
    succeeded("train", "--out", tmp_path / "parts", "--resume")
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_stopped_before_its_copy_starts_from_the_original(first: Path, folder: Path, tmp_path: Path) -> None:
    """Nothing was trained by then. A damaged copy is named."""
    call = going_on(folder, first, "--batch-size", "4")
    succeeded(*call, "--out", tmp_path / "whole")
    with signalled(1, signal.SIGINT):
        assert command(*call, "--out", tmp_path / "parts").exit_code == 130
    for name in ("checkpoint-1", "start"):
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / name)
    facts = tmp_path / "parts" / "checkpoints" / "start.json"
    facts.write_text("{")
    assert "start.json: is damaged" in refusal("train", "--out", tmp_path / "parts", "--resume")
    facts.unlink()
    succeeded("train", "--out", tmp_path / "parts", "--resume")
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_the_copy_names_the_base_without_the_home_folder(
    first: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the other files of a run do, which may be published; it is found again."""
    monkeypatch.setenv("HOME", str(folder))
    start, checkpoints = starting.find_start(str(first)), tmp_path / "checkpoints"
    starting.keep_start(start, tunerkit.from_folder(first)[0], tmp_path, RunFolder(tmp_path))
    assert json.loads((checkpoints / "start.json").read_text())["model"] == "~/tiny"
    found = starting.start_of(Recipe(from_adapter=str(first), out=str(tmp_path)), resume=True)
    assert found is not None
    assert (found.model, found.path) == (str(folder / "tiny"), str(checkpoints / "start"))


def test_a_run_is_resumed_with_its_own_start_only(first: Path, folder: Path, tmp_path: Path) -> None:
    """Another adapter is refused by name."""
    shutil.copytree(first, tmp_path / "other")
    with signalled(1, signal.SIGINT):
        assert command(*going_on(folder, first, "--out", tmp_path / "more")).exit_code == 130
    told = refusal(*going_on(folder, tmp_path / "other", "--out", tmp_path / "more", "--resume"))
    assert "--resume: from_adapter was " in told


# --- refusals ---


def test_what_contradicts_the_adapter_is_refused(first: Path, folder: Path, tmp_path: Path) -> None:
    """Before anything is loaded or written, with what to leave out."""
    out = ("--out", tmp_path / "more")
    told = refusal(*going_on(folder, first, *out, "--method", "toy-low-rank"))
    assert "it is a toy-growing adapter, and --method is toy-low-rank; leave --method out" in told
    for way in (("--config", "{max_rank: 2}"), ("--set", "max_rank=2"), ("--set", "config.max_rank=2")):
        assert "so config (max_rank) cannot be set" in refusal(*going_on(folder, first, *out, *way))
    assert "no such file or folder; pass an output folder" in refusal(*going_on(folder, tmp_path / "gone", *out))
    assert "cannot contain the character NUL" in refusal(*going_on(folder, f"{tmp_path}/a\0b", *out))
    (tmp_path / "empty").mkdir()
    assert "there is no file" in refusal(*going_on(folder, tmp_path / "empty", *out))
    assert not (tmp_path / "more").exists()


def test_another_base_is_refused(first: Path, folder: Path, tmp_path: Path) -> None:
    """With the option that mends it; a base that is gone is named before the data is read."""
    config = json.loads((folder / "tiny" / "config.json").read_text())
    shutil.copytree(folder / "tiny", tmp_path / "wide")
    (tmp_path / "wide" / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    told = refusal(*going_on(folder, first, "--out", tmp_path / "more", "--model", tmp_path / "wide"))
    assert "pass the base that the adapter was trained on with --model" in told
    shutil.copytree(first, tmp_path / "moved")
    record = json.loads((first / "run.json").read_text())
    record["model"]["source"] = str(tmp_path / "old")
    (tmp_path / "moved" / "run.json").write_text(json.dumps(record))
    told = refusal(*going_on(folder, tmp_path / "moved", "--out", tmp_path / "more"))
    assert f"its base model was in {tmp_path / 'old'}, which is gone; pass the folder where it is now" in told
    succeeded(*going_on(folder, tmp_path / "moved", "--out", tmp_path / "more", "--model", folder / "tiny"))


def test_a_new_head_that_the_adapter_does_not_train_is_refused(foreign: Path, folder: Path, tmp_path: Path) -> None:
    """It would stay random for ever."""
    about(foreign, method="LORA", base=str(folder / "tiny"))
    (tmp_path / "three.csv").write_text("text,label\n" + "good film,a\nbad plot,b\nnot good,c\n" * 8)
    call = ["train", "--from", foreign, "--data", tmp_path / "three.csv", "--out", tmp_path / "more"]
    assert "the adapter trains no head, and " in refusal(*call)


def test_a_schedule_that_does_not_fit_says_what_can_be_changed() -> None:
    """Not the adapter's settings, which an error of the method's would name. A new adapter's error stays as it is."""
    problem = tunerkit.errors.ConfigError(["train longer, or lower t_init @ $.t_init"])
    start = starting.Start("old", "old")
    with pytest.raises(tunerkit.TunerkitError, match=r"settings of .* --from old"), starting.explaining(start):
        raise problem
    with pytest.raises(tunerkit.errors.ConfigError, match=r"t_init$"), starting.explaining(None):
        raise problem


def test_the_dtype_of_the_base_is_that_of_the_run(folder: Path, tmp_path: Path) -> None:
    """The adapter was trained on these weights, rounded."""
    recipe = ("--epochs", "1", "--batch-size", "16", "--data", folder / "data.csv", "--set", "dtype=bfloat16", "--out")
    succeeded("train", "--method", "toy-low-rank", "--model", folder / "tiny", *recipe, tmp_path / "half")
    succeeded(*going_on(folder, tmp_path / "half", "--out", tmp_path / "more"))
    assert record_of(tmp_path / "more")["model"]["dtype"] == "bfloat16"
