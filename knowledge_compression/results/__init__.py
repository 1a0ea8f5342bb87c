"""Results: the run store, the tracker, and the table and figure of a sweep."""
