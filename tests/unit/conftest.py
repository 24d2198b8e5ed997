"""The target that most tests of speculation share, and drafts of several qualities for it."""

import pytest
from speculation_cases import SCALES, tokenized
from tiny_models import perturbed


@pytest.fixture(scope="session")
def model():
    return tokenized()


@pytest.fixture(scope="session")
def drafts(model):
    """Drafts by the noise on their weights."""
    return {scale: perturbed(model, scale) for scale in SCALES}
