"""With two threads libraries take other paths than with one, as most tests have."""

import pytest
import torch


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
