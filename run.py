"""Compress a language model and see what it still knows: ``python run.py --help``."""

from knowledge_compression.stopping import stoppable

if __name__ == "__main__":
    with stoppable():
        from knowledge_compression.sweeping.cli import main

        main()
