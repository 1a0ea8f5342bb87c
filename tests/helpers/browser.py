"""Waiting in a real browser."""

from __future__ import annotations

import time


def until(page, expression, argument=None):
    """Wait for what is true in the page; playwright's own wait evaluates text there, which the policy forbids."""
    end = time.monotonic() + 300
    while not page.evaluate(expression, argument):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(20)
