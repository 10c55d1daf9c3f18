"""Integrations with training libraries; each is imported only when it is used."""
