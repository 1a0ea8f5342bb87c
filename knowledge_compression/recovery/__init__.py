"""Recovery strategies, one file each: ways to bring lost facts back."""
