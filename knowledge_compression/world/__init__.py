"""The controlled world: generated facts, and three small models of like size that were trained to know them."""
