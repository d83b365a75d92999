"""Fixtures for the tests of benchmarks."""

import pytest


@pytest.fixture
def one_thread():
    """Gives PyTorch one thread: for a model this small, its threads would mostly wait."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
