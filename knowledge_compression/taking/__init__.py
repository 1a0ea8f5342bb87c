"""Results that were made elsewhere, taken into a store as runs that say so."""
