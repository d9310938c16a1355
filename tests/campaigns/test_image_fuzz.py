"""Damaged images of every format: pixels or one sentence, no traceback, no hang, no crash, bounded memory."""

import os
import warnings

import image_fuzz
import numpy as np
import pytest

from recontrast.data import images
from recontrast.data.notices import ImageWarning

pytestmark = pytest.mark.filterwarnings("ignore::recontrast.data.notices.ImageWarning")
ROUND = 100  # files that one process decodes; a crash ends its process alone
MAX_BYTES = 1 << 30  # memory that a process may add
PROCESS_SECONDS = 300


def decode_round(folder, corpus, seed):
    """Decode damaged files in a child process; return what is wrong, or None."""
    report = folder / "report"
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            import resource  # which Windows lacks, as it does fork

            resource.setrlimit(resource.RLIMIT_CPU, (PROCESS_SECONDS, PROCESS_SECONDS))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            rng = np.random.default_rng(seed)
            names = sorted(corpus)
            for _ in range(ROUND):
                name = names[rng.integers(len(names))]
                content = image_fuzz.mutate(corpus[name], rng)
                report.write_text(f"{name}: the process ended")
                if fault := image_fuzz.describe_fault(folder / "x", content):
                    report.write_text(f"{name}: {fault}")
                    os._exit(1)
            added = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            report.write_text(f"{added} bytes of memory")
            code = int(added > MAX_BYTES)
        except BaseException as error:
            report.write_text(repr(error))
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if status == 0 else f"seed {seed}, status {status}: {report.read_text()}"


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", image_fuzz.MAX_PIXELS)
    (tmp_path / "corpus").mkdir()
    return image_fuzz.make_corpus(tmp_path / "corpus")


def test_damaged_images(campaign, corpus, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImageWarning)
        warnings.simplefilter("ignore", UserWarning)
        for seed in range(campaign.tries(3, 150)):
            fault = decode_round(tmp_path, corpus, seed)
            if fault is None:
                campaign.passed(ROUND)
            else:
                campaign.failed(fault)


def test_truncated_images(campaign, corpus, tmp_path):
    """A file that lacks a quarter or more of its end is refused; none gives pixels that are not those of the file."""
    for name, content in corpus.items():
        path = tmp_path / name
        for share in campaign.tries((0.3,), (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)):
            path.write_bytes(content[: int(share * len(content))])
            try:
                pixels = images.read_image(path)
            except ValueError:
                campaign.passed()
            else:
                whole = images.read_image(tmp_path / "corpus" / name)
                same = pixels.shape == whole.shape and np.array_equal(pixels, whole)
                campaign.passed() if same else campaign.failed(f"{name} cut to {share}: wrong pixels")
