"""How a calibrated compression walks through a network: block by block, in memory or from disk to disk."""
