"""Corpora: the text that compression is calibrated on and recovery trains on."""
