"""Reports: rank tables for the terminal, and HTML pages."""
