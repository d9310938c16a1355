import numpy as np
import pytest
import torch

from recontrast.models import coreset
from recontrast.models.coreset import find_nearest, project_randomly, select_coreset


def select_plainly(features, count, start):
    """K-center greedy as it is defined, in float64."""
    features = features.double()
    selected, distances = [start], torch.cdist(features, features[start : start + 1])[:, 0]
    while len(selected) < count:
        distances[selected] = -1
        selected.append(int(distances.argmax()))
        distances = torch.minimum(distances, torch.cdist(features, features[selected[-1:]])[:, 0])
    return selected


@pytest.mark.parametrize(
    ("total", "width", "count"), [(1, 3, 1), (5, 1, 5), (700, 7, 700), (3000, 16, 60), (3000, 2, 900)]
)
@pytest.mark.parametrize("share", [2, 32])
def test_selection_is_that_of_the_definition(monkeypatch, total, width, count, share):
    monkeypatch.setattr(coreset, "ACTIVE_SHARE", share)
    monkeypatch.setattr(coreset, "BLOCK", 512)
    generator = torch.Generator().manual_seed(total + count)
    # Integers: distances are exact in float32 and float64, so that ties are the only freedom.
    features = torch.randint(-99, 100, (total, width), generator=generator).float()
    features += torch.arange(total)[:, None] / 1024 if width > 1 else 0
    start = total // 2
    selected = select_coreset(features, count, start=start).tolist()
    assert selected[0] == start and len(set(selected)) == count
    distances = torch.cdist(features.double(), features.double())
    nearest = distances[start].clone()
    for index in selected[1:]:  # each is a farthest vector at its turn; equal ones are interchangeable
        nearest[selected[: selected.index(index)]] = -1
        assert nearest[index] >= nearest.max() - 1e-3 * (1 + nearest.max())
        nearest = torch.minimum(nearest, distances[index])


def test_selection_of_distinct_distances_equals_the_plain_one():
    features = torch.from_numpy(np.random.default_rng(3).normal(size=(4000, 24)))
    assert select_coreset(features, 300, start=7).tolist() == select_plainly(features, 300, 7)


def test_equal_vectors_are_selected_once_each():
    assert sorted(select_coreset(torch.ones(600, 4), 600).tolist()) == list(range(600))


@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("pairs", [1, 100, 1 << 23])
def test_neighbours_are_the_nearest(monkeypatch, neighbours, pairs):
    monkeypatch.setattr(coreset, "PAIRS", pairs)
    random = np.random.default_rng(5)
    queries, bank = torch.from_numpy(random.normal(size=(41, 9))), torch.from_numpy(random.normal(size=(23, 9)))
    distances, indices = find_nearest(queries, bank, neighbours)
    wanted = torch.cdist(queries, bank).topk(neighbours, largest=False)
    assert torch.equal(indices, wanted.indices)
    torch.testing.assert_close(distances.double(), wanted.values, rtol=1e-5, atol=1e-6)


def test_distance_to_itself_is_zero():
    bank = torch.from_numpy(np.random.default_rng(6).normal(100, 1, size=(50, 300))).float()
    distances, indices = find_nearest(bank, bank)
    assert indices[:, 0].tolist() == list(range(50)) and not distances.any()


def test_projection_keeps_distances():
    features = torch.randn(200, 1500, generator=torch.Generator().manual_seed(1))
    ratio = torch.pdist(project_randomly(features, 256, seed=3)) / torch.pdist(features)
    assert abs(ratio.mean() - 1) < 0.02 and ratio.std() < 0.06
    assert project_randomly(features, 1500, seed=3) is not None and project_randomly(features, 1500, 3).shape[1] == 1500


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select_coreset(torch.ones(3, 2), 4), "count: wanted 1 to 3"),
        (lambda: select_coreset(torch.ones(3, 2), 0), "count: wanted 1 to 3"),
        (lambda: select_coreset(torch.ones(3, 2), 1, start=3), "start: wanted 0 to 2"),
        (lambda: select_coreset(torch.tensor([[1.0], [torch.nan]]), 1), "wanted finite vectors"),
        (lambda: select_coreset(torch.full((2, 2), 1e25), 1), "wanted finite vectors"),
        (lambda: find_nearest(torch.ones(3, 2), torch.ones(2, 2), 3), "neighbours: wanted 1 to 2"),
        (lambda: find_nearest(torch.ones(3, 2), torch.ones(2, 3)), "wanted vectors of 3 values, got 2"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
