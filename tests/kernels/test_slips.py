"""Slips of the hand fit the source that they edit; most of them run only among the slow tests."""

import sys
from unittest import mock

import pytest
import slips
from edited_cases import edited

TABLES = (
    slips.FORWARD,
    slips.BACKWARD,
    slips.HOPPER_FORWARD,
    slips.DECODE | slips.DECODE_SM100 | slips.DECODE_SM90,
)


@pytest.mark.parametrize("table", TABLES, ids=["forward", "backward", "forward sm_90", "decode"])
def test_every_slip_fits_the_source(table):
    for slip in table.values():
        with mock.patch.dict(sys.modules):
            assert edited(slip.module, slip.edits).__name__ == slip.module


def test_an_edit_that_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match="0 times"):
        edited(slips.SCHEDULE, [("what is not there", "")])
