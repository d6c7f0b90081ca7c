"""Check that the list of mutations fits the code; `python -m tests.mutations` applies them."""

import re

import pytest

from tests.helpers import ROOT
from tests.mutations import MUTATIONS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_mutations_fit_the_code(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.text) == 1
    assert mutation.replacement != mutation.text
    for test in mutation.tests:
        file, name = re.fullmatch(r"(test_\w+\.py)::(test_\w+)(?:\[.*\])?", test).groups()
        assert f"def {name}(" in (ROOT / "tests" / file).read_text()
