"""The pluggy markers, separate from the hook specs, so that plugins can import them cheaply."""

import pluggy

PROJECT = "tunerkit"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
