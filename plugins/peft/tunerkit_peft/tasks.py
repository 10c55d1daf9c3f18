"""PEFT's tasks, and the classes of transformers that they are trained with."""

from collections.abc import Mapping
from typing import Final

from torch import nn

# The class that loads a base for the task, and how the classes of its models end.
TASKS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "CAUSAL_LM": ("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel")),
    "SEQ_CLS": ("AutoModelForSequenceClassification", ("ForSequenceClassification",)),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", ("ForConditionalGeneration",)),
    "TOKEN_CLS": ("AutoModelForTokenClassification", ("ForTokenClassification",)),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", ("ForQuestionAnswering",)),
    "FEATURE_EXTRACTION": ("AutoModel", ("Model",)),
}
# The heads that models of transformers have on top of their bodies.
HEADS: Final = ("classifier", "score", "qa_outputs", "lm_head", "embed_out", "cls")


def auto_class(task: str, model_class: str) -> str:
    """Return the class that loads the base: by the task, or the one that was wrapped without a task; may be empty."""
    return TASKS[task][0] if task in TASKS else model_class


def is_task_class(model: nn.Module | None, task: str, model_class: str) -> bool:
    """Whether a model is of the class that the adapter was trained on, as far as its settings say."""
    name = type(model).__name__
    return (bool(model_class) and name == model_class) or (task in TASKS and name.endswith(TASKS[task][1]))
