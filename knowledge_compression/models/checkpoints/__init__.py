"""Compressed checkpoints of other programs: one module per format, declaring how it is recognised and decoded."""
