import pytest

pytest.register_assert_rewrite("scoring.source_suite", "tests.scoring.source_suite")
