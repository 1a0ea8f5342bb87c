"""The formats in which a compressed model is saved: one file per format that other programs load."""
