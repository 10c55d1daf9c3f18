"""The tasks, and the classes of transformers that load a task's model and processor. Nothing here imports torch."""

from collections.abc import Mapping

import attrs


@attrs.frozen
class TaskClasses:
    """The classes of transformers that load a task's model and processor, by name.

    Attributes:
        model: The auto class of the model.
        mapping: The name of transformers' mapping whose keys are the config classes that the auto class supports.
        processor: The auto class of the tokenizer or image processor.
        problem: The value of a classifier's ``problem_type``, which chooses the loss; None if it has none.
        pipeline: The name of transformers' pipeline for such models; None if there is none.
        what: The model in words, for messages.
    """

    model: str
    mapping: str
    processor: str
    problem: str | None
    pipeline: str | None
    what: str


_SEQUENCES = "AutoModelForSequenceClassification"
_OF_SEQUENCES = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"
CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING"
TEXT = "AutoTokenizer"
EMBEDDING = "embedding"
TASKS: Mapping[str, TaskClasses] = {
    "text-classification": TaskClasses(
        _SEQUENCES, _OF_SEQUENCES, TEXT, "single_label_classification", "text-classification", "a classifier of texts"
    ),
    "regression": TaskClasses(
        _SEQUENCES, _OF_SEQUENCES, TEXT, "regression", "text-classification", "a regression on texts"
    ),
    "multi-label": TaskClasses(
        _SEQUENCES,
        _OF_SEQUENCES,
        TEXT,
        "multi_label_classification",
        "text-classification",
        "a multi-label classifier of texts",
    ),
    "token-classification": TaskClasses(
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
        TEXT,
        None,
        "token-classification",
        "a classifier of tokens",
    ),
    **dict.fromkeys(
        ("causal-lm", "preference", "orpo", "kto", "grpo"),
        TaskClasses("AutoModelForCausalLM", CAUSAL, TEXT, None, "text-generation", "a causal language model"),
    ),
    "reward": TaskClasses(_SEQUENCES, _OF_SEQUENCES, TEXT, "regression", None, "a reward model"),
    "seq2seq": TaskClasses(
        "AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", TEXT, None, None, "an encoder-decoder model"
    ),
    "image-classification": TaskClasses(
        "AutoModelForImageClassification",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
        "AutoImageProcessor",
        "single_label_classification",
        "image-classification",
        "a classifier of images",
    ),
    EMBEDDING: TaskClasses("AutoModel", "MODEL_MAPPING", TEXT, None, "feature-extraction", "an encoder of texts"),
}
