"""Frameworks that run a prepared model; each is imported only when it is used."""
