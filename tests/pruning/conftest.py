"""Two threads, with which libraries take other paths than with the single one of most tests."""

import pytest
import torch


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
