"""GGUF files, and what each architecture's hold."""
