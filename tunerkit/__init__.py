"""tunerkit: adapters for torch models, with methods that are plugins."""

import lazy_loader

__version__ = "0.1.0"

# The public names stand in __init__.pyi. Each is imported when it is first used: importing torch takes seconds, and the
# command's help and its errors need no torch.
__getattr__, __dir__, _offered = lazy_loader.attach_stub(__name__, __file__)
__all__ = [name for name in _offered if name not in ("errors", "patterns")]
