"""Adapters of any format: convert, verify, compare, show and merge them."""
