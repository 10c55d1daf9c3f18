"""Says where the kit for authors of methods is now. This file goes with version 0.3."""

raise ImportError(
    'tunerkit.testing is a distribution of its own now: pip install "tunerkit[testing]", and import tunerkit_testing'
)
