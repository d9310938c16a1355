"""The Triton kernels of norm_act against float64: on a GPU if there is one, else in Triton's interpreter."""

import pytest
import torch
from norm_act_cases import VARIANTS, check_kernels, make_arguments, make_gradient, run_kernels
from op_cases import LAYOUTS

from recontrast.kernels import norm_act

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
TOLERANCE = {F64: 1e-13, F32: 5e-6, F16: 3e-3, BF16: 2.4e-2}  # the interpreter truncates to bfloat16
# As in a model; odd sizes; one value of many images; one channel; more positions than a tile.
SHAPES = [(2, 64, 8, 8), (3, 5, 7, 13), (5, 3, 1, 1), (2, 1, 9, 11), (1, 6, 40, 70)]


def check(arguments, act):
    tolerance = TOLERANCE[arguments[0].dtype]
    grad = make_gradient(arguments, act, tolerance)
    check_kernels(run_kernels(norm_act, arguments, act, grad), arguments, act, grad, tolerance)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_equals_float64(variant, layout):
    act, has_residual, training = variant
    for shape in SHAPES:
        check(make_arguments(shape, F32, layout, has_residual=has_residual, training=training, device=DEVICE), act)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_dtypes_and_layouts(dtype, layout):
    if layout == "broadcast over the batch":
        pytest.skip("its gradients have other strides")
    for act, has_residual, training in (("relu", True, True), ("gelu", False, True), ("none", False, False)):
        shape = (2, 20, 6, 10)
        check(make_arguments(shape, dtype, layout, has_residual=has_residual, training=training, device=DEVICE), act)


def test_mean_far_from_zero_does_not_cancel():
    x = (torch.randn(4, 6, 33, 35) + 1e4).to(DEVICE)
    _, moments = norm_act.norm_act(x, None, None, None, None, None, "none", 1e-5)
    expected = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(moments[1].double(), expected, rtol=1e-5, atol=0)


def test_empty_features():
    for shape in [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5)]:
        arguments = (torch.ones(shape, device=DEVICE), None, *torch.ones(2, shape[1], device=DEVICE), None, None)
        y, moments, grad_x, _, sums = run_kernels(norm_act, arguments, "relu", torch.ones(shape, device=DEVICE))
        assert y.shape == grad_x.shape == shape
        assert not moments.any() and not sums.any()
