"""Compressed checkpoints as people have them: one file a format, each of which says what it is and stands for."""
