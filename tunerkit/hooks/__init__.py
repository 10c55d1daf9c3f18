"""The hooks and the plugins that answer them: specs, discovery, validation, the registry."""

from tunerkit.hooks.knowledge import gather_knowledge
from tunerkit.hooks.markers import hookimpl
from tunerkit.hooks.method_config import configure, structure, unstructure
from tunerkit.hooks.registry import registry
