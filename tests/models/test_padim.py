"""PaDiM against NumPy's covariances and SciPy's Mahalanobis distance, point by point in float64."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis

from recontrast.models.padim import PaDiM


@pytest.fixture(scope="module")
def images():
    return torch.randn(9, 3, 64, 32, generator=torch.Generator().manual_seed(2))


def build(**options):
    torch.manual_seed(0)
    return PaDiM("test_resnet", weights="random", **{"features": 12, **options}).eval()


def fit(model, images):
    for batch in images.split(4):
        model.observe(batch)
    model.fit_gaussians()
    return model


def embed_plainly(model, image):
    """Channels of all levels at each point of the first, coarse levels repeated: (h, w, features), float64."""
    levels = [level[0].double().numpy() for level in model.encoder(image[None])]
    height, width = levels[0].shape[1:]
    repeated = [np.kron(level, np.ones((1, height // level.shape[1], width // level.shape[2]))) for level in levels]
    return np.concatenate(repeated)[model.channels.numpy()].transpose(1, 2, 0)


def test_distances_are_mahalanobis_distances(images):
    model = fit(build(), images[:7])
    (distances,), scores = model.distances(images)
    assert distances.shape == (9, *model.map_sizes((64, 32))[0])
    good = np.stack([embed_plainly(model, image) for image in images[:7]])
    for y, x in [(0, 0), (3, 5), (15, 7)]:
        inverse = np.linalg.inv(np.cov(good[:, y, x], rowvar=False) + 0.01 * np.eye(12))
        for image, got in zip(images, distances[:, y, x], strict=True):
            wanted = mahalanobis(embed_plainly(model, image)[y, x], good[:, y, x].mean(0), inverse)
            assert float(got) == pytest.approx(wanted, rel=1e-4)
    assert torch.equal(scores, distances.flatten(1).amax(1))


def test_moments_keep_the_digits_of_features_far_from_zero(images):
    """The covariance of features around 1000 with deviations around 1 is exact in float32 sums."""
    model = build()
    forward, model.forward = model.forward, lambda images: 1000 + forward(images)
    shifted = fit(model, images)
    torch.testing.assert_close(
        shifted.distances(images)[1], fit(build(), images).distances(images)[1], rtol=2e-3, atol=0
    )


def test_resumed_moments_are_those_of_all_images():
    """Mean, covariance and count of the first images determine their moments; means are far from zero and apart."""

    def fit(*parts, resumed=False):
        model = PaDiM("test_resnet", weights="random", features=6, seed=1)
        for number, part in enumerate(parts):
            if number and resumed:
                model.fit_gaussians()
                assert model.resume(len(parts[0])) == []
            model.observe_features(part)
        assert model.fit_gaussians() == sum(map(len, parts))
        return model

    generator = torch.Generator().manual_seed(0)
    first = torch.randn(9, 6, 4, 5, generator=generator) * torch.tensor([1, 3, 0.1, 1, 10, 1]).view(1, 6, 1, 1) + 50
    second = torch.randn(4, 6, 4, 5, generator=generator) + 52
    whole, extended = fit(first, second), fit(first, second, resumed=True)
    torch.testing.assert_close(extended.centres, whole.centres, rtol=1e-6, atol=0)
    torch.testing.assert_close(extended.whitening, whole.whitening, rtol=1e-4, atol=1e-4)
    new = torch.randn(3, 6, 4, 5, generator=generator) + 51
    torch.testing.assert_close(extended.distances_of(new)[0][0], whole.distances_of(new)[0][0], rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="wanted a model fitted to at least 2 images, got one without Gaussians"):
        PaDiM("test_resnet", weights="random", features=6).resume(5)
    with pytest.raises(ValueError, match="got one of 1 images"):
        whole.resume(1)


def test_seed_draws_the_channels():
    assert torch.equal(build(seed=3).channels, build(seed=3).channels)
    assert not torch.equal(build(seed=3).channels, build(seed=4).channels)
    assert len(set(build().channels.tolist())) == 12


def test_state_and_config_rebuild_the_model(images):
    model = fit(build(seed=3), images)
    copy = PaDiM(**model.config, weights="random").eval()
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.distances(images)[1], model.distances(images)[1])
    assert not any(p.requires_grad for p in model.parameters())


def test_bad_use(images):
    with pytest.raises(ValueError, match="features: wanted 1 to "):
        build(features=10**6)
    model = build()
    with pytest.raises(ValueError, match="wanted a fitted model"):
        model.distances(images)
    with pytest.raises(ValueError, match="wanted at least 2 observed images, got 0"):
        model.fit_gaussians()
    model.observe(images[:1])
    with pytest.raises(ValueError, match="points as before"):
        model.observe(images[:, :, :32])
    with pytest.raises(ValueError, match="wanted at least 2 observed images, got 1"):
        model.fit_gaussians()
    fit(model, images)
    with pytest.raises(ValueError, match="wanted 64x32 px, the size that the model was fitted for, got 64x64"):
        model.map_sizes(64)
    with pytest.raises(ValueError, match=r"multiples of it .*, got 60x32"):
        model.map_sizes((60, 32))
    model.observe(images * torch.nan)
    with pytest.raises(ValueError, match="wanted finite values"):
        model.fit_gaussians()
