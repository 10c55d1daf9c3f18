"""A small model, rows of data and quiet arguments for tests that run a transformers Trainer."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import tunerkit
from tunerkit_testing.resuming import VOCABULARY as VOCABULARY, TokenRows as TokenRows


class Regression(nn.Module):
    """Two linear layers, ``first`` and ``second``, called as a Trainer calls a model; the same at each construction."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = self.second(torch.tanh(self.first(x)))[:, 0]
        return {"loss": (found - labels).square().mean(), "logits": found}


class RegressionRows(Dataset[dict[str, Tensor]]):
    """Sixteen rows for `Regression`: ``x`` (3,) and a label that is always 2."""

    def __init__(self) -> None:
        self.x = torch.linspace(-1, 1, 48).reshape(16, 3)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": torch.tensor(2.0)}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Arguments of a Trainer that runs on the CPU, reports nothing and saves nothing.

    Args:
        folder: where the Trainer may write.
        options: arguments of `transformers.TrainingArguments` that are added or replace a default here.
    """
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return TrainingArguments(str(folder), **(defaults | options))


def attached_trainer(folder: Path, **options: Any) -> Trainer:
    """A trainer of `Regression` with two toy adapters, of which one needs steps: six steps, and three checkpoints.

    Args:
        folder: where the Trainer may write.
        options: as for `arguments`.
    """
    model: nn.Module = Regression()
    for name, method in (("a", "toy-stepper"), ("b", "toy-shift")):
        model = tunerkit.wrap(model, method, {"targets": ["first", "second"]}, adapter=name)
    defaults: dict[str, Any] = {"max_steps": 6, "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 2}
    trainer = Trainer(model, arguments(folder, **(defaults | options)), train_dataset=RegressionRows())
    tunerkit.attach(model, trainer)
    return trainer


def tokenizer(folder: Path) -> Any:
    """A word-level tokenizer of `VOCABULARY` words, ``w0`` and so on, built without a download.

    Args:
        folder: where its file is written.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCABULARY - 2)} | {"<pad>": VOCABULARY - 2, "</s>": VOCABULARY - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", eos_token="</s>", unk_token="w0"
    )
