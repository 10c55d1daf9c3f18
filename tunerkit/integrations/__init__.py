"""Connections with what trains models, each imported only when it is used."""
