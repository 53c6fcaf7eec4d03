"""The device of these tests: a CUDA GPU. NINEFOLD_TEST_DEVICE=cpu tries the tests themselves where there is none."""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    name = os.environ.get("NINEFOLD_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA GPU")
    return torch.device(name)
