"""What tunerkit knows of other libraries, as data, and the private names it relies on."""

from tunerkit.libraries import torch_private, transformers_private
from tunerkit.libraries.accelerate import (
    duplicate,
    execution_device,
    identity,
    is_offloaded,
    weight_of,
)
from tunerkit.libraries.engines import ENGINES, is_sharded, refuse_engine
from tunerkit.libraries.foreign_files import DEFAULT_FORMAT, FOREIGN_FORMATS, ForeignFormat, foreign_format
from tunerkit.libraries.forward_fields import FORWARD_ALIASES, FORWARD_FIELDS, FORWARD_SYNONYMS
from tunerkit.libraries.forwards import derives_from, forward_name, forward_owner, overrides_forward
from tunerkit.libraries.output_heads import is_head_name, labels_hint, named_heads
from tunerkit.libraries.quantisers import (
    is_dtype_name,
    is_packed,
    numbers_of,
    quantiser_of,
    runs_forward_of_library,
)
from tunerkit.libraries.transformers_classes import (
    CONV1D,
    FALCON_LINEAR,
    PRETRAINED_MODEL,
    grown_embeddings,
    is_computed,
    is_scaled_embedding,
)
from tunerkit.libraries.transformers_private import (
    HAS_ADAPTERS,
    IS_QUANTISED,
    forget_quantisation,
    is_built,
    is_loaded,
)
from tunerkit.libraries.zero_init import (
    gathered,
    is_partitioned,
    is_zero_shard,
    outside_zero_init,
    whole_shape,
    whole_value,
)
