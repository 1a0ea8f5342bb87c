"""Corpora: the text for calibrating compression and for training recoveries."""
