"""Every mixer of the library: each promise of its traits, checked."""

import pytest

from lcattn.testing import conformance
from lcattn.testing.conformance.catalog import MIXERS

CHECKS = [
    pytest.param(check, id=name)
    for case in MIXERS
    for name, check in conformance.mixer_checks(case)
]


@pytest.mark.parametrize("check", CHECKS)
def test_mixer(check):
    check()
