import pytest

pytest.register_assert_rewrite("tests.scoring.sources.source_suite")
