"""The controlled world: generated facts, and three small models of similar size that are trained to know them."""
