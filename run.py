"""Compress a language model and see what it still knows: ``python run.py --help``."""

from knowledge_compression.sweeping.cli import main

if __name__ == "__main__":
    main()
