"""Analysis of a store of runs, fact by fact, with intervals."""
