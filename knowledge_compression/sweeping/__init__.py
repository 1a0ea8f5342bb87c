"""From a command line to finished runs: parsing, combinations, launching and progress.

``cli`` parses the command; ``combinations`` composes its combinations; ``sweeper`` checks all of them before the first
one starts, and summarises them at the end; ``launching`` gives each a process, ``local`` on this machine and ``slurm``
on a cluster; ``plan`` is the record of a sweep, ``status`` shows its progress, and ``forecast`` estimates its cost.
"""
