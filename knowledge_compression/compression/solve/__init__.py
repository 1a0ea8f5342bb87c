"""The algorithms that the methods use; they work on tensors and know nothing about models."""
