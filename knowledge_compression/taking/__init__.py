"""Results made by other tools, imported into a store as runs that are marked as such."""
