"""What is chosen from numbers: memory, rates, lengths, names of columns."""

from __future__ import annotations

import pytest

from qtarget.starting.choices import Size, fit, memory, packing_pays, row_length
from qtarget.starting.columns import renamed_columns
from qtarget.starting.config_file import Line, config_text
from qtarget.starting.machine import Machine, free_memory

SMALL = Size(1_000_000, 4, 144, 512, 256)
SEVEN = Size(7_000_000_000, 32, 4096, 150_000, 32_768)


def machine(gigabytes: float, bf16: bool = True) -> Machine:
    return Machine("test", "cuda", int(gigabytes * 1e9), bf16)


def test_the_least_saving_that_fits_is_taken():
    assert fit(SMALL, 256, 1000, machine(16)) == fit(SMALL, 256, 1000, machine(160))
    whole, adapter, none = (fit(SEVEN, 1024, 5000, machine(size)) for size in (300, 60, 10))
    assert (whole.adapter, whole.fits) == (False, True)
    assert (adapter.adapter, adapter.fits) == (True, True)
    assert (none.adapter, none.batch, none.checkpointing, none.fits) == (True, 1, True, False)
    for found in (whole, adapter, none):
        assert found.batch * found.accumulation == 16


def test_who_asks_for_an_adapter_or_for_all_weights_gets_it():
    asked, refused = (
        fit(SMALL, 256, 1000, machine(16), adapter=True),
        fit(SEVEN, 1024, 5000, machine(60), adapter=False),
    )
    assert asked.adapter and asked.needed < fit(SMALL, 256, 1000, machine(16)).needed
    assert not refused.adapter and not refused.fits


def test_memory_is_what_its_docstring_says():
    weights = 16 * SMALL.parameters
    one, two = (memory(SMALL, n, adapter=False, checkpointing=False, bf16=False) for n in (100, 200))
    assert two - one == 100 * 144 * 4 * 20 * 4  # tokens, width, layers, values a layer, bytes
    assert one - (two - one) == weights + 3 * 2**27


def test_lengths_stay_within_the_positions_of_the_model():
    assert row_length([100, 300], 256) == 256
    assert row_length([], None) == 64


def test_packing_pays_for_many_rows_of_unlike_lengths_alone():
    unlike = [10] * 30_000 + [1000] * 300
    unlike = [length for pair in zip(unlike, reversed(unlike), strict=True) for length in pair]
    assert packing_pays(unlike, 1000, 16)
    assert not packing_pays([1000] * 3000, 1000, 16)
    assert not packing_pays([10, 1000] * 50, 1000, 16)


def test_a_containers_limit_counts(tmp_path):
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert free_memory(tmp_path) == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) > 2000


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"instruction": "a", "context": "b", "response": "c"}, {"context": "input", "response": "output"}),
        ({"Question": "a", "Answer": "b"}, {"Question": "instruction", "Answer": "output"}),
        ({"question": "a", "answer": 7}, {}),
        ({"question": "a", "query": "b", "answer": "c"}, {}),
        ({"text": "a"}, {}),
    ],
)
def test_columns_are_renamed_where_nothing_else_can_be_meant(row, names):
    assert renamed_columns(row) == names


def test_the_file_reads_the_same_in_yaml_1_1_and_1_2():
    import yaml

    from qtarget.cli.options.settings import parse_yaml

    values = {
        "learning_rate": 2e-5,
        "bf16": False,
        "a": "no",
        "b": ["x", "y"],
        "c": {"k": 0.05},
        "d": "a: b # c",
        "n": 3,
    }
    text = config_text([Line(key, value, "why") for key, value in values.items()], "Rows.")
    assert yaml.safe_load(text) == values == parse_yaml(text)
