"""Wrong inputs, tried through the command line: each ends in one line and status 2, or in an answer that is true.

``python -m tests.trials`` tries them all and prints how they ended.
"""
