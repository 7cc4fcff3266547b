"""Serving under load, measured from its client's side."""
