"""The classes of transformers that core treats specially, by qualified name: core never imports them."""

from torch import Tensor, nn

from tunerkit.libraries.forwards import forward_name
from tunerkit.libraries.torch_private import own_parameters

CONV1D = "transformers.pytorch_utils.Conv1D"
FALCON_LINEAR = "transformers.models.falcon.modeling_falcon.FalconLinear"
TRAINER = "transformers.trainer.Trainer"


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
