"""Wrong inputs, tried through the command line: each ends in one line and status 2, or in an answer that is true.

``PYTHONPATH=tests python -m trials`` tries them all and prints how they ended.
"""
