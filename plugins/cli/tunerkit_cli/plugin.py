"""What a plugin that adds a command imports: how the command reads the settings that are given to it."""

from tunerkit_cli.settings import given_settings

__all__ = ["given_settings"]
