"""Evaluation suites over one scoring core."""
