"""The paper's tables as data: every row and column is something that can be run, in full and in tiny form."""

import pytest

from analysis.paper.contents import tables
from analysis.paper.result import column_id, row_id
from analysis.published import published_gains, results
from crm.cli.options import find_sweep
from crm.conditions import condition

FORMS = [(tiny, name) for tiny in (False, True) for name in tables()]


@pytest.mark.parametrize(("tiny", "name"), FORMS)
def test_every_row_is_a_variant_or_left_out_for_a_reason(tiny, name):
    table = tables(tiny)[name]
    for row in (row for row in table.rows if row.sweep):
        _, sweep = find_sweep(f"{row.sweep}@tiny" if tiny else row.sweep)
        for column in table.columns:
            variant = row.variant.format(column.key)
            assert variant in sweep.variants or sweep.left_out[variant], f"{row_id(row)}: no variant {variant!r}"


@pytest.mark.parametrize(("tiny", "name"), FORMS)
def test_cells_have_names_of_their_own_and_conditions_that_exist(tiny, name):
    table = tables(tiny)[name]
    assert len({row_id(row) for row in table.rows}) == len(table.rows)
    assert len({column_id(column) for column in table.columns}) == len(table.columns)
    for column in table.columns:
        assert [condition(one).name for one in column.conditions] == list(column.conditions)


@pytest.mark.parametrize("name", tables())
def test_published_numbers_are_of_a_column_and_have_a_source(name):
    table = tables()[name]
    for row in table.rows:
        for column, key in row.published.items():
            assert column in map(column_id, table.columns)
            assert results()[key].source and results()[key].selection


def test_numbers_from_memory_are_not_there_and_percent_are_percent():
    assert {found.tag for found in results().values()} <= set("RAX")
    assert all(30 < found.miou < 100 for found in results().values())


def test_every_published_gain_stands_below_a_table():
    notes = [note for table in tables(False).values() for note in table.notes]
    for one in published_gains().values():
        assert sum(f"{one.gain:+.1f} over" in note and one.source in note for note in notes) == 1
