"""Random calls of the CPU kernels of norm_act, for a build with sanitizers: each gives the oracle's answer or an error.

    python tests/fuzz_norm_act.py LIBRARY SEED SECONDS

tests/csrc/test_sanitizers.py builds the library and runs this: for some seconds, or for five minutes with
`pytest -m campaign tests/csrc/test_sanitizers.py`. At least 50 calls are made; their number is printed. Allocations end
where a tensor ends, so that the sanitizer sees reads and writes past it.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import recontrast.norm_act  # defines the operators, without kernels
from recontrast import reference

DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}
REFUSED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.uint8, torch.bool, torch.complex64)
SIZES = (0, 1, 2, 3, 5, 8, 9, 16, 17, 33, 64)
EPS = 1e-5


def choose(values):
    values = list(values)
    return values[torch.randint(len(values), ()).item()]


def make_features(shape, dtype, layout):
    """Features whose memory holds no more than they need, in one of many layouts."""
    n, c, h, w = shape
    x = torch.randn(shape, dtype=torch.float64).mul(choose((1e-3, 1, 30))).add(choose((0, 0, 5))).to(dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "slice":  # of channels, at the end of the memory
        return torch.cat([x, x], 1)[:, c:]
    if layout == "strided":
        return torch.cat([x[..., None], x[..., None]], -1).flatten(-2)[..., ::2] if w else x
    if layout == "expanded" and n > 1:
        return x[:1].expand(shape)
    if layout == "one value":
        return x[:, :, :1, :1].expand(shape) if h and w else x
    return x


def spoil(x):
    """Put NaN and Infinity in some places, or make a channel constant."""
    if x.numel() and not any(stride == 0 for stride in x.stride()):
        kind = choose(("", "", "nan", "inf", "constant"))
        if kind == "constant":
            x[:, 0] = 3.0
        elif kind:
            x[choose(range(len(x))), 0, 0, 0] = float(kind)
    return x


def agrees(ours, expected, tolerance):
    """Whether results agree: within rounding, and not finite in the same places."""
    ours, expected = ours.double(), expected.double()
    finite = expected.isfinite()
    if ours.shape != expected.shape or not torch.equal(ours.isfinite(), finite):
        return False
    error, scale = (ours - expected)[finite].abs(), expected[finite].abs()
    return not len(error) or bool(error.max() <= tolerance * max(scale.max(), 1e-3))


def clear_undecided(grad, x, residual, weight, bias, moments):
    """Return ``grad`` with zeros where rounding decides whether ReLU's input is positive."""
    wide = x.double()
    mean, var = (row.double()[:, None, None] for row in moments)
    v = (wide - mean) / (var + EPS).sqrt()
    v = v if weight is None else v * weight.double()[:, None, None]
    v = v if bias is None else v + bias.double()[:, None, None]
    v = v if residual is None else v + residual.double()
    if any(stride == 0 for stride in grad.stride()):
        grad = grad.contiguous()
    return grad.masked_fill_(v.abs() <= 0.02 * v[v.isfinite()].abs().amax(), 0) if v.isfinite().any() else grad


def run_once():
    """Make one random call of both directions; raise AssertionError for a wrong answer."""
    shape = tuple(choose(SIZES) for _ in range(4))
    dtype = choose(DTYPES)
    layouts = ("nchw", "channels_last", "transposed", "slice", "strided", "expanded", "one value")
    x = spoil(make_features(shape, dtype, choose(layouts)))
    residual = spoil(make_features(shape, dtype, choose(layouts))) if choose((True, False)) else None
    parameter = choose(DTYPES)
    weight, bias = (torch.randn(shape[1]).to(parameter) if choose((True, False)) else None for _ in "wb")
    training = choose((True, False))
    mean, var = (None, None) if training else (torch.randn(shape[1]), torch.rand(shape[1]) * choose((0, 1)))
    act = choose(("none", "relu", "gelu"))
    if choose(range(8)) == 0:
        run_refused(shape, x, act)
        return
    operators = torch.ops.recontrast
    forward = (x, residual, weight, bias, mean, var, act, EPS)
    y, moments = operators.norm_act(*forward)
    assert y.dtype == dtype and y.shape == x.shape
    kept = None if residual is None or act == "none" else y if act == "relu" else residual
    grad = make_features(shape, dtype, choose(layouts))
    if act == "relu" and 0 not in shape:
        grad = clear_undecided(grad, x, residual, weight, bias, moments)
    back = (grad, x, kept, weight, bias, moments, training, act, EPS, choose((True, False)))
    results = operators.norm_act_backward(*back)
    expected, expected_moments = reference.norm_act(*forward)
    # The rounding of a constant channel is divided by nearly nothing.
    is_flat = bool((expected_moments[1] < 1e-5 * expected_moments[0].square() + 1e-9).any())
    case = shape, dtype, act, training, x.stride(), None if residual is None else residual.stride(), grad.stride()
    assert is_flat or agrees(y, expected, 8 * DTYPES[dtype]), case
    for ours, theirs in zip(results, reference.norm_act_backward(*back), strict=True):
        assert ours.shape == theirs.shape, case
        assert is_flat or agrees(ours, theirs, 100 * DTYPES[dtype]), case


def run_refused(shape, x, act):
    """Call the kernels with what they must refuse; they must not touch its memory."""
    wrong = torch.zeros(shape, dtype=torch.uint8).to(choose(REFUSED))
    short = torch.zeros(shape[1] + 1)
    moments = torch.zeros(2, shape[1])
    operators = torch.ops.recontrast
    calls = [
        lambda: operators.norm_act(wrong, None, None, None, None, None, act, EPS),
        lambda: operators.norm_act(x, None, short, None, None, None, act, EPS),
        lambda: operators.norm_act(x, None, None, wrong.flatten()[: shape[1]], None, None, act, EPS),
        lambda: operators.norm_act(x[0] if len(x) else x.flatten(), None, None, None, None, None, act, EPS),
        lambda: operators.norm_act(x, torch.zeros(*shape[:3], shape[3] + 1), None, None, None, None, act, EPS),
        lambda: operators.norm_act(x, None, None, None, None, None, "tanh", EPS),
        lambda: operators.norm_act(x, None, None, None, short, short, act, EPS),
        lambda: operators.norm_act_backward(wrong, wrong, None, None, None, moments, True, act, EPS, True),
        lambda: operators.norm_act_backward(x, x, None, None, None, moments[:1], True, act, EPS, True),
    ]
    try:
        choose(calls)()
    except (RuntimeError, NotImplementedError) as error:
        assert "norm_act" in str(error), error
        return
    assert 0 in shape, "a wrong argument was taken"


def main():
    """Fuzz for some seconds."""
    library, seed, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    torch.ops.load_library(library)
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    started, calls = time.monotonic(), 0
    while time.monotonic() - started < seconds or calls < 50:
        run_once()
        calls += 1
    print(calls, "calls of", recontrast.norm_act.__name__)


if __name__ == "__main__":
    main()
