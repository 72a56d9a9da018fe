"""The tests of test_families.py for families whose layers are of several kinds, in a file that another process can run."""

import families
import pytest
import test_families

EVERY_FAMILY = {"test_programs_do_not_grow_with_layers"}  # which that file tests
of_cases = vars(test_families).keys() - EVERY_FAMILY
globals().update({name: getattr(test_families, name) for name in of_cases if name.startswith("test_")})


@pytest.fixture(scope="module", params=[c for c in families.CASES if c[0] in families.OF_KINDS], ids="-".join)
def case(request, tmp_path_factory):
    yield from test_families.made(request.param, tmp_path_factory)
