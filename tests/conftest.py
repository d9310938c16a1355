import os
import signal
import warnings
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # set before triton is imported, so that its kernels run on the CPU

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts jobs in the background so, and tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tensors are small, so a second thread only adds overhead
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same in processes that tests start
with warnings.catch_warnings():  # the tests also run on plain PyTorch; the header says which kernels they run
    warnings.filterwarnings("ignore", "recontrast runs")
    from recontrast import ops
    from recontrast.runtime import termination

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
# Folders of which --every leaves nothing out, as of the files beside this one: kernels, metrics, rules for each file.
WHOLE = ("csrc", "kernels", "metrics", "campaigns")


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="run every N-th case of each test")
    parser.addoption("--first", type=int, default=0, metavar="K", help="with --every: index of the first case, from 0")


def pytest_report_header():
    return f"recontrast kernels: {ops.BACKEND} {ops.WHY or ''}"


def pytest_collection_modifyitems(config, items):
    """Leave out the combinations of parameters that `cover_pairs` marks, and the cases that --every leaves out."""
    left_out = set()
    if "exhaustive" not in config.option.markexpr:
        left_out = {item for item in items if item.get_closest_marker("exhaustive")}
    left_out |= _leave_out_cases((item for item in items if item not in left_out), config.option)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _leave_out_cases(items, option):
    """Return the cases that --every leaves out; at least one case of each test is run."""
    cases, folder = {}, Path(__file__).parent
    for item in items:
        parts = item.path.relative_to(folder).parts if item.path.is_relative_to(folder) else ()
        if len(parts) > 1 and parts[0] not in WHOLE:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return {
        item
        for group in cases.values()
        for i, item in enumerate(group)
        if (i - option.first) % min(option.every, len(group))
    }


def _run_with_posix():
    """Skip a test that itself calls what Windows lacks, such as os.fork; in the package, such a call is a failure."""
    try:
        return (yield)
    except AttributeError as error:
        frame = error.__traceback__
        while frame.tb_next:
            frame = frame.tb_next
        is_test = Path(frame.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)
        if is_test and error.obj in (os, signal) and not hasattr(signal, "SIGKILL"):
            pytest.skip(f"{error.name} does not exist on this system")
        raise


pytest_runtest_setup = pytest_runtest_call = pytest.hookimpl(wrapper=True)(_run_with_posix)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _signal_handlers():
    """A command that a test calls in this process sets handlers; the next test must not depend on them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *termination.SIGNALS)}
    yield
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) is not handler:  # None: set outside Python
            signal.signal(number, handler)


@pytest.fixture
def download(tmp_path):
    """Return a function that creates a miniature of an original download and returns its folder."""
    from downloads import DOWNLOADS

    def make(name):
        root = tmp_path / "downloads" / name
        DOWNLOADS[name](root)
        return root

    return make
