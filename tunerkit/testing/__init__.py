"""The conformance tests and test tools for authors of method plugins."""
