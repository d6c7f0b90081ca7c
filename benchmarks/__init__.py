"""Measurements of models, the input pipeline and their parts; nothing imports them."""
