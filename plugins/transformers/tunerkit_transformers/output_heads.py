"""The output heads that models of transformers and timm name by methods of their own."""

from torch import nn


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
