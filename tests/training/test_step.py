"""Training steps do not wait for the device."""

import pytest
import torch
import upstream
from small_run import RECIPE
from tiny import tiny_set
from torch.utils._python_dispatch import TorchDispatchMode

from recontrast.experiments.paper_tables import ABLATION
from recontrast.recipes.paper import RECIPES
from recontrast.training.train import train

# Operators in which the host waits for a GPU: they read a number, or the size of their result depends on values.
WAITING_OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")
SCALED = {"wipe_every": 2, "rest": 1}
TINY = {key: getattr(RECIPE, key) for key in ("backbone", "weights", "size", "batch")}


class Recorder(TorchDispatchMode):
    """Records the names of all operators, including those of the backward pass."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(str(op))
        if "aten.index" in str(op) and isinstance(args[1], list | tuple):  # a boolean index calls nonzero
            self.names += ["nonzero" for index in args[1] if index is not None and index.dtype == torch.bool]
        return op(*args, **(kwargs or {}))


def find_waits(recorder):
    return [name for name in recorder.names if any(wait in name for wait in WAITING_OPERATORS)]


def test_waits_of_the_reference_are_found():
    teacher, student = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4, requires_grad=True)
    with Recorder() as recorder:
        upstream.global_cosine_hm([teacher], [student * 1]).backward()
    assert find_waits(recorder)  # boolean indexing in the backward pass
    with Recorder() as recorder:
        teacher.sum().item()
    assert find_waits(recorder)


@pytest.mark.parametrize(
    "recipe, budget",
    [
        (RECIPES["mvtec"], 0),
        (RECIPES["mvtec"].replace(precision="bfloat16"), 2**30),
        (RECIPES["mvtec_stable"].replace(**SCALED), 0),
        (RECIPES["mvtec_unified"], 0),
        (RECIPES["mvtec"].replace(**ABLATION["A"]), 0),
    ],
    ids=["mvtec", "bfloat16-cache", "stable", "unified", "A"],
)
def test_no_operator_waits_between_two_log_lines(tmp_path, recipe, budget):
    """Neither mining, optimisers nor schedule wait; the losses are read for the log line."""
    samples = tiny_set(tmp_path, train=8, good=0, defects=0)
    lines = []
    with Recorder() as recorder:
        train(
            recipe.replace(**TINY, steps=3, log_every=3), samples, device="cpu", teacher_cache=budget,
            on_log=lambda *line: lines.append(line),
        )  # fmt: skip
    assert not find_waits(recorder)
    assert any("convolution_backward" in name for name in recorder.names)  # the steps were recorded
    assert any("_fused_adamw" in name for name in recorder.names)
    assert len(lines) == 1
