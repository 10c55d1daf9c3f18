"""Method configs: their base class and the strict converter."""

from tunerkit.config.settings import AdapterConfig, from_mapping, options_from, setting, unstructure
