"""``python -m knowledge_compression``, which is the command ``kc``."""

from knowledge_compression.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
