"""Every op of the library, in every implementation, through the whole suite."""

import pytest

from lcattn.testing import conformance
from lcattn.testing.conformance.catalog import OPS

CHECKS = [pytest.param(check, id=name) for op in OPS for name, check in conformance.op_checks(op)]


@pytest.mark.parametrize("check", CHECKS)
def test_op(check):
    check()
