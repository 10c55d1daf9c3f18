"""Says where the kit for authors of methods is now. This file goes with version 0.3."""

from tunerkit.extras import install

raise ImportError(f"tunerkit.testing is a distribution of its own: import tunerkit_testing ({install('testing')})")
