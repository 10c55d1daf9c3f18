"""Raises an error that names the new module of the test kit, until version 0.3."""

raise ImportError("tunerkit.testing has moved to tunerkit_testing, in a distribution of its own: the extra [testing]")
