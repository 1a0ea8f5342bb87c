"""What several test modules share; pytest finds it through ``pythonpath`` (pyproject.toml), however it is started."""

import pytest

pytest.register_assert_rewrite("helpers.questions")
