"""Commands with one mistake each, and the page of what tunerkit says: ``python -m plugins.cli.tests.bad_inputs``."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import attrs
from typer.testing import CliRunner, Result

import tunerkit
from plugins.cli.tests.product_plugin import ProductPlugin, trained
from tests.support.tiny_classifier import save_tiny_classifier
from tests.support.tiny_models import SIDE, save_tiny_llama, save_tiny_t5, save_tiny_vit
from tunerkit_cli.app import build
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin
from tunerkit_transformers.bases import Base, whole

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "errors.md"
_TRAIN = "--method toy-low-rank --out new --epochs 1 --batch-size 8"
_INTRODUCTION = """# Error messages

What the command says about a mistake: one line on stderr, with what was seen and what to do, and exit code 2. No
adapter is written, and no file of an earlier run is lost, unless `--overwrite` said so. Each row is the message of one
command in the tests.
"""


@attrs.frozen
class BadInput:
    """A command with a mistake.

    Attributes:
        what: The mistake in words: the row's name on the page.
        command: The arguments. ``train`` is followed by a small model, data and method; options later in the line win.
        files: Files to write before, by path.
        needs: Packages without which the case cannot run.
        until: The message's last words that are ours; what follows is a library's.
    """

    what: str
    command: str
    files: Mapping[str, str | bytes] = MappingProxyType({})
    needs: tuple[str, ...] = ()
    until: str = ""


def _csv(name: str, content: str | bytes, what: str, options: str = "") -> BadInput:
    """Training data in one file."""
    return BadInput(what, f"train --model bert --data {name} {options}", {name: content})


def _jsonl(name: str, rows: list[object], what: str, options: str = "", needs: tuple[str, ...] = ()) -> BadInput:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    model = "" if "--model" in options else "--model bert"
    return BadInput(what, f"train {model} --data {name} {options}", {name: text}, needs)


def _train(what: str, options: str, *, until: str = "", **files: str) -> BadInput:
    return BadInput(what, f"train --model bert --data reviews.csv {options}", files, until=until)


def _rewarded(what: str, options: str) -> BadInput:
    rows = json.dumps({"prompt": "film", "solution": "good"}) + "\n"
    command = f"train --task grpo --model llama --data asked.jsonl {options}"
    return BadInput(what, command, {"asked.jsonl": 8 * rows, "rules.py": _RULES}, _TRL)


def _recipe(what: str, text: str, until: str = "") -> BadInput:
    name = f"{'-'.join(what.split())}.yaml"
    return BadInput(what, f"train {name} --model bert --data reviews.csv", {name: text}, until=until)


_TRL = ("trl", "datasets")
_RULES = """
def score(prompts, completions, answers, **columns):
    return [1.0]

def nan(completions, **columns):
    return [float("nan") for _ in completions]
"""
_GOOD = "text,label\n" + "good film,good\nbad plot,bad\n" * 10
_PREFERENCES = [{"prompt": "the film", "chosen": "good", "rejected": [{"role": "assistant", "content": "bad"}]}] * 8
_ASKED = {"role": "user", "content": "film"}

DATA = (
    _csv("texts.csv", _GOOD.replace("text,", "texts,"), "no column with texts"),
    _csv("lable.csv", _GOOD.replace("label", "lable"), "no column with labels", "--task text-classification"),
    _train("the column that an option names is not there", "--text-column sentence"),
    _csv("utf16.csv", _GOOD.encode("utf-16"), "a file in UTF-16"),
    _csv("latin1.csv", _GOOD.replace("film", "caf\xe9").encode("latin-1"), "a file in Latin-1"),
    _csv("semicolon.csv", _GOOD.replace(",", ";"), "semicolons between the columns"),
    _csv("twice.csv", _GOOD.replace("text,label", "text,text"), "two columns of the same name"),
    _csv("wide.csv", _GOOD + "good, but long,good\n", "a row with more values than columns"),
    _csv("narrow.csv", _GOOD + "good\n", "a row with fewer values than columns"),
    _csv("open.csv", 'text,label\n"good film,good\n', "a quote that is never closed"),
    _csv("header.csv", "text,label\n", "a header without rows"),
    _csv("void.csv", "", "an empty file"),
    BadInput("a line that is not JSON", "train --model bert --data bad.jsonl", {"bad.jsonl": '{"text": "good"\n'}),
    _jsonl("list.jsonl", [["good film", "good"]], "a line with another JSON value than an object"),
    _csv("one.csv", _GOOD.replace(",bad", ",good"), "a single class"),
    _csv("blank.csv", _GOOD + '"  ",good\n', "an empty text"),
    _csv("four.csv", "text,label\na,good\nb,bad\nc,good\nd,bad\n", "four rows"),
    _csv("unlabelled.csv", _GOOD + "very good,\n", "an empty label"),
    _jsonl("number.jsonl", [{"text": 3, "label": "a"}] * 10, "a number in place of a text"),
    _csv("float.csv", "text,label\n" + "good,4.5\nbad,1.5\n" * 5, "labels with a point, and no task"),
    _jsonl("half.jsonl", [{"text": "good", "label": 4.5}] * 10, "labels with a point", "--task text-classification"),
    _jsonl("lists.jsonl", [{"text": "good", "label": ["a"]}] * 10, "lists of labels", "--task text-classification"),
    _train("one label for each text, where several are expected", "--task multi-label"),
    _jsonl("nolabels.jsonl", [{"text": "good", "label": []}] * 10, "no label in any row", "--task multi-label"),
    _train("words in place of numbers", "--task regression"),
    _csv("nan.csv", "text,label\n" + "good,1\nbad,nan\n" * 5, "a number that is not a number", "--task regression"),
    _csv("inf.csv", "text,label\n" + "good,1\nbad,1e999\n" * 5, "an infinite number", "--task regression"),
    _jsonl("tags.jsonl", [{"tokens": ["a", "film"], "tags": ["O"]}] * 10, "fewer tags than tokens"),
    _jsonl("sentence.jsonl", [{"tokens": "a film", "tags": ["O"]}] * 10, "a text in place of a list of tokens"),
    _jsonl("role.jsonl", [{"messages": [{"content": "good"}]}] * 10, "messages without a role"),
    _jsonl("roles.jsonl", [{"messages": [{"role": "narrator", "content": "good"}]}] * 10, "messages with another role"),
    _jsonl("pairs.jsonl", list(_PREFERENCES), "a chosen text and a rejected list of messages"),
    _jsonl(
        "mixed.jsonl",
        [{"prompt": "a film", "completion": "good"}] * 8
        + [
            {"prompt": [{"role": "user", "content": "a film"}], "completion": [{"role": "assistant", "content": "bad"}]}
        ],
        "texts in some rows, and lists of messages in others",
    ),
    _jsonl(
        "answers.jsonl",
        [{"messages": [{"role": "assistant", "content": "good"}]}] * 8,
        "an answer without a question",
    ),
    _jsonl(
        "kto.jsonl", [{"prompt": "film", "completion": "good", "label": True}] * 8, "completions that are good or bad"
    ),
    _jsonl("grpo.jsonl", [{"prompt": "1 + 1", "answer": "2"}] * 8, "prompts with answers to check"),
    _jsonl("both.jsonl", [{"text": "good", "label": "a", "source": "b", "target": "c"}] * 8, "columns of two tasks"),
    _jsonl("scored.jsonl", [{"anchor": "film", "positive": "plot", "score": 0.2}] * 8, "pairs with a score"),
    _jsonl("seen.jsonl", [{"image": "a.png", "text": "a film"}] * 8, "images beside texts"),
    _jsonl("same.jsonl", [{name: [_ASKED] for name in ("chosen", "rejected")}] * 8, "answers that are the same"),
    _csv("three.csv", _GOOD + " ,good\n,good\nfilm,\n", "rows with mistakes of two kinds"),
    _train("a label to rename that no row has", "--set 'label_map={great: good}'"),
    _train("a chat template that is not there", "--set chat_template=own.jinja", until="own.jinja cannot be read"),
    _jsonl(
        "long.jsonl",
        [{"prompt": "the film plot " * 5, "completion": "good"}] * 10,
        "prompts that leave no room for an answer",
        "--model llama --max-length 12",
        _TRL,
    ),
    _jsonl(
        "asked.jsonl",
        [{"messages": [{"role": "user", "content": "film"}]}] * 10,
        "conversations without an answer",
        "--model llama",
        _TRL,
    ),
    _train("data for another task", "--task seq2seq --model t5"),
    _csv(
        "two.csv",
        _GOOD.replace("text,", "sentence,review,").replace("good,", "good,x,"),
        "two columns that may have the texts",
    ),
    _csv("other.csv", "a,b\n1,2\n3,4\n", "columns that fit no task"),
    _train(
        "two files with different columns",
        "--data sentences.csv",
        **{"sentences.csv": _GOOD.replace("text,", "sentence,")},
    ),
    _jsonl("space.jsonl", [{"text": "good", "label": " "}] * 10, "a label of white space"),
    _jsonl("spaces.jsonl", [{"text": "good", "label": ["a", " "]}] * 10, "a label of white space in a list"),
    BadInput("an unknown kind of file", "train --model bert --data reviews.xlsx", {"reviews.xlsx": b"PK"}),
    BadInput("a file that is not there", "train --model bert --data review.csv"),
    BadInput("a folder without images", "train --model vit --data bert"),
    BadInput(
        "images that are not there",
        "train --model vit --data gone.jsonl",
        {
            "gone.jsonl": '{"image": "gone.png", "label": "a"}\n{"image": "lost.png", "label": "b"}\n' * 5,
        },
    ),
    BadInput(
        "images that are no images",
        "train --model vit --data pictures",
        {f"pictures/{name}/{n}.png": "no image" for name in ("blue", "red") for n in range(5)},
        ("PIL", "datasets"),
    ),
    BadInput(
        "labels that the training data does not have",
        ("train --model bert --data reviews.csv --eval-data ugly.csv"),
        {"ugly.csv": "text,label\nfilm,ugly\n"},
    ),
    BadInput("held-out data without training data", "train --model bert --eval-data reviews.csv"),
)
MODELS = (
    _train("a model folder that is not there", "--model ./bertt"),
    _train("a mistyped path of a model", "--model modles/bert", **{"models/bert/config.json": "{}"}),
    _train("a folder without a model", "--model empty", **{"empty/readme.txt": ""}),
    _train("a file in place of a model folder", "--model reviews.csv"),
    _train("a model without a tokenizer", "--model bare"),
    _train("an image model for texts", "--model vit"),
    BadInput("a text model for images", "train --model bert --data images", needs=("PIL",)),
    BadInput(
        "a decoder where an encoder-decoder is needed",
        "train --model llama --task seq2seq --data s2s.jsonl",
        {"s2s.jsonl": '{"source": "the film", "target": "good"}\n' * 10},
    ),
    BadInput(
        "an encoder where a decoder is needed",
        "train --model bert --data lm.jsonl",
        {"lm.jsonl": '{"prompt": "the film", "completion": "good"}\n' * 10},
        _TRL,
    ),
    BadInput(
        "conversations, and a tokenizer without a chat template",
        "train --model plain --data chat.jsonl",
        {
            "chat.jsonl": '{"messages": [{"role": "user", "content": "film"}, {"role": "assistant", "content": "a"}]}\n'
            * 8
        },
        _TRL,
    ),
    _train("damaged weights", "--model damaged", until="'damaged' as a classifier of texts:"),
    _train("a damaged config.json", "--model broken", until="the config of 'broken':"),
    _train("a model type that transformers does not know", "--model alien"),
)
RECIPES = (
    _recipe("a mistyped key of the recipe", "modl: bert\n"),
    _recipe("a value of another type", "max_length: long\n"),
    _recipe("a recipe of another version", "version: 2\n"),
    _recipe("a key that stands twice", "task: regression\ntask: multi-label\n"),
    _recipe("a recipe that is not YAML", "task: [\n", until="cannot be read as .yaml:"),
    _recipe("a mistyped name of a column", "columns: {txt: sentence}\n"),
    _recipe("a mistyped argument of the trainer", "training: {learning_rte: 1e-3}\n"),
    _recipe("an argument that has an option of its own", "training: {output_dir: here}\n"),
    _recipe("a text in place of a learning rate", "training: {learning_rate: fast}\n"),
    _recipe(
        "wrong numbers for the trainer",
        "training: {learning_rate: null, gradient_accumulation_steps: 2.5, per_device_eval_batch_size: 0}\n",
    ),
    _recipe("an upload after the training", "training: {push_to_hub: true}\n"),
    _recipe("a token of the hub", "training: {hub_token: hf_secret}\n"),
    _recipe("an argument that the trainer itself refuses", "training: {batch_eval_metrics: true}\n", until="training:"),
    _recipe("an unknown schedule", "training: {lr_scheduler_type: cosin}\n", until="is not a valid SchedulerType"),
    _recipe("a logger that is not installed", "training: {report_to: nowhere}\n", until="nowhere is not supported"),
    _recipe("a metric that does not exist", "metric: rouge\n"),
    _rewarded("rewards without a function", ""),
    _rewarded("a reward in code", "--set reward=rules.py:score"),
    _rewarded("a reward that is not in its file", "--set reward=rules.py:scores --allow-code"),
    _rewarded("a reward that fails", "--set reward=rules.py:score --allow-code"),
    _rewarded("a reward that is not a number", "--set reward=rules.py:nan --allow-code"),
    _train("a reward for a classifier", "--set reward=rules.py:nan --allow-code", **{"rules.py": _RULES}),
    _train("a metric in code", "--set metric=own.py:score", **{"own.py": "def score(given, right): return 1\n"}),
    BadInput("a recipe that is not there", "train recipes.yaml"),
    _train("prompts to learn, for a task without prompts", "--set train_on_prompts=true"),
    _train("a mistyped setting of the method", "--config '{rnk: 2}'"),
    _train("a rank below 1", "--set rank=0"),
    _train("targets that the model does not have", "--set 'targets=[qery]'"),
    _train("a mistyped task", "--task text-clasification"),
    _train("a mistyped method", "--method toy-lowrank"),
    _train("a mistyped key after --set", "--set learning_rte=1e-3"),
    _train("no value after --set", "--set learning_rate"),
    _train("a learning rate of 0", "--lr 0"),
    _train("a learning rate at which the loss is not finite", "--lr 1e9 --epochs 20 --batch-size 4"),
)
FOLDERS = (
    _train("an output folder with a run", "--out run"),
    _train("an output folder with other files", "--out empty", **{"empty/readme.txt": ""}),
    _train("a file in place of an output folder", "--out reviews.csv"),
    _train("an output folder that cannot be written", "--out reviews.csv/out"),
    _train(
        "an output folder with your own files, named like a run's",
        "--out named --overwrite",
        **{"named/run.json": "{}", "named/logs/mine.txt": ""},
    ),
    _train(
        "a run with a file of your own in a checkpoint",
        "--out changed --overwrite",
        **{"changed/checkpoints/checkpoint-9/mine.txt": ""},
    ),
    _train(
        "an output folder with a recipe of your own", "--out own --overwrite", **{"own/recipe.yaml": "model: bert\n"}
    ),
    BadInput("nothing to resume", "train --out nowhere --resume"),
    BadInput("a run to resume that has ended", "train --out run --resume"),
    BadInput(
        "a run to resume with another recipe",
        "train --resume --model bert --data reviews.csv --method toy-low-rank --out stopped --epochs 2 --batch-size 8",
    ),
    BadInput("a run to resume whose data has changed", "train --out changed --resume"),
    _train("--resume and --overwrite together", "--out stopped --resume --overwrite"),
)
USES = (
    BadInput("a run that is not there", "predict runn --text good"),
    BadInput("a run that has not ended", "predict stopped --text good"),
    BadInput("a model folder in place of a run", "predict bert --text good"),
    BadInput("nothing to predict", "predict run"),
    BadInput("predictions into a file of another kind", "predict run --text good --out predicted.json"),
    BadInput("an empty text to predict", "predict run --text ''"),
    BadInput(
        "rows to predict without the column of texts",
        "predict run --data noted.csv",
        {"noted.csv": "texts\ngood film\n"},
    ),
    BadInput("a column's name without its own", "predict run --data reviews.csv --column text"),
    BadInput("single texts, where pairs of texts were trained", "predict pairs --text good"),
    BadInput("rows to evaluate without labels", "eval run --data bare.csv", {"bare.csv": "text\ngood film\n"}),
    BadInput("rows to evaluate with other labels", "eval run --data ugly.csv", {"ugly.csv": "text,label\nfilm,ugly\n"}),
    BadInput("--text for a task without texts", "predict tokens --text good"),
    BadInput("a base that has moved", "predict moved --text good"),
    BadInput("another base", "predict run --base other --text good"),
    BadInput("a base of another kind", "predict run --base vit --text good"),
    BadInput("a record of another version", "predict newer --text good"),
    BadInput("a damaged record", "predict torn --text good"),
    BadInput("a damaged adapter", "predict cut --text good", until="cannot be read as a safetensors file:"),
    BadInput("a run without its adapter", "predict lost --text good"),
    BadInput("a length for a task that generates nothing", "predict run --text good --new-tokens 8"),
    BadInput("a temperature for a task that generates nothing", "predict run --text good --temperature 0"),
    BadInput("a temperature below 0", "chat run --temperature -1"),
    BadInput("draws without a temperature", "predict run --text good --top-p 0.5"),
    BadInput("a classifier asked to chat", "chat run"),
    BadInput(
        "a folder for the merged model that is not empty", "merge run --base bert --out empty", {"empty/readme.txt": ""}
    ),
    BadInput("a folder for the merged model that cannot be written", "merge run --base bert --out reviews.csv/merged"),
)
GOING_ON = (
    _train("an adapter to go on from that is not there", "--out more --from runn"),
    _train("a model folder in place of an adapter", "--out more --from other"),
    _train("a run to go on from without its adapter", "--out more --from lost"),
    BadInput("an adapter whose base has moved", "train --data reviews.csv --out more --from moved"),
    BadInput(
        "an adapter that names no base",
        "train --data reviews.csv --out more --from checkpoint",
    ),
    _train("another method than the adapter's", "--out more --from run --method lora"),
    _train("settings for an adapter that has its own", "--out more --from run --config '{rank: 2}'"),
    _train("another base than that of the adapter to go on from", "--out more --from run --model other"),
    BadInput(
        "classes that the adapter's head does not have",
        "train --model bert --data third.csv --out more --from run",
        {"third.csv": _GOOD + "very good film,great\n"},
    ),
)
_CONVERT = "convert lone --to toy --base bert --out converted"
ADAPTERS = (
    BadInput("an adapter to convert that is not there", "convert gone --to toy --base bert --out converted"),
    BadInput("a model in place of an adapter", "convert llama --to toy --base bert --out converted"),
    BadInput(
        "a file of another kind in place of an adapter", "convert reviews.csv --to toy --base bert --out converted"
    ),
    BadInput(
        "an adapter in a format that is not known",
        "convert images --to toy --base bert --out converted",
        needs=("PIL",),
    ),
    BadInput(
        "a damaged adapter to convert",
        "convert cut/adapter.safetensors --to toy --base bert --out converted",
        until="cannot be read as a safetensors file:",
    ),
    BadInput(
        "a damaged file of another format",
        "convert torn-toy --to tunerkit --base bert --out converted",
        {"torn-toy/toy.json": "{"},
        until="is no toy adapter:",
    ),
    BadInput("a mistyped format", "convert lone --to toi --base bert --out converted"),
    BadInput("a format in capitals", "convert lone --to TOY --base bert --out converted"),
    BadInput("an unknown option of a format", f"{_CONVERT} --set bas=bert"),
    BadInput("an option of a format with a wrong type", f"{_CONVERT} --set labels=many"),
    BadInput("an option of a format out of its range", f"{_CONVERT} --set labels=-1"),
    BadInput("an option of a format without a value", f"{_CONVERT} --set labels"),
    BadInput("options for tunerkit's own file", "convert lone-toy --to tunerkit --base bert --out converted --set a=1"),
    BadInput(
        "an adapter that is in tunerkit's format already", "convert lone --to tunerkit --base bert --out converted"
    ),
    BadInput("an adapter converted onto itself", "convert lone-toy --to toy --base bert --out lone-toy"),
    BadInput(
        "a destination with other files",
        "convert lone --to toy --base bert --out full --overwrite",
        {"full/toy.json/readme.txt": ""},
    ),
    BadInput(
        "a destination that is not empty", "convert lone --to toy --base bert --out filled", {"filled/readme.txt": ""}
    ),
    BadInput("a file that is there already", "convert lone --to toy --base bert --out reviews.csv"),
    BadInput("a destination with a model", "convert lone --to toy --base bert --out llama --overwrite"),
    BadInput("a destination that cannot be written", "convert lone --to toy --base bert --out reviews.csv/out"),
    BadInput("an adapter that does not say what its base is", "convert lone --to toy --out converted"),
    BadInput("a base of an adapter that is not there", "convert lone --to toy --base ./gone --out converted"),
    BadInput("a file in place of a base", "convert lone --to toy --base reviews.csv --out converted"),
    BadInput("a folder without a model in place of a base", "convert lone --to toy --base run --out converted"),
    BadInput(
        "a base of an adapter with a damaged config",
        "convert lone --to toy --base broken --out converted",
        until="cannot load 'broken':",
    ),
    BadInput("another base than that of the adapter to convert", "convert lone --to toy --base vit --out converted"),
    BadInput("a base with other shapes than the adapter's", "convert lone --to toy --base other --out converted"),
    BadInput(
        "a mistyped task of an adapter", "convert lone --to toy --base bert --out converted --task text-clasification"
    ),
    BadInput(
        "a task that the base has no class for",
        "verify lone lone-toy --base vit --task causal-lm",
        until="as AutoModelForCausalLM:",
    ),
    BadInput("a tolerance below 0", "verify lone lone --base bert --tolerance -1"),
    BadInput("nothing to verify against", "verify lone gone --base bert"),
    BadInput("an adapter verified against a model of another kind", "verify lone llama --base bert"),
    BadInput("adapters compared over another base", "diff lone lone-toy --base vit"),
    BadInput("an adapter compared with nothing", "diff lone gone --base bert"),
    BadInput(
        "a damaged adapter to show", "show cut/adapter.safetensors", until="cannot be read as a safetensors file:"
    ),
    BadInput("nothing to show", "show gone"),
    BadInput("a damaged record to show", "show torn"),
    BadInput("nothing to merge", "merge gone --out plain-new"),
    BadInput("a task that a run's record does not have", "merge run --out plain-new --task causal-lm"),
    BadInput("an adapter to merge that does not say what its base is", "merge lone --out plain-new"),
)
_HALF = {"text": "good \ud800", "label": "good"}
TRAINING = (
    _train("a seed of more than 32 bits", "--set training.seed=4294967296"),
    _train("a rate of Adam that is none", "--set training.adam_beta1=2.0", until="Invalid beta parameter"),
    _train("an optimizer that is not installed", "--set training.optim=lomo", until="You need to install"),
    _train(
        "a schedule that ends above the rate",
        "--set training.lr_scheduler_type=polynomial --set 'training.lr_scheduler_kwargs={lr_end: 1.0}'",
        until="lr_end (1.0) must be smaller",
    ),
    _train("noise that is not a number", "--set training.neftune_noise_alpha=.nan"),
    _train("transformers' search for overflows", "--set training.debug=underflow_overflow"),
    _train("no full batch", "--set training.dataloader_drop_last=true --batch-size 100"),
    _jsonl("surrogate.jsonl", [_HALF], "half of a character in a text"),
    BadInput("half of a character on the command line", "predict run --text 'good \ud800'"),
    _train("a folder whose name is not UTF-8", "--out 'new\udcff'"),
)
SECTIONS = {
    "Data": DATA,
    "Values that would fail while training": TRAINING,
    "Models": MODELS,
    "Recipes and options": RECIPES,
    "Output folders": FOLDERS,
    "Predict, evaluate, merge": USES,
    "Adapters of any format": ADAPTERS,
    "Go on training": GOING_ON,
}
CASES = {case.what: case for cases in SECTIONS.values() for case in cases}


def make_folder(folder: Path) -> None:
    """Write the models, the data and the runs that the commands name. The working folder is ``folder``."""
    save_tiny_classifier(folder / "bert")
    save_tiny_llama(folder / "llama")
    save_tiny_llama(folder / "plain", template=None)
    save_tiny_t5(folder / "t5")
    save_tiny_vit(folder / "vit")
    for name in ("bare", "damaged", "broken", "alien", "other"):
        shutil.copytree(folder / "bert", folder / name)
    for file in (folder / "bare").glob("*token*"):
        file.unlink()
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "broken" / "config.json").write_text("{")
    (folder / "alien" / "config.json").write_text('{"model_type": "alien", "architectures": ["Alien"]}')
    config = json.loads((folder / "other" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    (folder / "reviews.csv").write_text(_GOOD)
    if importlib.util.find_spec("PIL") is not None:
        from PIL import Image

        for name, color in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            (folder / "images" / name).mkdir(parents=True)
            for number in range(6):
                Image.new("RGB", (SIDE, SIDE), color).save(folder / "images" / name / f"{number}.png")
    _make_runs(folder)
    _make_adapters(folder)


def _make_runs(folder: Path) -> None:
    done = run(BadInput("", "train --model bert --data reviews.csv --out run"))
    assert done.exit_code == 0, done.output
    for name in ("stopped", "changed", "tokens", "pairs", "moved", "newer", "torn", "cut", "lost"):
        shutil.copytree(folder / "run", folder / name)
    for name in ("stopped", "changed"):
        (folder / name / "run.json").unlink()
    (folder / "changed" / "data.sha256").write_text(f"{64 * '0'}  {folder / 'reviews.csv'}\n")
    record = json.loads((folder / "run" / "run.json").read_text())
    changes: dict[str, dict[str, object]] = {
        "tokens": {"task": "token-classification"},
        "pairs": {"columns": ["text", "text_pair", "label"]},
        "moved": {"model": {**record["model"], "source": str(folder / "old" / "bert")}},
        "newer": {"version": 2},
    }
    for name, change in changes.items():
        (folder / name / "run.json").write_text(json.dumps({**record, **change}))
    (folder / "torn" / "run.json").write_text("{")
    (folder / "lost" / "adapter.safetensors").unlink()
    (folder / "checkpoint").mkdir()
    shutil.copy(folder / "run" / "adapter.safetensors", folder / "checkpoint")
    adapter = folder / "cut" / "adapter.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-10])


def _make_adapters(folder: Path) -> None:
    """An adapter without a record, in tunerkit's format and in a toy one. Neither says what its base is."""
    with registered(ProductPlugin()):
        base = Base(str(folder / "bert"), "AutoModelForSequenceClassification")
        model = trained(whole(base), targets=["query"], train_modules=["pooler.dense"])
        tunerkit.save(model, folder / "lone")
        tunerkit.unwrap(model)
        tunerkit.export(trained(model, targets=["query"]), folder / "lone-toy", "toy")


def run(case: BadInput) -> Result:
    """Run a command in this process, in the working folder."""
    for name, content in case.files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    first, *rest = shlex.split(case.command)
    arguments = [first, *(shlex.split(_TRAIN) if first == "train" and "--resume" not in rest else []), *rest]
    with registered(LowRankPlugin(), ProductPlugin()):
        return CliRunner().invoke(build(), arguments)


def shown_message(done: Result) -> str:
    """What a command printed on stderr, without what differs between machines."""
    text = done.stderr.removeprefix("tunerkit: ").removesuffix("\n").replace(str(Path.cwd()), "")
    text = re.sub(r"the loss is (nan|inf) at step \d+", "the loss is nan at step 4", text)
    text = re.sub(r"\(learning rate [\d.e+]+\)", "(learning rate 8.5e+08)", text)
    text = re.sub(r"installed: [^;]*", "installed: ...", text)
    return re.sub(r"(tunerkit|transformers) \d[\w.]*", r"\1 X", text)


def row_of(case: BadInput, message: str) -> str:
    """A row of the page's tables. What a library adds to a message changes with its version, and is left out."""
    if case.until:
        message = f"{message.partition(case.until)[0]}{case.until} ..."
    return f"| {case.what} | {message} |"


def page() -> str:
    """The whole page. The working folder is one of `make_folder`."""
    parts = [_INTRODUCTION]
    for heading, cases in SECTIONS.items():
        rows = [row_of(case, shown_message(run(case))) for case in cases]
        parts.append("\n".join([f"## {heading}\n", "| mistake | message |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        os.chdir(root)
        make_folder(Path(root))
        PAGE.write_text(page(), encoding="utf-8")
