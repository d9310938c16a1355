"""What the CUDA kernels move through memory, counted by the emulator: sectors of 32 bytes, and atomic additions.

The least that a kernel can move is each of its inputs once and each of its results once.
"""

import emulate_cuda
import pytest
import torch
from emulate_cuda.traffic import SECTOR, count_traffic
from op_cases import make_anomaly_map_arguments

pytestmark = pytest.mark.skipif(emulate_cuda.COMPILER is None, reason="NO G++: THE CUDA KERNELS WERE NOT EMULATED")
F32, BF16 = torch.float32, torch.bfloat16
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# WideResNet-50-2 at an eighth of the side and of the processors.
SHAPES = [(2, 256, 16, 16), (2, 512, 8, 8), (2, 1024, 4, 4)]
PROCESSORS = 4
LIMIT = 1.05  # times the least


def make_pairs(dtype, layout, other=None):
    def make(dtype):
        return [torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for shape in SHAPES]

    return make(dtype), make(other or dtype)


def count_points():
    return sum(n * h * w for n, _, h, w in SHAPES)


def size(tensors):
    return sum(t.nbytes for t in tensors)


def by_kernel(launches, name):
    (launch,) = (launch for launch in launches if launch.kernel == name)
    return launch


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F32, BF16)], ids=str)
def test_sums_read_features_once(emulated, dtypes, layout):
    x, y = make_pairs(dtypes[0], layout, dtypes[1])
    launches = count_traffic(emulated, lambda ops: ops.cosine_sums_group(x, y), PROCESSORS)
    assert {launch.kernel for launch in launches} <= {"sums_by_planes", "sums_by_rows", "add_parts"}
    least = size(x) + size(y) + 3 * 4 * count_points()
    assert sum(launch.moved_by_blocks for launch in launches) <= LIMIT * least
    features = next(launch for launch in launches if launch.kernel.startswith("sums"))
    assert SECTOR * features.load.sectors == size(x) + size(y)  # every sector is asked for once, and is used wholly


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F32, BF16)], ids=str)
def test_gradient_moves_features_once(emulated, dtypes, layout):
    x, y = make_pairs(dtypes[0], layout, dtypes[1])
    grad = torch.rand(3 * count_points()) + 1
    launches = count_traffic(emulated, lambda ops: ops.cosine_sums_group_backward(grad, x, y), PROCESSORS)
    (launch,) = launches
    least = size(x) + 2 * size(y) + 2 * 4 * count_points()
    assert launch.moved_by_blocks <= LIMIT * least
    # Without a cache, the weights of the positions would be moved again for each channel group of a block.
    assert launch.moved <= 1.4 * least
    assert SECTOR * launch.store.sectors == size(y)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_does_not_read_easy_points(emulated, layout):
    """Only the weights are read: in NCHW by each channel group of a block."""
    x, y = make_pairs(F32, layout)
    grad = torch.zeros(3 * count_points())
    launches = count_traffic(emulated, lambda ops: ops.cosine_sums_group_backward(grad, x, y), PROCESSORS)
    assert SECTOR * launches[0].load.distinct <= 2 * 4 * count_points()
    assert SECTOR * launches[0].store.sectors == size(y)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_begins_with_what_the_cache_still_holds(emulated, layout):
    """The gradient walks backwards: the sums have just read the features with which it begins."""
    x, y = make_pairs(F32, layout)
    grad = torch.rand(3 * count_points()) + 1
    cache = (size(x) + size(y)) // 2

    def step(ops):
        ops.cosine_sums_group(x, y)
        ops.cosine_sums_group_backward(grad, x, y)

    gradient = count_traffic(emulated, step, PROCESSORS, cache=cache)[-1]
    # Forwards, each sector would have left the cache just before it is read again. Results take half of the cache.
    assert SECTOR * gradient.load.missed < size(x) + size(y) - cache // 2


def test_loss_reads_the_sums_once(emulated):
    points = 64 * 64
    sums = torch.rand(3 * 2 * points) + 0.5
    launches = count_traffic(
        emulated, lambda ops: ops.mined_loss(sums, [2], [points], "deviation", 1.0, None, 0.0), PROCESSORS
    )
    assert by_kernel(launches, "summarise_pieces").moved <= LIMIT * sums.nbytes
    assert sum(launch.moved for launch in launches) <= 1.2 * sums.nbytes  # the summaries of few pieces
    _, state = emulated.operators.mined_loss(sums, [2], [points], "deviation", 1.0, None, 0.0)
    one = torch.ones(())
    (launch,) = count_traffic(
        emulated, lambda ops: ops.mined_loss_backward(one, sums, state, [2], [points], "deviation", 1.0, 0.0)
    )
    assert launch.moved_by_blocks <= LIMIT * 2 * sums.nbytes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_norm_act_reads_and_writes_features_as_often_as_it_must(emulated, dtype, layout):
    """Forward: x for the moments, then for the result. Backward: gradient and x for the sums, then for the result."""
    x = torch.randn(2, 64, 32, 32).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    weight, bias = torch.rand(64), torch.rand(64)
    launches = count_traffic(
        emulated, lambda ops: ops.norm_act(x, None, weight, bias, None, None, "relu", 1e-5), PROCESSORS
    )
    assert by_kernel(launches, "moments_part").moved_by_blocks <= LIMIT * x.nbytes
    assert by_kernel(launches, "apply").moved_by_blocks <= LIMIT * 2 * x.nbytes
    _, moments = emulated.operators.norm_act(x, None, weight, bias, None, None, "relu", 1e-5)
    grad = torch.randn_like(x)
    launches = count_traffic(
        emulated,
        lambda ops: ops.norm_act_backward(grad, x, None, weight, bias, moments, True, "relu", 1e-5, True),
        PROCESSORS,
    )
    assert by_kernel(launches, "sums_part").moved_by_blocks <= LIMIT * 2 * x.nbytes
    assert by_kernel(launches, "gradient").moved_by_blocks <= LIMIT * 3 * x.nbytes
    # Without a cache, the parameters of the channels would be moved again for each warp of a block.
    assert by_kernel(launches, "sums_part").moved <= 1.6 * 2 * x.nbytes
    assert by_kernel(launches, "gradient").moved <= 1.6 * 3 * x.nbytes


def test_map_is_written_once(emulated):
    """Tiles of the map overlap in the distances that they read, which are a sixteenth of it and less."""
    distances, rows, cols = make_anomaly_map_arguments([(16, 16), (8, 8)], (64, 64), 4, "cpu")
    launches = count_traffic(emulated, lambda ops: ops.anomaly_map(distances, rows, cols, 1.0), PROCESSORS)
    tile = by_kernel(launches, "compute_tile")
    maps = 4 * 4 * 64 * 64  # bytes
    assert SECTOR * tile.store.sectors <= LIMIT * maps
    assert tile.moved_by_blocks <= 3 * (maps + size(distances) + size(rows) + size(cols))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_distances_do_not_queue(emulated, dtype):
    """Points of dead features all have one distance, and additions to one counter wait for each other."""
    points = 8192
    sums = torch.zeros(3 * points, dtype=dtype)  # distance 1
    launches = count_traffic(emulated, lambda ops: ops.mined_loss(sums, [2], [points // 2], "hardest", 0.5, None, 0.0))
    counted = [launch for launch in launches if launch.atomics]
    assert {launch.kernel for launch in counted} == {"summarise_pieces", "count_digits"}
    assert max(launch.most_atomics for launch in counted) == points // (4 * 32)  # a thread has 4 points
