"""How compressed weights are held and stored: integer layers, packed checkpoints."""
