"""PatchCore against its definition, restated in float64 with loops over points."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recontrast.models.patchcore import PatchCore


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 64, 96, generator=torch.Generator().manual_seed(2))


def build(**options):
    torch.manual_seed(0)
    return PatchCore("test_resnet", weights="random", **options).eval()


def fit(model, images, share=0.2, seed=4):
    for batch in images.split(2):
        model.observe(batch)
    model.build_bank(share, seed=seed)
    return model


def embed_averages(model, image):
    """Mean of the 3 x 3 neighbourhood in each level, zeros outside, levels joined."""
    fine, coarse = (f[0].double() for f in model.encoder(image[None])[1:])
    means = []
    for feature in (fine, coarse):
        padded = F.pad(feature, (1, 1, 1, 1))
        height, width = feature.shape[1:]
        means.append(sum(padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)) / 9)
    resized = F.interpolate(means[1][None], size=fine.shape[1:], mode="bilinear", align_corners=False)[0]
    return torch.cat([means[0], resized]).flatten(1).T


def embed_joined(model, image, dimension):
    """The nine vectors of the neighbourhood, averaged down in each level and over the levels, point by point."""
    levels = []
    fine_size = None
    for feature in (f[0].double() for f in model.encoder(image[None])[1:]):
        fine_size = fine_size or feature.shape[1:]
        padded = F.pad(feature, (1, 1, 1, 1))
        height, width = feature.shape[1:]
        patches = torch.stack([padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)], dim=1)
        resized = F.interpolate(patches.flatten(0, 1)[None], size=fine_size, mode="bilinear", align_corners=False)[0]
        levels.append(resized.flatten(1).T)  # (points, 9 C): all nine values of a channel, then the next channel
    averaged = [F.adaptive_avg_pool1d(vectors[:, None], dimension)[:, 0] for vectors in levels]
    joined = torch.cat(averaged, dim=1)
    return F.adaptive_avg_pool1d(joined[:, None], dimension)[:, 0]


def test_embeddings_are_those_of_the_definitions(images):
    model = build()
    vectors = model(images).permute(0, 2, 3, 1).flatten(1, 2)
    for image, got in zip(images, vectors, strict=True):
        torch.testing.assert_close(got.double(), embed_averages(model, image), rtol=1e-5, atol=1e-6)
    model = build(embedding="unfold", dimension=100)
    vectors = model(images).permute(0, 2, 3, 1).flatten(1, 2)
    for image, got in zip(images, vectors, strict=True):
        torch.testing.assert_close(got.double(), embed_joined(model, image, 100), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("neighbours", [1, 4])
def test_distances_and_scores_are_those_of_the_paper(images, neighbours):
    model = fit(build(neighbours=neighbours), images[:3])
    (distances,), scores = model.distances(images)
    assert distances.shape == (5, *model.map_sizes((64, 96))[0]) and scores.shape == (5,)
    bank = model.bank.double()
    for image, got, score in zip(images, distances, scores, strict=True):
        vectors = embed_averages(model, image)
        wanted, index = torch.cdist(vectors, bank).min(1)
        torch.testing.assert_close(got.flatten().double(), wanted, rtol=1e-4, atol=1e-5)
        worst = int(wanted.argmax())
        around = (bank - bank[index[worst]]).norm(dim=1).topk(neighbours, largest=False).indices
        exponents = (vectors[worst] - bank[around]).norm(dim=1).exp()
        weight = 1 - exponents[0] / exponents.sum() if neighbours > 1 else 1
        assert score == pytest.approx(float(weight * wanted[worst]), rel=1e-4)


def test_bank_is_a_share_of_the_observed_vectors(images):
    model = fit(build(), images, share=0.1)
    points = 5 * np.prod(model.map_sizes((64, 96))[0])
    assert len(model.bank) == int(points * 0.1) and model.bank.dtype == torch.float16
    (distances,), scores = fit(build(), images, share=1.0).distances(images)
    assert distances.max() < 5e-3 and scores.max() < 5e-3  # what is in the bank differs by rounding to float16


def test_seed_decides_the_bank(images):
    first, second, other = (fit(build(), images, seed=seed).bank for seed in (4, 4, 5))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_more_images_extend_the_bank(images):
    model = fit(build(), images[:3])
    size, before = len(model.bank), model.distances(images[3:])[1]
    fit(model, images[3:])
    assert len(model.bank) == size + int(2 / 3 * size)
    assert (model.distances(images[3:])[1] < before).all()


def test_state_and_config_rebuild_the_model(images):
    model = fit(build(neighbours=3), images)
    copy = PatchCore(**model.config, weights="random").eval()
    copy.load_state_dict(model.state_dict())
    for value, wanted in zip(copy.distances(images), model.distances(images), strict=True):
        assert torch.equal(value[0], wanted[0])
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": ()}, "levels: wanted ascending numbers from 1 on"),
        ({"levels": (3, 2)}, "levels: wanted ascending numbers from 1 on"),
        ({"levels": (2, 9)}, "levels: wanted 1 to 4"),
        ({"embedding": "sum"}, "embedding: wanted 'average' or 'unfold'"),
        ({"neighbours": 0}, "neighbours: wanted at least 1"),
        ({"dimension": 0}, "dimension: wanted 1 to 65536, got 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_bad_use(images):
    model = build()
    with pytest.raises(ValueError, match="wanted a fitted model"):
        model.distances(images)
    with pytest.raises(ValueError, match="wanted observed images"):
        model.build_bank()
    with pytest.raises(ValueError, match=r"share: wanted a value in \(0, 1\]"):
        model.build_bank(1.5)
    with pytest.raises(ValueError, match=r"multiples of it .*, got 60x96"):
        model.map_sizes((60, 96))
    with torch.no_grad():
        next(model.encoder.parameters()).mul_(1e9)
    model.observe(images)
    with pytest.raises(ValueError, match="wanted values that fit into float16"):
        model.build_bank()


def test_features_that_exceed_the_memory_are_drawn_at_random(images):
    full = build()
    assert full.plan_memory(5, (64, 96), 0.1, 10**9) is None
    model, points = build(), 5 * np.prod(full.map_sizes((64, 96))[0])
    note = model.plan_memory(5, (64, 96), 0.1, 300_000, seed=1)
    assert "the features of 5 images need 0.7 MB" in note and "random share of" in note
    for batch in images.split(2):
        model.observe(batch)
    kept = sum(map(len, model._observed))
    share = float(note.split("random share of ")[1].split("%")[0]) / 100
    assert 0.1 < share < 1 and abs(kept - share * points) <= 4
    held = sum(v.numel() * v.element_size() for v in model._observed) + kept * 4 * min(model.width, 128)
    assert held < 0.8 * 300_000
    model.build_bank(0.1)
    assert len(model.bank) == int(0.1 * points)  # of all vectors
    again = build()
    again.plan_memory(5, (64, 96), 0.1, 300_000, seed=1)
    assert torch.equal(fit(again, images, share=0.1, seed=0).bank, model.bank)


def test_bank_that_exceeds_the_memory_is_refused():
    with pytest.raises(
        ValueError, match=r"bank_share: wanted a bank that fits into 1,000\.0 MB .* one that needs 31,4[0-9.]* MB"
    ):
        build().plan_memory(100_000, (256, 256), 0.1, 10**9)
