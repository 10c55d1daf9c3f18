"""Language models by the command: which rows and tokens count, what is said of them, and what a dry run checks."""

import html
import importlib.util
import json
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast
from trl.trainer.sft_trainer import SFTTrainer

import tunerkit
from tests.support.tiny_classifier import save_tiny_classifier
from tests.support.tiny_models import TEMPLATE, save_tiny_llama, save_tiny_t5
from tests.support.toy_growing import GrowingPlugin
from tests.support.train_command import collapsing, command, record_of, signalled, succeeded, write_rows
from tunerkit.errors import ConfigError
from tunerkit_cli.folder import RunFolder
from tunerkit_cli.outputs import OutputError
from tunerkit_cli.preparing import resuming, session as preparing, starting
from tunerkit_cli.recipes.recipe import Recipe
from tunerkit_cli.rows import DataError
from tunerkit_cli.tasks import task_of
from tunerkit_cli.tasks.turns import NOT_LEARNED, dataset_of, encode_turns
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin
from tunerkit_transformers.pretrained import load_pretrained
from tunerkit_transformers.savings import Saving

LONG = "the film plot " * 5  # 16 tokens with the one that begins a text
MARKED = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|> "
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s> {% endgeneration %}"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@pytest.fixture(autouse=True, scope="module")
def _toys() -> Iterator[None]:
    with registered(LowRankPlugin(), GrowingPlugin()):
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder with 64 positions, whose template marks no turns."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama")


def answered(prompt: str = "the film ", completion: str = "very good") -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


def turns(*contents: str) -> list[dict[str, str]]:
    """Messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def written(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def arguments_of(model: Path, data: Path, *more: object, evaluated: Path | None = None) -> list[object]:
    """The arguments of a short run of one epoch, whose held-out rows are those of training unless said.

    In fp32, as what its results are compared with.
    """
    return [
        *("train", "--method", "toy-low-rank", "--config", "{rank: 2}", "--lr", "0.05", "--epochs", "1"),
        *("--precision", "fp32"),
        *("--model", model, "--data", data, "--eval-data", evaluated or data, "--batch-size", "4", *more),
    ]


# --- rows that leave nothing to learn ---


def test_rows_whose_prompt_fills_the_limit_are_counted_as_left_out(llama: Path, tmp_path: Path) -> None:
    """The description, the record, ``show`` and ``eval`` count what is trained, say what is left out, and why."""
    data = written(tmp_path / "data.jsonl", [*[answered()] * 9, *[answered(LONG)] * 3])
    out = tmp_path / "out"
    said = succeeded(*arguments_of(llama, data, "--max-length", "12", "--out", out)).output
    assert "lengths: 6 tokens in the middle, 19 at most (cut at 12 tokens; 3 rows are longer)\n" in said
    why = "which leave nothing to learn (3: the prompt fills max_length); train with --max-length 17 or more (19 for"
    assert f"left out: 3 of 12 training rows, {why}" in said
    assert f"left out: 3 of 12 held-out rows, {why}" in said
    record = record_of(out)
    assert record["rows"] == {"train": 9, "eval": 9}
    assert record["left_out"] == {part: {"the prompt fills max_length": 3} for part in ("train", "eval")}
    shown = " ".join(succeeded("show", out).output.split())
    assert "rows 9 train, 9 eval left out 3 train: the prompt fills max_length; 3 eval: the prompt fills" in shown
    found = json.loads(succeeded("eval", out, "--data", data).output)
    assert (found["rows"], found["left_out"]) == (9, {"the prompt fills max_length": 3})


def test_a_row_at_the_limit_is_not_cut_and_one_beyond_is(llama: Path, tmp_path: Path) -> None:
    """Of 6 tokens, the limit 6 cuts none and the limit 5 cuts each; no row is left out."""
    data = written(tmp_path / "data.jsonl", [answered()] * 8)
    for limit, longer in ((6, 0), (5, 8)):
        said = succeeded(*arguments_of(llama, data, "--max-length", limit, "--out", tmp_path / "x", "--dry-run")).output
        assert f"(cut at {limit} tokens; {longer} rows are longer)\n" in said
        assert "left out" not in said


@pytest.mark.parametrize("task", ["causal-lm", "preference"])
def test_if_no_row_is_left_one_error_says_which_length_is_needed(task: str, llama: Path, tmp_path: Path) -> None:
    """Before training, for the training rows and for the held-out rows, and in ``eval``; never a traceback."""

    def row(prompt: str) -> dict[str, Any]:
        return answered(prompt) if task == "causal-lm" else {"prompt": prompt, "chosen": "good", "rejected": "bad"}

    short = written(tmp_path / "short.jsonl", [row("the film ")] * 8)
    long = written(tmp_path / "long.jsonl", [row(LONG)] * 8)
    limit, out = ("--task", task, "--max-length", "12"), tmp_path / "out"
    for data, evaluated in ((long, short), (short, long)):
        done = command(*arguments_of(llama, data, *limit, "--out", tmp_path / "no", evaluated=evaluated))
        assert done.exit_code == 2
        assert f"{long}: no row has anything to learn: each prompt fills the 12 tokens" in done.stderr
        assert "the longest prompt has 16; train with --max-length 17 or more" in done.stderr
        assert done.stderr.count("\n") == 1
    succeeded(*arguments_of(llama, short, *limit, "--out", out))
    done = command("eval", out, "--data", long)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "the longest prompt has 16; train with --max-length 17 or more" in done.stderr


def test_preferences_with_too_long_prompts_are_counted_too(llama: Path, tmp_path: Path) -> None:
    """TRL's trainer for DPO leaves them out as well."""
    rows = [{"prompt": prompt, "chosen": "good", "rejected": "bad"} for prompt in (*["the film "] * 6, LONG, LONG)]
    data = written(tmp_path / "data.jsonl", rows)
    out = tmp_path / "out"
    said = succeeded(*arguments_of(llama, data, "--max-length", "12", "--out", out)).output
    assert "left out: 2 of 8 training rows, which leave nothing to learn (2: the prompt fills max_length)" in said
    assert record_of(out)["rows"] == {"train": 6, "eval": 6}


def test_the_lengths_of_preferences_are_those_of_the_longer_answer(llama: Path, tmp_path: Path) -> None:
    """With the prompt and the end: here 3, and 1 or 2, and 1."""
    rows = [{"prompt": "the film ", "chosen": "good", "rejected": "very bad"}] * 8
    data = written(tmp_path / "data.jsonl", rows)
    said = succeeded(*arguments_of(llama, data, "--max-length", "5", "--out", tmp_path / "x", "--dry-run")).output
    assert "lengths: 6 tokens in the middle, 6 at most (cut at 5 tokens; 8 rows are longer)\n" in said


def test_no_length_helps_where_the_prompt_has_more_tokens_than_the_model_positions(llama: Path, tmp_path: Path) -> None:
    """64 here; a limit above them is cut to them, with a note."""
    data = written(tmp_path / "data.jsonl", [answered("the film plot " * 30)] * 8)
    done = command(*arguments_of(llama, data, "--out", tmp_path / "out", "--max-length", "200"))
    assert "note: max_length is 200, and the model has positions for 64 tokens: rows are cut there" in done.stdout
    assert "the longest prompt has 91; the model has positions for 64: shorten the prompts" in done.stderr


def test_no_row_is_longer_than_the_model_has_positions(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, in the evaluation and in ``eval``, whatever max_length says."""
    seen: list[int] = []
    forward = torch.nn.Embedding.forward

    def noting(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids.shape[1])
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", noting)
    data = written(tmp_path / "data.jsonl", [{"text": "the film plot " * 40}] * 8)
    for number, limit in enumerate(("200", "null")):
        out = tmp_path / f"out{number}"
        succeeded(*arguments_of(llama, data, "--set", f"training.max_length={limit}", "--out", out))
        succeeded("eval", out, "--data", data)
    assert max(seen) == 64


# --- the assistant's turns ---


def test_packed_rows_that_would_read_each_other_are_refused(llama: Path, tmp_path: Path) -> None:
    """As attention that does not know where a row begins would let them."""
    data = written(tmp_path / "rows.jsonl", [answered()] * 20)
    packed = [*arguments_of(llama, data, "--set", "packing=true"), "--out", tmp_path / "out"]
    with mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None):
        refused = command(*packed)
    assert "training.packing: the attention of LlamaForCausalLM reads across the rows" in refused.stderr
    assert not (tmp_path / "out").exists()
    succeeded(*packed)


def learned(model: Path, messages: list[dict[str, str]]) -> list[str]:
    """The words of a conversation that are learned."""
    loaded = load_pretrained("causal-lm", str(model))
    (row,) = encode_turns([messages], loaded)
    whole = loaded.processor.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert row["input_ids"] == whole
    assert all(label in (NOT_LEARNED, each) for each, label in zip(whole, row["labels"], strict=True))
    return [loaded.processor.decode([label]) for label in row["labels"] if label != NOT_LEARNED]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["no marks", "marks"])
def test_each_turn_of_the_assistant_is_learned_with_its_end_and_nothing_else(template: str, tmp_path: Path) -> None:
    """By the template's marks, or without them by the turns' own text, also where a user says the same words."""
    model = save_tiny_llama(tmp_path / "llama", template=template)
    said = turns("good", "very good", "the film", "not bad", "very good", "a plot")
    assert learned(model, said) == ["very", "good", "</s>", "not", "bad", "</s>", "a", "plot", "</s>"]
    assert learned(model, [{"role": "system", "content": "bad"}, *said[:2]]) == ["very", "good", "</s>"]
    assert learned(model, turns("the film")) == []


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["no marks", "marks"])
def test_a_tokenizer_in_python_finds_the_same_turns(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not say where in a text its tokens are."""
    model = save_tiny_llama(tmp_path / "llama", template=template)
    said = turns("good", "very good", "the film", "not bad")
    wanted = learned(model, said)
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    assert learned(model, said) == wanted == ["very", "good", "</s>", "not", "bad", "</s>"]


def test_marks_that_leave_out_the_end_of_a_turn_do_not_count(tmp_path: Path) -> None:
    """A model that does not learn to end its turn would never stop."""
    endless = MARKED.replace("{{ m.content }} </s> {% endgeneration %}", "{{ m.content }} {% endgeneration %}</s> ")
    model = save_tiny_llama(tmp_path / "llama", template=endless)
    vocabulary = model / "tokenizer.json"  # TRL's check asks with this word, and takes an unknown token for an end
    vocabulary.write_text(vocabulary.read_text().replace('"very"', '"dummy"'))
    assert learned(model, turns("the film", "not bad")) == ["not", "bad", "</s>"]


def test_a_template_that_writes_earlier_turns_in_another_way_is_understood(tmp_path: Path) -> None:
    """As Qwen3's, which shows an empty thought before the last answer only; the model has to write it too."""
    thinking = TEMPLATE.replace(
        "<|{{ m.role }}|> ", "<|{{ m.role }}|> {% if m.role == 'assistant' and loop.last %}<|system|> {% endif %}"
    )
    model = save_tiny_llama(tmp_path / "llama", template=thinking)
    found = learned(model, turns("the film", "very good", "a plot", "not bad"))
    assert found == ["very", "good", "</s>", "<|system|>", "not", "bad", "</s>"]


def test_a_template_that_hides_an_answer_is_one_error_with_the_way_out(tmp_path: Path) -> None:
    """Also if it raises an error of its own, as many do where roles do not alternate."""
    for template, why in (
        ("{% for m in messages %}{{ m.role }} {% endfor %}", "it does not show message 2 as one text"),
        (TEMPLATE + "{{ raise_exception('no such roles') }}", "no such roles"),
    ):
        model = save_tiny_llama(tmp_path / why[:2], template=template)
        data = written(tmp_path / "data.jsonl", [{"messages": turns("the film", "good")}] * 8)
        done = command(*arguments_of(model, data, "--out", tmp_path / "out"))
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert f"does not take the conversation that begins with 'the film': {why}" in done.stderr
        assert "--set train_on_prompts=true" in done.stderr


TOOLS = (
    "{{ bos_token }}{% if tools %}<|system|> {{ tools[0].function.name }} {% endif %}{% for m in messages %}"
    "<|{{ m.role }}|> {% for call in m.tool_calls %}{{ call.function.name }} {{ call.function.arguments.title }} "
    "{% else %}{{ m.content }} {% endfor %}{% if m.role == 'assistant' %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def calling(title: str = "plot") -> list[dict[str, Any]]:
    """A conversation in which the assistant calls a tool, and then answers."""
    call = {"type": "function", "function": {"name": "very", "arguments": {"title": title}}}
    tool = {"type": "function", "function": {"name": "very", "parameters": {"type": "object"}}}
    return [
        {"role": "user", "content": "the film", "tools": [tool]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "not bad"},
    ]


def test_a_call_of_a_tool_is_learned_as_an_answer_is(tmp_path: Path) -> None:
    """With its end; a template that does not show it is an error."""
    model = save_tiny_llama(tmp_path / "llama", template=TOOLS)
    loaded = load_pretrained("causal-lm", str(model))
    (row,) = encode_turns([calling()], loaded)
    words = [loaded.processor.decode([label]) for label in row["labels"] if label != NOT_LEARNED]
    assert words == ["very", "plot", "</s>", "not", "bad", "</s>"]
    assert loaded.processor.decode(row["input_ids"]).startswith("<s> <|system|> very <|user|> the film")
    # As Qwen3's, which shows a thought before the last answer only.
    loaded.processor.chat_template = TOOLS.replace(
        "<|{{ m.role }}|> ", "<|{{ m.role }}|> {% if m.role == 'assistant' and loop.last %}a {% endif %}"
    )
    (row,) = encode_turns([calling()], loaded)
    words = [loaded.processor.decode([label]) for label in row["labels"] if label != NOT_LEARNED]
    assert words == ["very", "plot", "</s>", "a", "not", "bad", "</s>"]
    loaded.processor.chat_template = TEMPLATE + "{% for m in messages %}{{ m.tool_calls + 'a' }}{% endfor %}"
    with pytest.raises(DataError, match="does not take the conversation"):
        encode_turns([calling()], loaded)
    loaded.processor.chat_template = TEMPLATE
    with pytest.raises(DataError, match="it does not show the tool calls of message 2 as one text"):
        encode_turns([calling()], loaded)


@pytest.mark.parametrize("whole", [False, True])
def test_conversations_with_tools_are_trained_and_predicted(whole: bool, tmp_path: Path) -> None:
    """Whole rows too, which TRL tokenizes: each call keeps its own arguments."""
    model = save_tiny_llama(tmp_path / "llama", template=TOOLS)
    rows = [{"messages": [{k: v for k, v in m.items() if k != "tools"} for m in calling()]} for _ in range(8)]
    rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"title": "film", "year": 3}
    for row in rows:
        row["tools"] = calling()[0]["tools"]
    data = written(tmp_path / "data.jsonl", rows)
    options = ["--set", f"train_on_prompts={str(whole).lower()}", "--out", tmp_path / "out"]
    done = succeeded(*arguments_of(model, data, *options))
    assert "columns: messages (messages + tools)\n" in done.output
    answers = succeeded("predict", tmp_path / "out", "--data", data).stdout.splitlines()
    assert len(answers) == 8
    kept = dataset_of([{"messages": calling()}, {"messages": turns("a", "b")}])
    assert kept["messages"][1] == turns("a", "b")
    assert json.loads(kept["tools"][0]) == calling()[0]["tools"]


@pytest.mark.parametrize(
    ("chat", "lost"),
    [
        ([{"role": "system", "content": "very bad"}, *turns("the film", "good")], "the system prompt"),
        (calling(), "the tools"),
    ],
)
@pytest.mark.parametrize("form", ["messages", "preference"])
def test_a_template_that_loses_what_a_conversation_begins_with_is_refused(
    chat: list[dict[str, Any]], lost: str, form: str, tmp_path: Path
) -> None:
    """The model would never see it; another template is passed as a file, which the run keeps."""
    silent = TOOLS.replace("{% if tools %}", "{% if false %}").replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    )
    model = save_tiny_llama(tmp_path / "llama", template=silent)
    row: dict[str, Any] = {"messages": [{k: v for k, v in m.items() if k != "tools"} for m in chat]}
    if form == "preference":
        row = {
            "chosen": row["messages"],
            "rejected": [*row["messages"][:-1], {"role": "assistant", "content": "bad film"}],
        }
    if "tools" in chat[0]:
        row["tools"] = chat[0]["tools"]
    data = written(tmp_path / "data.jsonl", [row] * 8)
    arguments = arguments_of(model, data, "--out", tmp_path / "out")
    done = command(*arguments)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert f"leaves out {lost} of the conversation that begins with" in done.stderr
    (tmp_path / "own.jinja").write_text(TOOLS)
    succeeded(*arguments, "--set", f"chat_template={tmp_path / 'own.jinja'}")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TOOLS
    (tmp_path / "own.jinja").unlink()
    succeeded("predict", tmp_path / "out", "--data", data)


def test_a_chat_template_is_a_file_that_writes_messages(llama: Path, tmp_path: Path) -> None:
    """Otherwise one error before the model is loaded."""
    data = written(tmp_path / "data.jsonl", [{"messages": turns("the film", "good")}] * 8)
    (tmp_path / "empty.jinja").write_text("{{ bos_token }}")
    model = tmp_path / "no-weights"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "broken.jinja").write_text("{% for message in messages %}\n{{ message.content }")
    (tmp_path / "text.jinja").write_text(data.read_text())
    for name, message in (
        ("gone", "cannot be read"),
        ("empty", "writes no messages"),
        ("text", "writes no messages"),
        ("broken", "broken.jinja is no template of Jinja: line 2: unexpected '}'; correct it, or pass"),
    ):
        options = ["--set", f"chat_template={tmp_path / name}.jinja", "--out", tmp_path / "out"]
        done = command(*arguments_of(model, data, *options))
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr


def test_a_conversation_that_the_template_refuses_is_one_error(llama: Path, tmp_path: Path) -> None:
    """Where the trainer reads it, and in predictions; many templates refuse roles that do not alternate."""
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('a user begins') }}{% endif %}" + TEMPLATE
    model = save_tiny_llama(tmp_path / "llama", template=strict)
    chats = [{"messages": turns("the film", "good")}, {"messages": turns("a", "b", "c")[1:]}]
    good, bad = (
        written(tmp_path / f"{name}.jsonl", [chats[0]] * 7 + [last]) for name, last in zip("ab", chats, strict=True)
    )
    done = command(*arguments_of(model, bad, "--set", "train_on_prompts=true", "--out", tmp_path / "out"))
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "refuses a conversation: a user begins; change the messages" in done.stderr
    succeeded(*arguments_of(model, good, "--out", tmp_path / "out"))
    done = command("predict", tmp_path / "out", "--data", bad)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "refuses the conversation that begins with 'b': a user begins; change the messages" in done.stderr


def test_conversations_train_and_score_the_assistant_alone_unless_prompts_are_asked_for(
    llama: Path, tmp_path: Path
) -> None:
    """A line says which; the recipe and ``eval`` keep it. The prompts here can't be guessed, and the answers can."""
    rows = [{"messages": turns(text, "good")} for text in ("the", "film", "a", "plot", "very", "bad", "not", "film")]
    data = written(tmp_path / "data.jsonl", rows)
    losses = {}
    for name, asked in (("answers", ()), ("whole", ("--set", "train_on_prompts=true"))):
        out = tmp_path / name
        said = succeeded(*arguments_of(llama, data, "--epochs", "20", "--out", out, *asked)).output
        line = "trains on whole rows, prompts included" if asked else "trains on the assistant's turns only; --set"
        assert line in said
        assert yaml.safe_load((out / "recipe.yaml").read_text())["train_on_prompts"] is bool(asked)
        losses[name] = record_of(out)["metrics"]["loss"]
        found = json.loads(succeeded("eval", out, "--data", data, "--batch-size", "8").output)
        assert found["loss"] == pytest.approx(losses[name], rel=1e-3)
        assert losses[name] == pytest.approx(by_hand(out, rows, prompts=bool(asked)), rel=1e-3)
    assert losses["answers"] < losses["whole"] / 2


def by_hand(out: Path, rows: Sequence[dict[str, Any]], *, prompts: bool) -> float:
    """The mean loss of the rows' answers and ends, or of all tokens. A row is <s> <|user|> X <|assistant|> Y </s>."""
    model, tokenizer = tunerkit.from_folder(out)
    texts = [tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"] for row in rows]
    ids = torch.tensor(texts)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return float(each.mean() if prompts else each[:, 3:].mean())


def test_a_conversation_without_an_answer_is_left_out_and_counted(llama: Path, tmp_path: Path) -> None:
    """If no conversation has one, it is an error."""
    data = written(tmp_path / "data.jsonl", [{"messages": turns("the film", "good")}, {"messages": turns("a")}] * 4)
    out = tmp_path / "out"
    said = succeeded(*arguments_of(llama, data, "--out", out)).output
    assert "left out: 4 of 8 training rows, which leave nothing to learn (4: no assistant's turn)\n" in said
    assert record_of(out)["left_out"]["train"] == {"no assistant's turn": 4}
    none = written(tmp_path / "none.jsonl", [{"messages": turns("the film")}] * 8)
    done = command(*arguments_of(llama, none, "--out", tmp_path / "no"))
    assert f"{none}: no conversation has a turn of the assistant" in done.stderr


def test_completions_learn_their_prompts_if_asked(llama: Path, tmp_path: Path) -> None:
    """And TRL's own argument means the same, as in recipes of earlier versions."""
    data = written(tmp_path / "data.jsonl", [answered()] * 8)
    losses: list[float] = []
    for asked in ("train_on_prompts=true", "training.completion_only_loss=false", "train_on_prompts=false"):
        out = tmp_path / f"out{len(losses)}"
        said = succeeded(*arguments_of(llama, data, "--set", asked, "--out", out)).output
        assert ("prompts included" in said) is (len(losses) < 2)
        losses.append(record_of(out)["metrics"]["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_a_restarted_run_learns_the_same_tokens(llama: Path, tmp_path: Path) -> None:
    """The turns of the assistant alone, before and after the loss was lost."""
    data = written(tmp_path / "data.jsonl", [{"messages": turns("the film plot very bad", "good")}] * 200)
    out = tmp_path / "out"
    learned: list[int] = []
    step = SFTTrainer.training_step

    def counted(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        learned.append(int((inputs["labels"] != -100).sum()))
        return step(self, model, inputs, *rest)

    settings = (
        "--epochs",
        "3",
        "--set",
        "on_collapse=restart",
        "--set",
        "save_steps=10",
        "--set",
        "eval_strategy='no'",
    )
    with collapsing(61, by=10_000), mock.patch.object(SFTTrainer, "training_step", counted):
        succeeded(*arguments_of(llama, data, *settings, "--out", out))
    assert len(record_of(out)["restarts"]) == 1
    assert len({*learned}) == 1


@pytest.mark.parametrize("task", ["causal-lm", "preference"])
def test_eval_computes_in_the_precision_of_the_run(task: str, llama: Path, tmp_path: Path) -> None:
    """It finds the run's own metrics on the same rows: in bf16, exactly those; fp32 would round less."""
    row = {"prompt": "the film ", "chosen": "very good", "rejected": "bad"}
    data = written(tmp_path / "data.jsonl", [row if task == "preference" else answered()] * 8)
    out = tmp_path / "out"
    batch = ("--set", "per_device_eval_batch_size=4")
    succeeded(*arguments_of(llama, data, "--task", task, "--precision", "bf16", *batch, "--out", out))
    found = json.loads(succeeded("eval", out, "--data", data, "--batch-size", "4").output)
    metrics = record_of(out)["metrics"]
    assert {name: found[name] for name in metrics} == metrics
    record = {**record_of(out), "precision": "fp32"}
    (out / "run.json").write_text(json.dumps(record))
    other = json.loads(succeeded("eval", out, "--data", data, "--batch-size", "4").output)
    assert other["loss"] != found["loss"]


def test_what_the_trainer_would_change_of_the_template_is_refused(llama: Path, tmp_path: Path) -> None:
    """It would do so after the turns were found."""
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    data = written(tmp_path / "data.jsonl", [{"messages": turns("the film", "good")}] * 8)
    own = ("--set", f"chat_template_path={tmp_path / 'own.jinja'}")
    done = command(*arguments_of(llama, data, *own, "--out", tmp_path / "out"))
    assert done.exit_code == 2
    assert "training.chat_template_path: is read after the assistant's turns are found; write it into" in done.stderr
    succeeded(*arguments_of(llama, data, *own, "--set", "train_on_prompts=true", "--out", tmp_path / "out"))


def test_contradicting_keys_and_tasks_without_prompts_are_errors(llama: Path, tmp_path: Path) -> None:
    """Each names both keys, or the task."""
    chats = written(tmp_path / "chats.jsonl", [{"messages": turns("the film", "good")}] * 8)
    pairs = written(tmp_path / "pairs.jsonl", [{"prompt": "the film ", "chosen": "good", "rejected": "bad"}] * 8)
    both = ("--set", "train_on_prompts=true", "--set", "training.assistant_only_loss=true")
    done = command(*arguments_of(llama, chats, *both, "--out", tmp_path / "out"))
    assert done.exit_code == 2
    assert "train_on_prompts is true, and so is training.assistant_only_loss, which is its opposite" in done.stderr
    done = command(*arguments_of(llama, pairs, "--set", "train_on_prompts=true", "--out", tmp_path / "out"))
    assert done.exit_code == 2
    assert "train_on_prompts: preference learns no prompts; leave the key out" in done.stderr
    texts = written(tmp_path / "texts.jsonl", [{"text": "the film"}] * 8)
    done = command(*arguments_of(llama, texts, "--set", "train_on_prompts=true", "--out", tmp_path / "out"))
    assert "train_on_prompts: rows of texts have no prompts; leave the key out" in done.stderr


def test_a_run_of_an_earlier_version_is_resumed_and_evaluated_as_it_was_trained(llama: Path, tmp_path: Path) -> None:
    """Its recipe has no such key: conversations were learned as a whole, also if it is resumed by the same options."""
    rows = [{"messages": turns(text, "good")} for text in ("the", "film", "a", "plot", "very", "bad", "not", "film")]
    data = written(tmp_path / "data.jsonl", rows)
    whole = tmp_path / "whole"
    arguments = arguments_of(llama, data)
    succeeded(*arguments, "--set", "train_on_prompts=true", "--out", whole)
    wanted = record_of(whole)["metrics"]["loss"]
    for number, again in enumerate((("train",), arguments)):
        out = tmp_path / f"out{number}"
        succeeded(*arguments, "--set", "train_on_prompts=true", "--out", out)
        (out / "run.json").unlink()
        for checkpoint in (out / "checkpoints").glob("checkpoint-*"):
            (checkpoint / "trainer_state.json").unlink()  # it begins again
        recipe = yaml.safe_load((out / "recipe.yaml").read_text())
        (out / "recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in recipe.items() if k != "train_on_prompts"}))
        assert "prompts included" in succeeded(*again, "--out", out, "--resume").output
        record = record_of(out)
        assert record["metrics"]["loss"] == wanted
        del record["recipe"]["train_on_prompts"]
        (out / "run.json").write_text(json.dumps(record))
        found = json.loads(succeeded("eval", out, "--data", data, "--batch-size", "8").output)
        assert found["loss"] == pytest.approx(wanted, rel=1e-3)


# --- what a training computes ---


def sentences(path: Path) -> Path:
    """40 texts of 4 to 11 tokens, whose last ones are held out."""
    return written(path, [{"text": f"the film{' plot' * (7 * number % 8)}"} for number in range(40)])


def test_what_is_chosen_for_speed_is_said_and_recorded(llama: Path, tmp_path: Path) -> None:
    """In the opening lines, also of a dry run, with the reasons; in ``run.json``; and in the recipe, for resuming."""
    data, out = sentences(tmp_path / "data.jsonl"), tmp_path / "out"
    call = arguments_of(llama, data, "--out", out)
    said = succeeded(*call, "--dry-run").output
    starts = ("gradient checkpointing", "batches:", "loss:", "evaluation:", "samples:")
    lines = [line for line in said.splitlines() if line.startswith(starts)]
    assert "joined" not in said
    asked = written(tmp_path / "asked.jsonl", [{"prompt": "the film?", "completion": "good"}] * 20)
    joined = succeeded(*arguments_of(llama, asked, "--out", tmp_path / "asked"), "--dry-run").output
    assert "prompts and answers are joined as they are, as in 'the film?good'; a space" in joined
    assert lines[0].startswith("gradient checkpointing: off (a step takes about")
    assert lines[1].startswith("batches: grouped by length, shuffled (1.0")
    assert lines[2].startswith("loss: at the learned positions (on a CPU")
    assert lines[3:] == [
        "evaluation: at the end, on 40 held-out rows, 50% of all",
        "samples: 2 short answers after the training (--set samples=N)",
    ]
    succeeded(*call)
    record = record_of(out)
    assert {each["name"]: each["chosen"] for each in record["savings"]} == {
        "gradient checkpointing": "off", "batches": "grouped by length, shuffled", "loss": "at the learned positions"
    }  # fmt: skip
    assert {name: record["recipe"][name] for name in ("samples", "loss")} == {"samples": 2, "loss": "learned"}
    assert record["recipe"]["training"]["gradient_checkpointing"] is False
    none = (*("--set", "samples=0"), "--set", "loss=trl", "--set", "memory=0.001", "--set", "eval_strategy=epoch")
    said = succeeded(*arguments_of(llama, data, *none, "--out", tmp_path / "none")).output
    assert "gradient checkpointing: on (a step takes about" in said
    assert "loss: the trainer's own (as asked)\nevaluation: by eval_strategy, which is epoch, on 40" in said
    assert "samples: none" in said
    assert "samples" not in record_of(tmp_path / "none")


def test_keys_of_language_models_are_for_language_models(tmp_path: Path) -> None:
    """Others would ignore them in silence."""
    save_tiny_classifier(tmp_path / "tiny")
    rows = write_rows(tmp_path / "rows.csv")
    call = ("train", "--model", tmp_path / "tiny", "--data", rows, "--out", tmp_path / "out")
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    for name, value in (("samples", 0), ("memory", 2), ("chat_template", tmp_path / "own.jinja")):
        done = command(*call, "--set", f"{name}={value}")
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert f"{name}: is for language models, and text-classification trains none" in done.stderr
    given: Any = (Recipe(loss="trl"), task_of("image-classification"), None, None)
    with pytest.raises(ConfigError, match="loss: is for language models and classifiers of texts, and image-class"):
        preparing.prepare(*given)


def test_a_loss_that_was_asked_for_is_recorded_where_it_cannot_be_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe that asks for it resumes the run."""
    monkeypatch.setattr(preparing, "speed_up", lambda *given, **more: ())
    trainer = SimpleNamespace(args=SimpleNamespace(), model=SimpleNamespace(forward=None))
    for asked, kept in (("learned", "learned"), ("trl", "trl"), (None, "trl")):
        assert preparing._sped_up(Recipe(loss=asked), task_of("causal-lm"), trainer, resume=False)[0].loss == kept
    own = Saving("loss", "the trainer's own", changed=False, why="GPT2ForSequenceClassification is no classifier")
    monkeypatch.setattr(preparing, "speed_up", lambda *given, **more: (own,))
    for loss, savings in (("learned", (own,)), ("trl", ()), (None, ())):
        found = preparing._sped_up(Recipe(loss=loss), task_of("text-classification"), trainer, resume=False)
        assert (found[0].loss, found[1]) == (loss, savings)


def test_a_chat_template_is_the_one_that_the_run_began_with(tmp_path: Path) -> None:
    """A changed file is refused on resuming. What goes on from a run has its template, for the same task."""
    kept = tmp_path / "chat_template.jinja"
    kept.write_text(TEMPLATE)
    recipe = {"task": "causal-lm", "chat_template": "own.jinja"}
    record = {"version": 1, "task": "causal-lm", "model": {"source": "hub/name"}, "recipe": recipe}
    (tmp_path / "run.json").write_text(json.dumps(record))
    for task, template in ((None, str(kept)), ("text-classification", None)):
        given = Recipe(from_adapter=str(tmp_path), task=task)
        found = starting.completed({"from_adapter": str(tmp_path)}, given, resume=False)
        assert found.get("chat_template") == template
    begun, folder = Recipe(task="causal-lm", data="rows.csv", method="lora", chat_template=str(kept)), tmp_path / "out"
    RunFolder(folder).begin(begun, resume=False)
    kept.write_text(TEMPLATE + " ")
    with pytest.raises(OutputError, match=r"chat_template\.jinja has changed since the run began"):
        resuming.check(RunFolder(folder), begun, resume=True, overwrite=False)


def test_a_run_that_an_earlier_version_began_computes_as_it_did(llama: Path, tmp_path: Path) -> None:
    """TRL's own loss with checkpointing, batches at random, and an evaluation each epoch.

    Its recipe has no key for any of it. The adapter is the same to the last bit.
    """
    data, whole, parts = sentences(tmp_path / "data.jsonl"), tmp_path / "whole", tmp_path / "parts"
    then = {"gradient_checkpointing": "true", "train_sampling_strategy": "random", "eval_strategy": "epoch"}
    asked = [word for pair in {**then, "loss": "trl"}.items() for word in ("--set", "=".join(pair))]
    call = arguments_of(llama, data, "--epochs", "2", *asked)
    succeeded(*call, "--out", whole)
    with signalled(7, signal.SIGINT):
        assert command(*call, "--out", parts).exit_code == 130
    recipe = yaml.safe_load((parts / "recipe.yaml").read_text())
    recipe["training"] = {name: value for name, value in recipe["training"].items() if name not in then}
    for name in ("loss", "samples"):
        del recipe[name]
    (parts / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "grouped by length" not in succeeded("train", "--out", parts, "--resume").output
    assert (parts / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()
    record = record_of(parts)
    assert [{*sample} for sample in record["samples"]] == [{"prompt", "after"}] * 2
    assert [entry["step"] for entry in record["logs"] if "eval_loss" in entry] == [10, 20]
    assert "savings" not in record


def test_a_resumed_run_keeps_what_was_chosen_as_it_began(llama: Path, tmp_path: Path) -> None:
    """Whatever memory is free then, and whether the options are given again or not; to the last bit."""
    data, whole = sentences(tmp_path / "data.jsonl"), tmp_path / "whole"
    call = arguments_of(llama, data, "--epochs", "2")
    succeeded(*call, "--out", whole)
    for number, again in enumerate((("train",), call)):
        out = tmp_path / str(number)
        with signalled(13, signal.SIGINT):
            assert command(*call, "--out", out).exit_code == 130
        with mock.patch("tunerkit_transformers.savings.free_bytes", return_value=0):
            said = succeeded(*again, "--out", out, "--resume").output
        assert "gradient checkpointing: off (as the run began)" in said
        assert (out / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()


# --- the last evaluation ---


@pytest.mark.parametrize("settings", [(), ("--set", "eval_strategy='no'")])
def test_the_held_out_rows_are_evaluated_once_at_the_end(
    settings: tuple[str, ...], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the trainer found in its last step is the result; without such an evaluation it is made."""
    from trl.trainer.sft_trainer import SFTTrainer

    calls: list[object] = []
    loop: Callable[..., Any] = SFTTrainer.evaluation_loop

    def counting(*given: Any, **more: Any) -> Any:
        calls.append(given)
        return loop(*given, **more)

    monkeypatch.setattr(SFTTrainer, "evaluation_loop", counting)
    data = written(tmp_path / "data.jsonl", [answered()] * 8)
    succeeded(*arguments_of(llama, data, *settings, "--out", tmp_path / "out"))
    assert len(calls) == 1
    record = record_of(tmp_path / "out")
    assert record["metrics"]["loss"] == [each["eval_loss"] for each in record["logs"] if "eval_loss" in each][-1]
    assert record["seconds"]["evaluate"] > 0


def test_the_best_checkpoint_is_evaluated_itself(llama: Path, tmp_path: Path) -> None:
    """Where it takes the place of the last one, the last one's loss is not the result."""
    data = written(tmp_path / "data.jsonl", [answered()] * 8)
    best = ["load_best_model_at_end=true", "eval_strategy=steps", "eval_steps=1", "save_strategy=steps", "save_steps=1"]
    settings = [word for each in (*best, "lr_scheduler_type=constant", "max_steps=3") for word in ("--set", each)]
    succeeded(*arguments_of(llama, data, "--lr", "3", *settings, "--out", tmp_path / "out"))
    record = record_of(tmp_path / "out")
    losses = [entry["eval_loss"] for entry in record["logs"] if "eval_loss" in entry]
    assert min(losses) < losses[2]
    assert record["metrics"]["loss"] == pytest.approx(min(losses), rel=1e-4)


# --- dry runs ---


def test_a_dry_run_refuses_what_the_run_refuses(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is checked as the training begins too, and whether the folder can be written; nothing is created."""
    monkeypatch.chdir(tmp_path)
    data = written(Path("data.jsonl"), [answered()] * 8)
    blocked = Path("data.jsonl", "out")
    cases: list[tuple[object, ...]] = [("--out", blocked), ("--out", data)]
    if importlib.util.find_spec("tunerkit_adalora") is not None:
        cases.append(("--out", "new", "--method", "adalora", "--config", "{}", "--set", "max_steps=2"))
    for more in cases:
        messages = [command(*arguments_of(llama, data, *more, *dry)).stderr for dry in (["--dry-run"], [])]
        assert messages[0] == messages[1] != ""
        shutil.rmtree("new", ignore_errors=True)
    succeeded(*arguments_of(llama, data, "--out", "new", "--set", "report_to=tensorboard", "--dry-run"))
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_dry_run_says_the_epochs_that_are_run(llama: Path, tmp_path: Path) -> None:
    """By ``max_steps`` fewer than asked for; one epoch is no plural."""
    data = written(tmp_path / "data.jsonl", [answered()] * 40)
    for more, line in (
        (("--epochs", "1"), "10 steps, 1 epoch, batches of 4\n"),
        (("--epochs", "3", "--set", "max_steps=4"), "4 steps (max_steps), 0.4 epochs, batches of 4\n"),
        (("--set", "max_steps=10"), "10 steps (max_steps), 1 epoch, batches of 4\n"),
        (("--epochs", "1.5"), "15 steps, 1.5 epochs, batches of 4\n"),
    ):
        assert line in succeeded(*arguments_of(llama, data, *more, "--out", tmp_path / "x", "--dry-run")).output


# --- answers ---


@pytest.fixture(scope="module")
def chatter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on conversations that ends early, so its answers are still free."""
    folder = tmp_path_factory.mktemp("chatter")
    data = written(folder / "data.jsonl", [{"messages": turns("the film", "very good")}] * 8)
    succeeded(*arguments_of(llama, data, "--lr", "1e-4", "--out", folder / "out"))
    return folder / "out"


def told(out: Path, *options: object) -> str:
    """What ``predict --text`` answers in 12 tokens at most."""
    done = succeeded("predict", out, "--text", "the film", "--new-tokens", "12", *options)
    return str(json.loads(done.output)["completion"])


def test_a_temperature_draws_words_by_the_seed_and_without_one_the_likeliest_count(chatter: Path) -> None:
    """The same seed, the same answer; a temperature of 0, and drawing from one word, are greedy."""
    greedy = told(chatter)
    assert told(chatter, "--temperature", "0") == greedy
    assert told(chatter, "--temperature", "5", "--top-k", "1") == greedy
    assert told(chatter, "--temperature", "5", "--top-p", "0.001") == greedy
    drawn = [told(chatter, "--temperature", "5", "--seed", seed) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] == told(chatter, "--temperature", "5")
    assert len({greedy, *drawn}) == 4
    talks = [
        succeeded("chat", chatter, "--new-tokens", "12", "--temperature", "5", typed="the film\n\n").output
        for _ in range(2)
    ]
    assert talks[0] == talks[1]
    assert talks[0].startswith(f"you: the film\n{drawn[0]}\n")


def test_a_systems_message_comes_before_the_users(chatter: Path) -> None:
    """In ``chat`` and in ``predict --text``, by the template."""
    model, tokenizer = tunerkit.from_folder(chatter)
    asked = [{"role": "system", "content": "a plot"}, *turns("the film")]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    given = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    wanted = tokenizer.decode(given, skip_special_tokens=True)
    assert told(chatter, "--system", "a plot") == wanted != told(chatter)
    talk = succeeded("chat", chatter, "--system", "a plot", "--new-tokens", "12", typed="the film\n\n").output
    assert talk.startswith(f"you: the film\n{wanted}\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "-1"), "--temperature: expected 0, or a number from 0.01 to 100, got -1.0"),
        (("--temperature", "nan"), "--temperature: expected 0, or a number from 0.01 to 100, got nan"),
        (("--temperature", "1", "--top-p", "0"), "--top-p: expected a number above 0 and up to 1, got 0.0"),
        (("--temperature", "1", "--top-k", "0"), "--top-k: expected a whole number above 0, got 0"),
        (("--temperature", "1", "--seed", "-1"), "--seed: expected a whole number from 0 to 4294967295, got -1"),
        (("--top-p", "0.5"), "--top-p: has no effect without --temperature above 0"),
        (("--temperature", "0", "--seed", "1"), "--seed: has no effect without --temperature above 0"),
        (("--system", " "), "--system: expected a text that is not empty, got ' '"),
    ],
)
def test_options_out_of_range_or_without_effect_are_one_error(
    options: tuple[str, ...], message: str, chatter: Path
) -> None:
    """In both commands."""
    for asked in (("predict", chatter, "--text", "a"), ("chat", chatter)):
        done = command(*asked, *options)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr


def test_a_systems_message_is_refused_where_it_has_no_place(chatter: Path, llama: Path, tmp_path: Path) -> None:
    """Rows have messages of their own, texts have none, and some templates leave it out or refuse it."""
    data = written(tmp_path / "data.jsonl", [answered()] * 8)
    succeeded(*arguments_of(llama, data, "--out", tmp_path / "texts"))
    rows = written(tmp_path / "rows.jsonl", [{"messages": turns("the film")}])
    silent = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TEMPLATE
    for name, template in (("silent", silent), ("refusing", refusing)):
        shutil.copytree(chatter, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(template)
    text = ("--text", "the film")
    for asked, message in (
        (
            ("predict", chatter, "--data", rows),
            "--system: is for --text; the rows of --data have messages of their own",
        ),
        (("predict", tmp_path / "texts", *text), "was not trained on conversations; write it into your text"),
        (("chat", tmp_path / "texts"), "was not trained on conversations; write it into your text"),
        (("chat", tmp_path / "silent"), "has no place for it; write it into your message"),
        (
            ("predict", tmp_path / "refusing", *text),
            "refuses the conversation that begins with 'a plot': no system here; change",
        ),
    ):
        done = command(*asked, "--system", "a plot")
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr


@pytest.mark.parametrize("kind", ["chat", "texts", "preference", "seq2seq"])
def test_the_reports_lines_answer_as_predict_does(
    kind: str, llama: Path, chatter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They run as they stand, and a chat's message goes through the template."""
    asked, (good, bad) = turns("the film"), ([{"role": "assistant", "content": each}] for each in ("good", "bad"))
    rows: dict[str, dict[str, Any]] = {
        "texts": {"text": "the film"},
        "preference": {"prompt": asked, "chosen": good, "rejected": bad},
        "seq2seq": {"source": "the film", "target": "not bad"},
    }
    out = tmp_path / "out" if kind in rows else chatter
    if kind in rows:
        model = save_tiny_t5(tmp_path / "t5") if kind == "seq2seq" else llama
        succeeded(
            *arguments_of(model, written(tmp_path / "data.jsonl", [rows[kind]] * 8), "--lr", "1e-4", "--out", out)
        )
    page = (out / "report.html").read_text(encoding="utf-8")
    lines, shell = (html.unescape(part.partition("</pre>")[0]) for part in page.split('<pre class="code">')[1:])
    capsys.readouterr()
    exec(lines, {})
    printed = capsys.readouterr().out
    (answer,) = json.loads(succeeded(*shlex.split(shell)[1:]).output).values()
    assert printed == f"{answer}\n"
    assert answer != ""
    assert ("apply_chat_template" in lines) is (kind in ("chat", "preference"))
