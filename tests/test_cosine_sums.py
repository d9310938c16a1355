"""The cosine_sums operator equals the float64 reference on every available device."""

import pytest
import torch
from op_cases import DTYPES, LAYOUTS, ROUNDING, SHAPES, relative_error

from recontrast import ops, reference
from recontrast.ops import cosine_sums

backward = torch.ops.recontrast.cosine_sums_backward


def make_pair(shape, dtype=torch.float32, device="cpu", layout="nchw", other=None, **kwargs):
    x, y = (torch.randn(shape, device=device).to(d) for d in (dtype, other or dtype))
    return tuple(LAYOUTS[layout](t).requires_grad_(**kwargs) if kwargs else LAYOUTS[layout](t) for t in (x, y))


def check_against_reference(x, y):
    expected = reference.cosine_sums(x.double(), y.double())
    sums = cosine_sums(x, y)
    assert sums.dtype == reference.sum_dtype(x, y)
    assert relative_error(sums, expected) < (1e-5 if sums.dtype == torch.float32 else 1e-14)
    grad = torch.randn_like(sums) * (torch.rand(sums.shape[1:], device=sums.device) < 0.4)  # most points are easy
    gradient = backward(grad, x, y)
    assert gradient.dtype == y.dtype
    assert gradient.stride() == torch.empty_like(y).stride()
    expected = reference.cosine_sums_backward(grad.double(), x.double(), y.double())
    assert relative_error(gradient, expected) < ROUNDING[y.dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, dtype, layout, device):
    check_against_reference(*make_pair(shape, dtype, device, layout))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("other", DTYPES, ids=str)
def test_mixed_dtypes(dtype, other, layout, device):
    check_against_reference(*make_pair((3, 5, 7, 13), dtype, device, layout, other))


@pytest.mark.parametrize("layouts", [("nchw", "channels_last"), ("channels_last", "nchw")], ids=str)
def test_mixed_layouts(layouts, device):
    x, y = make_pair((2, 40, 9, 11), device=device)
    check_against_reference(LAYOUTS[layouts[0]](x), LAYOUTS[layouts[1]](y))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_large_gradient_is_written_completely(layout, device):
    """Large results use recycled memory that still holds old numbers."""
    for shape in [(4, 64, 64, 64), (3, 64, 64, 66), (4, 64, 64, 64)]:
        check_against_reference(*make_pair(shape, device=device, layout=layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number_is_converted_exactly(dtype, device):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    values = values[values.isfinite()].reshape(1, 1, 1, -1)
    assert torch.equal(cosine_sums(values, torch.ones_like(values))[0], values[0].float())
    scale = 10.0 ** torch.empty(100_000).uniform_(-9, 6)
    numbers = torch.cat([torch.randn(100_000) * scale, values.cpu().flatten().float()]).reshape(1, 1, 1, -1).to(device)
    grad = torch.zeros(3, 1, 1, numbers.numel(), device=device)
    grad[0] = 1
    torch.testing.assert_close(
        backward(grad, numbers, torch.zeros_like(numbers, dtype=dtype)), numbers.to(dtype), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_easy_points_are_not_read(dtype, device):
    x, y = make_pair((2, 40, 9, 11), dtype, device, "channels_last")
    grad = torch.randn(3, 2, 9, 11, device=device)
    easy = torch.rand(2, 9, 11, device=device) < 0.7
    grad[:, easy] = 0
    expected = reference.cosine_sums_backward(grad, x, y)
    for t in (x, y):
        t.permute(0, 2, 3, 1)[easy] = torch.nan
    assert relative_error(backward(grad, x, y), expected.double()) < ROUNDING[dtype]


def test_number_of_threads_does_not_change_the_result():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            torch.manual_seed(1)
            for layout in ("nchw", "channels_last"):
                x, y = make_pair((3, 130, 33, 35), layout=layout)
                sums = cosine_sums(x, y)
                results.append((sums, backward(sums, x, y)))
    finally:
        torch.set_num_threads(threads)
    for result, previous in zip(results[2:], results, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(result, previous, strict=True))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_opcheck(layout, device):
    x, y = make_pair((2, 3, 4, 5), device=device, layout=layout, requires_grad=True)
    torch.library.opcheck(torch.ops.recontrast.cosine_sums.default, (x, y))
    x, y = x.detach(), y.detach()
    torch.library.opcheck(torch.ops.recontrast.cosine_sums_backward.default, (cosine_sums(x, y), x, y))


def test_gradient(device):
    x, y = make_pair((2, 3, 4, 5), torch.float64, device, requires_grad=True)
    torch.autograd.gradcheck(cosine_sums, (x, y))


def test_empty_features(device):
    for shape in [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)]:
        x, y = make_pair(shape, device=device, requires_grad=True)
        sums = cosine_sums(x, y)
        assert sums.shape == (3, shape[0], *shape[2:])
        assert not sums.any()
        sums.sum().backward()
        assert y.grad.shape == shape


@pytest.mark.parametrize(
    "x, y, message",
    [
        (torch.ones(2, 3), torch.ones(2, 3), r"x: wanted \(N, C, H, W\), got \(2, 3\)"),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5), r"y: wanted the shape of x, .*, got \(1, 2, 3, 5\)"),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4).int(), "or float64, got float32 and int32"),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4, device="meta"), "y: wanted the device of x, cpu, got meta"),
    ],
)
def test_invalid_arguments_raise(x, y, message):
    with pytest.raises(ValueError, match=message):
        cosine_sums(x, y)


def test_kernel_checks_the_size_of_the_gradient(device):
    x, y = make_pair((1, 2, 3, 4), device=device)
    if ops.BACKEND[device] == "native":
        with pytest.raises(RuntimeError, match=r"grad: wanted \(3, N, H, W\)"):
            backward(torch.ones(3, 1, 3, 5, device=device), x, y)
