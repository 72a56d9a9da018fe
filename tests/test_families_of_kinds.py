"""The tests of test_families.py for families whose layers are of several kinds, in a file that another process can run."""

import families
import pytest
import test_families

EVERY_FAMILY = {"test_programs_do_not_grow_with_layers"}  # which that file tests
tests = {name: test for name, test in vars(test_families).items() if name.startswith("test_")}
globals().update({name: test for name, test in tests.items() if name not in EVERY_FAMILY})


@pytest.fixture(scope="module", params=[c for c in families.CASES if c[0] in families.OF_KINDS], ids="-".join)
def case(request, tmp_path_factory):
    yield from test_families.made(request.param, tmp_path_factory)
