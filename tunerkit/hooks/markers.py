"""The pluggy markers; apart from the hook specs, so that plugins import them cheaply."""

import pluggy

PROJECT = "tunerkit"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
