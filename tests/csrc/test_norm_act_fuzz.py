"""Random calls of norm_act: shapes, strides, dtypes and values that no list of cases holds."""

import fuzz_norm_act
import pytest
import torch

from recontrast import ops


@pytest.mark.skipif(ops.BACKEND["cpu"] != "native", reason="THE KERNELS WERE NOT COMPILED")
@pytest.mark.parametrize("seed", range(3))
def test_random_calls(seed):
    """Each gives the oracle's answer, or one error for what has none."""
    torch.manual_seed(seed)
    for _ in range(25):
        fuzz_norm_act.run_once()


@pytest.mark.skipif(ops.BACKEND["cpu"] != "native", reason="THE KERNELS WERE NOT COMPILED")
def test_wrong_arguments_are_refused():
    torch.manual_seed(0)
    for dtype in fuzz_norm_act.DTYPES:
        for layout in ("nchw", "channels_last", "expanded"):
            shape = (2, 5, 3, 4)
            for _ in range(6):
                fuzz_norm_act.run_refused(shape, fuzz_norm_act.make_features(shape, dtype, layout), "relu")


def test_a_wrong_answer_is_noticed():
    """Otherwise the tests above could not fail."""
    ours, expected = torch.ones(4), torch.ones(4)
    assert fuzz_norm_act.agrees(ours, expected, 1e-5)
    assert not fuzz_norm_act.agrees(ours + 1e-3, expected, 1e-5)
    assert not fuzz_norm_act.agrees(ours.index_fill(0, torch.tensor(1), torch.nan), expected, 1e-5)
