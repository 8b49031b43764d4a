"""Every op of the library, in every implementation, through the whole suite."""

import pytest

from lcattn.testing import conformance
from lcattn.testing.conformance.catalog import OPS

# Checks of a case share compiled programs, so one worker runs them all.
CHECKS = [
    pytest.param(check, id=name, marks=pytest.mark.xdist_group(op.name))
    for op in OPS
    for name, check in conformance.op_checks(op)
]


@pytest.mark.parametrize("check", CHECKS)
def test_op(check):
    check()
