import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: runs its kernels on the CPU

torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it brings, on a busy machine far more
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
    """Makes the miniature of an original download in a folder of its own and gives that folder."""
    from downloads import DOWNLOADS

    def make(name):
        root = tmp_path / "downloads" / name
        DOWNLOADS[name](root)
        return root

    return make
