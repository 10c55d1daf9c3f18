"""``tunerkit train`` with LoRA: the folder loads to the model that was evaluated."""

import json
from pathlib import Path

import pytest

# Imports after a statement: without the extra this file is skipped, not broken.
for _module in ("datasets", "platformdirs", "pyarrow", "rich", "sklearn", "transformers", "typer", "yaml"):
    pytest.importorskip(_module, reason="the command needs the extra [cli]")

import transformers  # noqa: E402

import tunerkit  # noqa: E402
from tests.support.train_command import arguments_of, record_of, succeeded  # noqa: E402


def test_a_run_can_be_predicted_with_and_merged(tmp_path: Path) -> None:
    """The pipeline of transformers on `tunerkit.from_folder`, ``predict`` and the merged folder agree."""
    out = tmp_path / "out"
    succeeded(*arguments_of(tmp_path, "lora", "{rank: 2}"), "--precision", "fp32", "--out", out, "--epochs", "2")
    record = record_of(out)
    assert set(record["ranks"].values()) == {2}
    assert record["config"]["rank"] == 2
    model, tokenizer = tunerkit.from_folder(out)
    classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    expected = classify(["good film", "bad plot"])
    found = succeeded("predict", out, "--text", "good film", "--text", "bad plot").output
    answers = [json.loads(line) for line in found.splitlines()]
    assert [{name: answer[name] for name in ("label", "score")} for answer in answers] == expected
    succeeded("merge", out, "--out", tmp_path / "merged")
    merged = transformers.pipeline("text-classification", model=str(tmp_path / "merged"))(["good film", "bad plot"])
    assert [each["score"] for each in merged] == pytest.approx([each["score"] for each in expected], abs=1e-5)
