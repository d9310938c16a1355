import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # set before triton is imported, so that its kernels run on the CPU

torch.set_num_threads(1)  # tensors are small, so a second thread only adds overhead
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def pytest_report_header():
    from recontrast import ops

    return f"recontrast kernels: {ops.BACKEND} {ops.WHY or ''}"


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def download(tmp_path):
    """Return a function that creates a miniature of an original download and returns its folder."""
    from downloads import DOWNLOADS

    def make(name):
        root = tmp_path / "downloads" / name
        DOWNLOADS[name](root)
        return root

    return make
