"""Says where the kit for authors of methods is now. This file goes with version 0.3."""

raise ImportError("tunerkit.testing is tunerkit_testing now, in a distribution of its own: the extra [testing]")
