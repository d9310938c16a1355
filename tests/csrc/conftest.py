import emulate_cuda
import pytest
import torch


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    return emulate_cuda.load(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def _poisoned_memory():
    """Fills new memory with NaN, so that elements that are never written are noticed."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
