"""The classes and names of transformers that core treats specially: core never imports them."""

from typing import Any

from torch import Tensor, nn

from tunerkit.libraries.forwards import derives_from, forward_name
from tunerkit.libraries.torch_private import own_parameters

CONV1D = "transformers.pytorch_utils.Conv1D"
FALCON_LINEAR = "transformers.models.falcon.modeling_falcon.FalconLinear"
PRETRAINED_MODEL = "transformers.modeling_utils.PreTrainedModel"


def is_scaled_embedding(module: nn.Module) -> bool:
    """Whether this is one of the twenty-odd classes whose forward is ``super().forward(ids) * self.embed_scale``.

    An additional parameter means that the forward inserts an additional row (T5Gemma2's end-of-image token); such a
    module cannot be adapted.
    """
    match module:
        case nn.Embedding(embed_scale=float() | int() | Tensor()):
            name = forward_name(module)
            named = name.startswith("transformers.") and name.endswith("ScaledWordEmbedding")
            return named and list(own_parameters(module)) == ["weight"]
    return False


def grown_embeddings(model: nn.Module) -> list[nn.Embedding]:
    """The token embeddings that ``resize_token_embeddings`` has made longer since the model was built.

    It updates the config and the model it was called on, but not the ``vocab_size`` that a body inside it keeps, as
    Llama's does. Where there is no such body, as in BERT, nothing shows it. A class that builds more rows than its
    vocabulary has, as Mllama does, leaves the config as it is.
    """
    found: list[nn.Embedding] = []
    for module in model.modules():
        built = vars(module).get("vocab_size")
        if isinstance(built, int) and derives_from(module, PRETRAINED_MODEL):
            transformer: Any = module
            embedding, config = transformer.get_input_embeddings(), transformer.config.get_text_config()
            if isinstance(embedding, nn.Embedding) and embedding.num_embeddings == config.vocab_size > built:
                found.append(embedding)
    return found


def is_computed(module: nn.Module) -> bool:
    """Whether a module of transformers computes its weight when it is built: no checkpoint has its values."""
    return isinstance(module, nn.Embedding) and type(module).__name__.endswith("SinusoidalPositionalEmbedding")
