"""What a table lacks, submitted to a real Slurm: its cells are queued, then running, then fresh."""

import json

import pytest

from tests.slurm.cluster import Cluster, until
from tests.slurm.project import SLOW, Home

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
TABLE = "patch_size"
ASK = ("sweep", "--for", TABLE, "--tiny", "--cluster", "slurm", "--yes", "--no-smoke")


def states(home: Home) -> list[str]:
    """Of the cells that ask for a run, without the reason."""
    return [cell["state"] for cell in json.loads(home.crm("status", "--table", TABLE, "--tiny", "--json"))[TABLE]]


def test_what_a_table_lacks_is_queued_then_running_then_fresh(slurm: Cluster, home: Home):
    assert set(states(home)) == {"missing"}
    home.crm(*ASK, "--held")
    assert set(states(home)) == {"queued"}
    assert "nothing to do" in home.crm(*ASK, code=3)
    home.crm("release", f"ablation_{TABLE}@tiny+emm", "--yes")
    until(lambda: "running" in states(home), "a cell to be running", SLOW, home.story)
    until(lambda: set(states(home)) == {"fresh"}, "every cell to be fresh", SLOW, home.story)
    home.crm("tables", TABLE, "--final", "--tiny")
    assert "nothing to do" in home.crm(*ASK, code=3)
