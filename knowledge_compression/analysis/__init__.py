"""Analysis: what a store of runs says – fact by fact, with its uncertainty."""
