"""The table of docs/how-to/from-peft.md: what a user of PEFT writes, and what here, run line by line."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from peft.utils.hotswap import hotswap_adapter

import tunerkit

PAGE = next(Path(__file__).parents[3].glob("docs/**/from-peft.md"))
NO_NETWORK = ("owner/", "from_pretrained(name")  # of the hub, or of a model that must be downloaded
IDS = torch.arange(6).reshape(2, 3)


def rows() -> Iterator[tuple[str, str, str]]:
    """The table's lines: what to do, and the two cells."""
    text = PAGE.read_text(encoding="utf-8").partition("## What you did, and what you write")[2].partition("\n## ")[0]
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| to |"):
            goal, before, after = (cell.strip() for cell in line.strip("|").split(" | "))
            yield goal, before, after


ROWS = {goal: (before, after) for goal, before, after in rows()}
POSSIBLE = [goal for goal, (_, after) in ROWS.items() if not after.startswith("Not possible")]


def first_code(cell: str) -> str:
    found = re.match(r"`([^`]+)`", cell)
    assert found is not None, cell
    return found[1]


def base() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=40, num_hidden_layers=1, pad_token_id=0, **sizes))


def tokenizer() -> Any:
    words = pytest.importorskip("tokenizers", reason="a pipeline needs a tokenizer")
    vocabulary = {f"w{number}": number for number in range(40)}
    model = words.models.WordLevel(vocabulary, unk_token="w0")
    return hf.PreTrainedTokenizerFast(tokenizer_object=words.Tokenizer(model), pad_token="w0", unk_token="w0")


def names(goal: str) -> dict[str, Any]:
    """What both columns may use."""
    model, row = base(), {"input_ids": IDS[0], "labels": IDS[0]}
    found: dict[str, Any] = {"base": model, "ids": IDS, "peft": peft, "torch": torch, "step": 1, "rows": [row] * 4}
    if "pipeline" in goal:
        found |= {"pipeline": hf.pipeline, "tokenizer": tokenizer()}
    if "Trainer" in goal:
        arguments = hf.TrainingArguments("run", use_cpu=True, report_to=[], max_steps=1)
        found |= {"Trainer": hf.Trainer, "arguments": arguments}
    return found


def more(goal: str) -> tuple[str, ...]:
    """The adapters beside the default one, where a line names some that are there."""
    before, _ = ROWS[goal]
    return ("a", "b") if "second" not in goal and ('"a"' in before or '"b"' in before) else ()


def theirs(goal: str) -> dict[str, Any]:
    """What PEFT's column may use: its names, and a model with adapters."""
    found = {**vars(peft), **names(goal)}
    adaptive = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=100)
    config = adaptive if "AdaLoRA" in goal else peft.LoraConfig(target_modules=["q_proj"], lora_alpha=16)
    model = peft.get_peft_model(base(), config)
    peft.get_peft_model(base(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained("folder")
    if "AdaLoRA" in goal:
        model(IDS, labels=IDS).loss.backward()
        return {**found, "model": model}
    for name in more(goal):
        model.add_adapter(name, config)
    found["hotswap_adapter"] = hotswap_adapter
    model.train("adapter_names" not in goal)  # PEFT mixes in eval mode only
    return {**found, "model": model}


def ours(goal: str) -> dict[str, Any]:
    """What our column may use, in the same way."""
    import huggingface_hub
    import safetensors.torch

    from tunerkit_lora import LoraConfig

    found = {**names(goal), "tunerkit": tunerkit, "LoraConfig": LoraConfig}
    found |= {"huggingface_hub": huggingface_hub, "safetensors": safetensors}
    config = peft.LoraConfig(target_modules=["q_proj"])
    peft.get_peft_model(base(), config).save_pretrained("folder")
    model = tunerkit.wrap(base(), "adalora" if "AdaLoRA" in goal else "lora", {"targets": ["q_proj"]})
    for name in more(goal):
        tunerkit.wrap(model, "lora", {"targets": ["q_proj"]}, adapter=name)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
    return {**found, "model": model, "optimizer": optimizer}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("goal", POSSIBLE)
def test_our_line_runs(goal: str, tmp_path: Path) -> None:
    """What needs the network is only compiled."""
    pytest.importorskip("tunerkit_lora", reason="the page's method")
    pytest.importorskip("tunerkit_adalora", reason="the page's method")
    code = compile(first_code(ROWS[goal][1]), goal, "exec")
    if not any(each in ROWS[goal][1] for each in NO_NETWORK):
        with chdir(tmp_path):
            found = ours(goal)
            exec(code, found)
            assert LEAVES.get(goal, lambda found: True)(found)


# What our lines of these rows leave.
LEAVES: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "add an adapter": lambda found: tunerkit.active(found["model"]) == ("default",) and found["model"] is found["base"],
    "train with AdaLoRA": lambda found: tunerkit.tuner(found["model"]).total_steps == 100,
    "save": lambda found: Path("out/adapter.safetensors").is_file(),
    "load": lambda found: not any(each.requires_grad for each in tunerkit.tuner(found["model"]).parameters()),
    "continue training (`is_trainable`)": lambda found: all(
        each.requires_grad for each in tunerkit.tuner(found["model"]).parameters()
    ),
    "merge and take the adapter out (`merge_and_unload`)": lambda found: not tunerkit.adapters(found["base"]),
    "take the adapter out": lambda found: not tunerkit.adapters(found["base"]),
    "add a second adapter": lambda found: tunerkit.active(found["model"]) == ("default", "b"),
    "load a second adapter": lambda found: tunerkit.active(found["model"]) == ("default", "b"),
    "choose the active one (`set_adapter`)": lambda found: tunerkit.active(found["model"]) == ("a",),
    "delete one": lambda found: "b" not in tunerkit.adapters(found["model"]),
    "swap an adapter (hot swap)": lambda found: [*tunerkit.adapters(found["model"])] == ["new"],
}


def test_the_rows_whose_end_is_looked_at_are_on_the_page() -> None:
    """A row that is renamed would be looked at no more."""
    assert LEAVES.keys() <= set(POSSIBLE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("goal", ROWS)
def test_pefts_line_runs(goal: str, tmp_path: Path) -> None:
    """So that the left column is what a user of this version of PEFT has."""
    code = compile(first_code(ROWS[goal][0]), goal, "exec")
    if not any(each in ROWS[goal][0] for each in NO_NETWORK):
        with chdir(tmp_path):
            exec(code, theirs(goal))


@pytest.mark.parametrize("goal", [goal for goal in ROWS if goal not in POSSIBLE])
def test_what_is_not_possible_has_its_reason(goal: str) -> None:
    """In the same sentence."""
    assert re.match(r"Not possible[^.]*, because ", ROWS[goal][1])


def test_every_thing_that_people_do_has_a_line() -> None:
    """Of PEFT's quick tour and guides."""
    whole = " ".join(f"{goal} {before}" for goal, (before, _) in ROWS.items())
    for word in (
        *("get_peft_model", "print_trainable_parameters", "save_pretrained", "from_pretrained", "is_trainable"),
        *("merge_and_unload", "set_adapter", "add_weighted_adapter", "disable_adapter", "rank_pattern"),
        *("modules_to_save", "task_type", "pipeline", "generate", "hub", "push_to_hub", "adapter_names", "hot swap"),
        *("eva", "pissa", "loftq", "use_dora", "QLoRA", "trainable_token_indices", "target_parameters"),
    ):
        assert word in whole
