import pytest

pytest.register_assert_rewrite("tests.scoring.source_suite")
