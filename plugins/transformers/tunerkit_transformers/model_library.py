"""Find settings of transformers' configs that tie embeddings or set the number of labels."""

from collections.abc import Iterator, Sequence

from torch import nn

_TIED = "tie_word_embeddings"


def tied_flags(module: nn.Module) -> Sequence[str]:
    """Return the names of the config's settings that tie embeddings, which transformers reads at loading and saving."""
    match module:
        case nn.Module(config=object() as config):
            return [*_flags(config, "config"), *_flags(getattr(config, "text_config", None), "config.text_config")]
    return ()


def _flags(config: object, name: str) -> Iterator[str]:
    if getattr(config, _TIED, None) is True:
        yield f"{name}.{_TIED}"


def labels_hint(model: nn.Module, resized: Sequence[tuple[Sequence[int], Sequence[int]]]) -> str:
    """Return a hint for an error if the model's head has another number of labels than the adapter needs, else "".

    Args:
        model: The model.
        resized: (needed shape, actual shape) of each weight that does not fit.
    """
    match model:
        case nn.Module(config=object(num_labels=int(labels))):
            for needed, found in resized:
                # The labels are the first dimension of a head's weight and of its bias.
                if needed[:1] != found[:1] and list(found[:1]) == [labels] and needed[1:] == found[1:]:
                    return (
                        f"; this model was built for {labels} labels, the adapter needs {needed[0]}: pass "
                        f"num_labels={needed[0]} to from_pretrained"
                    )
    return ""
