"""Training run for the command line and for `recontrast.train`: locked, logged, and with a TensorBoard log."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from recontrast.app.console import is_silent
from recontrast.app.options import check_writable
from recontrast.app.train_job import TrainJob
from recontrast.data.locks import lock_folder
from recontrast.runtime.device import resolve_device
from recontrast.training.tensorboard import FOLDER, TensorBoardLogger, import_writer, list_own_events
from recontrast.training.train import TrainResult, train

OnStep = Callable[[str, int, int, str], None]  # category, finished steps, all steps, text with loss and speed


def check_run_options(
    *, device: str | torch.device | None, cache: Path | None, teacher_cache: float, tensorboard: bool
) -> None:
    """Check the options of `run_job`, before any image is listed.

    Args:
        device: PyTorch device; None for the default.
        cache: Folder for decoded images, or None.
        teacher_cache: Size of the cache of frozen features in GiB.
        tensorboard: Whether a TensorBoard log is written.

    Raises:
        ValueError: If this machine does not have the device, the folder cannot be written, or the size is negative.
        ImportError: If the package tensorboard is needed and not installed.
    """
    resolve_device(device)
    if cache is not None:
        check_writable(cache, "--cache")
    if not 0 <= teacher_cache < float("inf"):
        raise ValueError(f"--teacher-cache: wanted GiB of at least 0, got {teacher_cache:g}")
    if tensorboard:
        import_writer()


def run_job(
    job: TrainJob, *, device: str | torch.device | None, cache: Path | None, teacher_cache: float, tensorboard: bool,
    on_step: OnStep | None = None,
) -> TrainResult:  # fmt: skip
    """Train, optionally with a TensorBoard log; ``teacher_cache`` is in GiB."""
    limit = job.compute_time_limit()
    check_run_options(device=device, cache=cache, teacher_cache=teacher_cache, tensorboard=tensorboard)
    total, samples = job.steps, job.samples
    with ExitStack() as stack:
        if not is_silent():
            stack.enter_context(lock_folder(job.out))
            job.check_target()  # again: another process may have finished a run in the meantime
        replaced = list_own_events(job.out / FOLDER) if tensorboard and job.resume is None else []
        board = TensorBoardLogger(job.out / FOLDER, keep=job.done) if tensorboard else None
        if board is not None:
            stack.callback(board.close)

        def log(step: int, loss: float, rate: float, alpha: float) -> None:
            if board is not None:
                board.log(step, loss, rate, alpha)
            if on_step is not None:
                loss_text = "" if math.isnan(loss) else f"loss {loss:.4f}, "
                on_step(job.category, step, max(step, total), f"{loss_text}{rate:.1f} images/s")

        result = train(
            job.recipe, samples, category=job.category, out=job.out, device=device, resume=job.resume,
            cache_dir=cache, on_log=log, teacher_cache=int(teacher_cache * 2**30),
            time_limit=limit,
        )  # fmt: skip
        if board is not None:
            board.images(total, result.model, samples, result.recipe)
        for path in replaced:  # of the earlier run
            path.unlink(missing_ok=True)
    return result
