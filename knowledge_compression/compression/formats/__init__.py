"""Representations of compressed weights: integer layers, packed checkpoints."""
