"""The operators anomaly_map and anomaly_map_inside equal the float64 reference on every available device."""

import pytest
import torch
from op_cases import make_anomaly_map_arguments

from recontrast import ops, reference

CASES = {  # name -> sizes of the levels, size of the map, number of images
    "paper": ([(64, 64), (32, 32), (16, 16)], (256, 256), 3),
    "odd": ([(13, 7), (5, 9), (2, 3)], (97, 131), 2),
    "one point": ([(1, 1)], (5, 3), 1),
    "one pixel": ([(4, 4), (2, 2)], (1, 1), 2),
    "smaller than its features": ([(20, 24)], (11, 13), 2),
    "no image": ([(8, 8)], (16, 16), 0),
}


@pytest.mark.parametrize("blur", ["reflect", "zero5", None])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_reference(case, blur, device):
    distances, rows, cols = make_anomaly_map_arguments(*case, device, blur)
    maps, maximum = ops.anomaly_map(distances, rows, cols, 0.5)
    double = [[t.double() for t in tensors] for tensors in (distances, rows, cols)]
    expected, expected_maximum = reference.anomaly_map(*double, 0.5)
    torch.testing.assert_close(maps.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(maximum.double(), expected_maximum, rtol=1e-5, atol=1e-6)
    if maps.numel():
        assert torch.equal(maximum, maps.amax(dim=(1, 2)))


def make_factors(images, out, device, share=0.6):
    """Factors of a region with an empty row, an empty column and, of several images, one without a pixel."""
    factors = (0.5 + torch.rand(images, *out)) * (torch.rand(images, *out) < share)
    factors[:, out[0] // 2] = 0
    factors[:, :, out[1] // 3 : out[1] // 3 + 2] = 0
    if images > 1:
        factors[1] = 0
    return factors.to(device)


@pytest.mark.parametrize("kind", ["shared", "each", "half"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_inside_equals_reference(case, kind, device):
    _, out, images = case
    distances, rows, cols = make_anomaly_map_arguments(*case, device)
    region = make_factors(images if kind == "each" else 1, out, device)
    if kind == "half":
        region = torch.ones(1, *out, device=device)
        region[:, :, out[1] // 2 :] = 0
    factors = [region * (1 + i) for i in range(len(distances))]
    maps, maximum = ops.anomaly_map_inside(distances, rows, cols, factors, 0.5)
    double = [[t.double() for t in tensors] for tensors in (distances, rows, cols, factors)]
    expected, expected_maximum = reference.anomaly_map_inside(*double, 0.5)
    torch.testing.assert_close(maps.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(maximum.double(), expected_maximum, rtol=1e-5, atol=1e-6)
    inside = (region != 0).expand(maps.shape)
    assert not maps[~inside].any()
    for i in range(images):
        assert maximum[i] == (maps[i][inside[i]].max() if inside[i].any() else 0)


def test_values_that_are_not_finite_count_inside_alone(device):
    distances, rows, cols = make_anomaly_map_arguments([(16, 16)], (64, 96), 4, device)
    factors = torch.zeros(1, 64, 96, device=device)
    factors[:, :, :48] = 1
    distances = [d.clone() for d in distances]
    for image, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        distances[0][image, 8, 15] = value  # reaches no pixel inside
    maps, maximum = ops.anomaly_map_inside(distances, rows, cols, [factors] * 2)
    assert maps.isfinite().all() and maximum.isfinite().all() and not maps[:, :, 48:].any()
    for image, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        distances[1][image, 8, 2] = value
    _, maximum = ops.anomaly_map_inside(distances, rows, cols, [factors] * 2)
    assert maximum[:3].isnan().all() and maximum[3].isfinite()


def test_largest_value_inside_can_be_negative(device):
    distances, rows, cols = make_anomaly_map_arguments([(6, 8)], (20, 30), 3, device)
    factors = make_factors(1, (20, 30), device)
    maps, maximum = ops.anomaly_map_inside([-d - 0.1 for d in distances], rows, cols, [factors] * 2)
    assert (maximum < 0).all() and (maximum == maps[:, factors[0] != 0].amax(1)).all()


def test_arguments_of_a_region_are_checked(device):
    distances, rows, cols = make_anomaly_map_arguments([(6, 8)], (20, 30), 3, device)
    factors = [torch.ones(1, 20, 30, device=device)] * 2
    with pytest.raises(ValueError, match="anomaly_map_inside: factors: wanted 2, one for each pair, got 1"):
        ops.anomaly_map_inside(distances, rows, cols, factors[:1])
    for wrong in (factors[0][:, :19], factors[0].double(), factors[0].expand(3, -1, -1)):
        with pytest.raises(ValueError, match=r"anomaly_map_inside: factors\[1\]: wanted float32 \(3, 20, 30\) or"):
            ops.anomaly_map_inside(distances, rows, cols, [factors[0], wrong])
    with pytest.raises(ValueError, match="anomaly_map_inside: distances, rows and cols: wanted lists of one length"):
        ops.anomaly_map_inside(distances[:1], rows, cols, factors)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: SIZES THAT FILL ONE WERE NOT TRIED")
def test_many_images_on_the_device():
    """With many images, a block of the kernel processes four at once."""
    distances, rows, cols = make_anomaly_map_arguments([(64, 64), (32, 32), (16, 16)], (256, 256), 70, "cuda")
    maps, maximum = ops.anomaly_map(distances, rows, cols)
    double = [[t.double() for t in tensors] for tensors in (distances, rows, cols)]
    torch.testing.assert_close(maps.double(), reference.anomaly_map(*double, 1.0)[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(maximum, maps.amax(dim=(1, 2)))


def test_pairs_with_different_matrices(device):
    """The kernel identifies matrices by their address: equal copies, and different ones of the same size."""
    distances, rows, cols = make_anomaly_map_arguments([(6, 5)], (9, 11), 2, device)
    rows[1] = rows[1].clone()
    distances, rows, cols = (
        [*distances, distances[0]],
        [*rows, torch.randn(9, 6, device=device)],
        [*cols, torch.randn(11, 5, device=device)],
    )
    maps, _ = ops.anomaly_map(distances, rows, cols)
    torch.testing.assert_close(maps, reference.anomaly_map(distances, rows, cols, 1.0)[0], rtol=1e-4, atol=1e-4)


def test_negative_maps_and_strided_distances(device):
    distances, rows, cols = make_anomaly_map_arguments([(6, 8)], (20, 30), 3, device)
    distances = [torch.stack([-d, d])[0].mT.contiguous().mT for d in distances]
    maps, maximum = ops.anomaly_map(distances, rows, cols)
    assert (maximum < 0).all()
    torch.testing.assert_close(maps, reference.anomaly_map(distances, rows, cols, 1.0)[0])


def test_number_of_threads_does_not_change_the_result():
    args = make_anomaly_map_arguments([(33, 31), (17, 16)], (150, 140), 3, "cpu")
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.anomaly_map(*args))
    finally:
        torch.set_num_threads(threads)
    for maps, maximum in results[1:]:
        assert torch.equal(maps, results[0][0])
        assert torch.equal(maximum, results[0][1])


def test_opcheck(device):
    distances, rows, cols = make_anomaly_map_arguments([(6, 5), (3, 3)], (9, 11), 2, device)
    torch.library.opcheck(torch.ops.recontrast.anomaly_map.default, (distances, rows, cols, 1.0))


POINTS = torch.ones(2, 3, 3)
MATRIX = torch.ones(5, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([], [], []), "lists of one length > 0, got 0, 0 and 0"),
        (([POINTS], [MATRIX], [MATRIX, MATRIX]), "lists of one length > 0, got 1, 1 and 2"),
        (
            ([POINTS, POINTS[:1]], [MATRIX] * 2, [MATRIX] * 2),
            r"distances\[1\]: wanted \(2, h, w\), got \(1, 3, 3\)",
        ),
        (([POINTS], [MATRIX], [torch.ones(5, 4)]), r"wanted \(5, 3\) and \(5, 3\), got \(5, 3\) and \(5, 4\)"),
        (([POINTS.double()], [MATRIX], [MATRIX]), "pair 0: wanted float32, got float64"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.anomaly_map(*arguments)
