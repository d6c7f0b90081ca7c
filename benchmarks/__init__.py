"""Benchmarks of models, the input pipeline, whole epochs, single parts and dense networks; nothing imports them."""
