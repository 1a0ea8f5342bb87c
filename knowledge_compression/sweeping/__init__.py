"""From a command line to finished runs: parsing, combinations, launching and progress.

``cli`` reads the command; ``combinations`` composes what it stands for; ``sweeper`` checks every combination before the
first one starts, and shows all of them at the end; ``launching`` gives each a process, ``local``
here and ``slurm`` on a cluster; ``plan`` is what is kept of a sweep, ``status`` says how far it is, and ``forecast``
what it would take.
"""
