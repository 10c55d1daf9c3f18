"""Output heads: their names in transformers, timm and torchvision, the methods that return them, and their sizes."""

from collections.abc import Iterable, Sequence

from torch import nn

# "proj_out" is missing on purpose: Whisper's is found through get_output_embeddings, and in diffusion models the name
# stands for an ordinary projection.
OUTPUT_HEADS = frozenset({"head", "lm_head", "score", "classifier", "qa_outputs", "cls", "embed_out", "predictions"})
OUTPUT_HEADS |= {"pre_classifier", "vocab_transform", "vocab_projector", "logits_proj"}
_ENDINGS = ("_head", "_heads", "_classifier", "_predictions")


def is_head_name(name: str) -> bool:
    """Whether a module of this name is an output head, if it is not inside a numbered block."""
    return name in OUTPUT_HEADS or name.endswith(_ENDINGS)


def named_heads(model: nn.Module) -> list[nn.Module]:
    """The output heads that the model's own methods return."""
    questions: list[object] = []
    match model:
        case nn.Module(get_output_embeddings=question):  # transformers
            questions.append(question)
    match model:
        case nn.Module(get_classifier=question):  # timm
            questions.append(question)
    # A child module may have the name of either method.
    answers = [ask() for ask in questions if callable(ask) and not isinstance(ask, nn.Module)]
    heads = [head for answer in answers for head in (answer if isinstance(answer, list | tuple) else [answer])]
    return [head for head in heads if isinstance(head, nn.Module)]


def labels_hint(model: nn.Module, reshaped: Iterable[tuple[Sequence[int], Sequence[int]]]) -> str:
    """Return a hint for an error if a head has another number of labels than it needs; otherwise an empty string.

    Args:
        model: The model.
        reshaped: Pairs of the shape that a weight needs and the shape that it has.
    """
    match model:
        case nn.Module(config=object(num_labels=int(labels))):
            for needed, found in reshaped:
                # The labels are the first dimension of a head's weight and of its bias.
                if needed[:1] != found[:1] and list(found[:1]) == [labels] and needed[1:] == found[1:]:
                    return (
                        f"; this model was built for {labels} labels, the adapter needs {needed[0]}: pass "
                        f"num_labels={needed[0]} to from_pretrained"
                    )
    return ""
