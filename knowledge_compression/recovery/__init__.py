"""Recovery strategies, one file each: what brings lost facts back."""
