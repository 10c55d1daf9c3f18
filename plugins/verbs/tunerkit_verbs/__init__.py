"""Verbs of tunerkit that few trainings need: `tunerkit.calibrate` and `tunerkit.method`, each in a file of its name."""
