"""Modules that all three tasks share: options, processes, runs and their files."""
