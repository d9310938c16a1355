"""What a step may not do: wait for the device."""

import pytest
import torch
import upstream
from small_run import RECIPE
from tiny import tiny_set
from torch.utils._python_dispatch import TorchDispatchMode

from recontrast.experiments.paper_tables import ABLATION
from recontrast.recipes.paper import RECIPES
from recontrast.training.train import train

# On a GPU the host stands still in each: a number is read, or a size depends on the values.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")
SCALED = {"wipe_every": 2, "rest": 1}
TINY = {key: getattr(RECIPE, key) for key in ("backbone", "weights", "size", "batch")}


class Recorder(TorchDispatchMode):
    """Names of all operators, those of the backward pass too."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(str(op))
        if "aten.index" in str(op) and isinstance(args[1], list | tuple):  # a boolean index is a nonzero inside
            self.names += ["nonzero" for index in args[1] if index is not None and index.dtype == torch.bool]
        return op(*args, **(kwargs or {}))


def waits(recorded):
    return [name for name in recorded.names if any(wait in name for wait in WAITS)]


def test_the_reference_form_is_caught():
    teacher, student = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4, requires_grad=True)
    with Recorder() as recorded:
        upstream.global_cosine_hm([teacher], [student * 1]).backward()
    assert waits(recorded)  # boolean indexing in the backward pass
    with Recorder() as recorded:
        teacher.sum().item()
    assert waits(recorded)


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
def test_nothing_waits_between_two_lines(tmp_path, recipe, budget):
    """Not the mask, not the optimisers, not the schedule; the losses are read when a line is logged."""
    samples = tiny_set(tmp_path, train=8, good=0, defects=0)
    lines = []
    with Recorder() as recorded:
        train(
            recipe.replace(**TINY, steps=3, log_every=3), samples, device="cpu", teacher_cache=budget,
            on_log=lambda *line: lines.append(line),
        )  # fmt: skip
    assert not waits(recorded)
    assert any("convolution_backward" in name for name in recorded.names)  # the recorder saw the steps
    assert any("_fused_adamw" in name for name in recorded.names)
    assert len(lines) == 1
