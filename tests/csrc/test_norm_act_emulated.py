"""The CUDA kernels of norm_act, emulated on the CPU (`emulate_cuda`), against float64."""

import emulate_cuda
import pytest
import torch
from emulate_cuda import twice
from norm_act_cases import VARIANTS, check_kernels, make_arguments, make_gradient, run_kernels
from op_cases import LAYOUTS, ROUNDING

from recontrast import reference

pytestmark = [
    pytest.mark.skipif(emulate_cuda.COMPILER is None, reason="NO G++: THE CUDA KERNELS WERE NOT EMULATED"),
    pytest.mark.usefixtures("_poisoned_memory"),
]
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# Whole vectors; odd sizes; more channels than a block has lanes for; one value of many images; one channel.
SHAPES = [(2, 64, 8, 8), (3, 5, 7, 13), (2, 300, 2, 2), (5, 3, 1, 1), (2, 1, 9, 11)]


def check(emulated, arguments, act, processors=4):
    tolerance = max(3 * ROUNDING[arguments[0].dtype], 3e-6 if arguments[0].dtype == F32 else 0)
    grad = make_gradient(arguments, act, tolerance)
    results = twice(emulated, lambda ops: run_kernels(ops, arguments, act, grad), processors)
    check_kernels(results, arguments, act, grad, tolerance)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_equals_float64(emulated, variant, layout):
    act, has_residual, training = variant
    for shape in SHAPES:
        check(emulated, make_arguments(shape, F32, layout, has_residual=has_residual, training=training), act)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [F64, BF16, F16], ids=str)
def test_dtypes(emulated, dtype, layout):
    for act, has_residual, training in (("relu", True, True), ("gelu", False, True), ("none", False, False)):
        for shape in [(2, 64, 8, 8), (3, 5, 7, 13)]:
            check(emulated, make_arguments(shape, dtype, layout, has_residual=has_residual, training=training), act)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_number_of_multiprocessors(emulated, layout):
    """It sets the number of parts of a reduction."""
    for processors in (1, 3, 132):
        for shape in [(2, 8, 33, 32), (1, 1030, 6, 4)]:
            check(emulated, make_arguments(shape, F32, layout, has_residual=True), "relu", processors)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "broadcast over the batch"])
def test_layouts(emulated, layout):
    for shape in [(2, 8, 4, 6), (3, 5, 7, 13)]:
        check(emulated, make_arguments(shape, F32, layout, has_residual=True), "gelu")


def test_mean_far_from_zero_does_not_cancel(emulated):
    x = torch.randn(4, 6, 33, 35) + 1e4
    _, moments = twice(emulated, lambda ops: ops.norm_act(x, None, None, None, None, None, "none", 1e-5))
    expected = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(moments[1].double(), expected, rtol=1e-4, atol=0)  # the means of parts are float32


def test_gradient_in_parameters_alone(emulated):
    arguments = make_arguments((2, 6, 5, 4), F32)
    grad = torch.randn_like(arguments[0])
    results = twice(emulated, lambda ops: run_kernels(ops, arguments, "none", grad, wants_x=False))
    assert results[2].numel() == 0
    torch.testing.assert_close(results[4], run_kernels(reference, arguments, "none", grad)[4], rtol=1e-4, atol=1e-4)


def test_empty_features(emulated):
    for shape in [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5)]:
        x, channels = torch.ones(shape), torch.ones(shape[1])
        y, moments = twice(emulated, lambda ops, x=x, c=channels: ops.norm_act(x, None, c, c, None, None, "relu", 1e-5))
        assert y.shape == shape and not moments.any()
        _, moments = twice(emulated, lambda ops, x=x, c=channels: ops.norm_act(x, None, c, c, c, c, "relu", 1e-5))
        assert torch.equal(moments, torch.ones(2, shape[1]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("training", [True, False])
def test_values_that_are_not_finite(emulated, value, training):
    for layout in ("nchw", "channels_last"):
        arguments = make_arguments((2, 20, 4, 5), F32, layout, has_residual=True, training=training)
        arguments[0][1, 3, 2, 2] = value
        grad = torch.randn_like(arguments[0])
        results = twice(emulated, lambda ops, a=arguments, g=grad: run_kernels(ops, a, "relu", g))
        for ours, theirs in zip(results, run_kernels(reference, arguments, "relu", grad), strict=True):
            if ours.shape == (2, 20):
                assert torch.equal(ours.isfinite(), theirs.isfinite())
            else:
                torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-3, atol=1e-3)
