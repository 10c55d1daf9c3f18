"""The commands of ``tunerkit``, one file each: a function whose parameters typer reads as options and arguments.

Every call of the command imports them, ``--help`` included, so torch and transformers are imported inside them.
"""
