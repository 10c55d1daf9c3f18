"""Conversion of another method's or program's adapter: from low-rank products to AdaLoRA's config and layers."""

import math
from collections.abc import Mapping

from tunerkit.plugin import Factors, exact_patterns
from tunerkit_adalora.config import AdaLoraConfig
from tunerkit_adalora.svd_layer import SvdLayer, layer_of


def from_products(products: Mapping[str, Factors]) -> tuple[AdaLoraConfig, dict[str, SvdLayer]]:
    """Build layers with ``products`` as their ΔW, and a config with the same targets and ranks.

    Args:
        products: ΔW of each target as low-rank factors, by target path. Ranks may differ, and may be 0.

    Returns:
        The config, with the largest rank as initial rank and the average rank as target rank; and the layers. The scale
        is 1, because λ holds the singular values.
    """
    layers = {path: layer_of(product) for path, product in products.items()}
    ranks = [layer.lam.shape[-1] for layer in layers.values() for _ in range(layer.matrices)]
    initial = max(1, *ranks)
    for layer in layers.values():
        layer.initial_rank = initial
    average = max(1, math.ceil(sum(ranks) / len(ranks)))
    config = AdaLoraConfig(
        init_rank=initial, target_rank=average, alpha=float(initial), targets=tuple(exact_patterns(products).values())
    )
    return config, layers
