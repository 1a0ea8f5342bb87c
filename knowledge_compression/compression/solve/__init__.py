"""The algorithms under the methods, which know tensors and nothing of models."""
