"""Every mixer of the library: each promise of its traits, checked."""

import pytest

from lcattn.testing import conformance
from lcattn.testing.conformance.catalog import MIXERS

# Checks of a case share compiled programs, so one worker runs them all.
CHECKS = [
    pytest.param(check, id=name, marks=pytest.mark.xdist_group(case.name))
    for case in MIXERS
    for name, check in conformance.mixer_checks(case)
]


@pytest.mark.parametrize("check", CHECKS)
def test_mixer(check):
    check()
