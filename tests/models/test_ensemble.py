"""The ensemble against its members, each image left out by fitting again without it."""

import pytest
import torch
import torch.nn.functional as F

from recontrast.architectures import ARCHITECTURES
from recontrast.models.ensemble import WEIGHTS, Ensemble, leave_one_out
from recontrast.models.padim import PaDiM
from recontrast.models.patchcore import PatchCore
from recontrast.recipes.recipe import Recipe

OPTIONS = {"small_size": (32, 32), "features": 6}


def build():
    torch.manual_seed(0)
    return Ensemble("test_resnet", weights="random", **OPTIONS).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(12, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def shrink(images):
    return F.interpolate(images, size=(32, 32), mode="bilinear", antialias=True)


def members(images, share):
    """PatchCore and PaDiM alone, fitted to the same features."""
    torch.manual_seed(0)
    bank = PatchCore("test_resnet", weights="random").eval()
    gaussians = PaDiM("test_resnet", weights="random", features=6).eval()
    gaussians.encoder = bank.encoder
    bank.observe(images)
    bank.build_bank(share, seed=1)
    gaussians.observe(shrink(images))
    gaussians.fit_gaussians()
    return bank, gaussians


def fit(model, images, share=0.5):
    for batch in images.split(5):
        model.observe(batch)
    return model.fit(share, seed=1)


def test_distances_are_those_of_the_members_divided_by_their_deviations(images):
    model = build()
    fit(model, images[:8])
    model.scales.copy_(torch.tensor([2.0, 4.0]))
    model.score_scales.copy_(torch.tensor([3.0, 5.0]))
    bank, gaussians = members(images[:8], 0.5)
    (first, second), scores = model.distances(images)
    (wanted_first,), first_scores = bank.distances(images)
    (wanted_second,), second_scores = gaussians.distances(shrink(images))
    torch.testing.assert_close(first, wanted_first / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, wanted_second / 4, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scores, first_scores / 3 + second_scores / 5, rtol=1e-3, atol=1e-4)
    assert [tuple(d.shape[1:]) for d in (first, second)] == model.map_sizes(64)


def go_on(model, former):
    """Go on from a fit, with the former images that the network asks for, one by one."""
    for position in model.resume(len(former)):
        model.observe_again(former[position][None])


def test_sample_is_that_of_all_images():
    """More images than the sample holds: former ones stay or give way as in one pass."""
    images = torch.randn(70, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    whole, extended = build(), build()
    whole.observe(images)
    fit(extended, images[:45], share=0.01)
    go_on(extended, images[:45])
    extended.observe(images[45:])
    assert whole._sample.keys() == extended._sample.keys() and len(whole._sample) == 32
    for slot, (number, large, small) in whole._sample.items():
        torch.testing.assert_close(extended._sample[slot][1].float(), large.float(), rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(extended._sample[slot][2], small, rtol=1e-3, atol=1e-4)
        assert extended._sample[slot][0] == (number if number >= 45 else slot)
    with pytest.raises(ValueError, match="got one without Gaussians"):
        build().resume(5)


@pytest.mark.parametrize("former", [0, 5])
def test_images_are_left_out_of_their_own_distances(images, former):
    """Also those of a former fit, whose vectors in the bank are found by their values."""
    model = build()
    if former:
        fit(model, images[:former], share=1.0)
        go_on(model, images[:former])
    large, small = fit(model, images[former:8], share=1.0)
    assert len(large) == len(small) == 8
    for number in range(8):
        others = torch.cat([images[:number], images[number + 1 : 8]])
        bank, gaussians = members(others, 1.0)
        torch.testing.assert_close(large[number], bank.distances(images[number][None])[0][0][0], rtol=1e-3, atol=1e-3)
        wanted = gaussians.distances(shrink(images[number][None]))[0][0][0]
        # The regularisation counts as part of the scatter matrix, which is wrong by one part in the number of images.
        assert float(((small[number] - wanted).abs() / wanted).median()) < 0.25
    assert large.mean() > 2 * model.patchcore.distances_of(model(images[:8])[0])[0][0].mean()


def test_left_out_distances_are_exact_without_regularisation():
    values = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def mahalanobis(value, sample):
        centred = value - sample.mean(0)
        return float((centred @ torch.linalg.inv(sample.T.cov()) @ centred).sqrt())

    inside = torch.tensor([mahalanobis(value, values) for value in values], dtype=torch.float64)
    wanted = [mahalanobis(values[i], torch.cat([values[:i], values[i + 1 :]])) for i in range(40)]
    torch.testing.assert_close(leave_one_out(inside, 40), torch.tensor(wanted, dtype=torch.float64))


def test_fitting_by_recipe_sets_the_scales(images):
    recipe = Recipe(architecture="ensemble", backbone="test_resnet", weights="random", size=64, small_size=32,
                    gaussian_features=6, bank_share=0.5, score="model")  # fmt: skip
    model = ARCHITECTURES["ensemble"].build(recipe, "nut").eval()
    for batch in images.split(4):
        model.observe(batch)
    ARCHITECTURES["ensemble"].fit(model, recipe)
    assert (model.scales > 0).all() and (model.score_scales > 0).all() and not torch.equal(model.scales, torch.ones(2))
    assert 1 < model.max_distance < float("inf")


def test_state_and_config_rebuild_the_model(images):
    model = build()
    fit(model, images)
    copy = Ensemble(**model.config, weights="random").eval()
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.distances(images)[1], model.distances(images)[1])
    assert sum(name.startswith("encoder.") for name in model.state_dict()) and not any(
        "patchcore.encoder" in name or "padim.encoder" in name for name in model.state_dict()
    )


def test_bad_use(images):
    with pytest.raises(ValueError, match="wanted a fitted model"):
        build().distances(images)
    with pytest.raises(ValueError, match="small_size: wanted at most 4096 px"):
        Ensemble("test_resnet", weights="random", small_size=(1 << 20, 32))
    model = build()
    same = torch.zeros(3, 3, 64, 64)
    model.observe(same)
    distances = model.fit(1.0)
    with pytest.raises(ValueError, match="wanted good images that differ, got images whose features are all equal"):
        model.set_scales(distances, distances)


def test_scales_are_deviations_over_weights():
    maps = [torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(n)) * (n + 2) for n in range(2)]
    distances = [values[:, ::2, ::2] for values in maps]
    model = build()
    model.set_scales(maps, distances)
    for number, weight in enumerate(WEIGHTS):
        assert float(model.scales[number]) == pytest.approx(float(maps[number].std(correction=0)) / weight, rel=1e-5)
        wanted = float(distances[number].amax(dim=(1, 2)).std()) / weight
        assert float(model.score_scales[number]) == pytest.approx(wanted, rel=1e-5)


def test_memory_is_checked_before_a_pass():
    model = build()
    model.plan_memory(10, 64, 1 << 30)
    with pytest.raises(ValueError, match=r"Ensemble: images: wanted features that fit into 1.0 MB .* for 100 images"):
        model.plan_memory(100, 64, 10**6)


def test_equal_scores_of_good_images_do_not_decide_alone():
    """With fewer images than features, all left-out images are about equally far from the Gaussians."""
    maps = [torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    distances = [maps[0], torch.full((5, 4, 4), 200.0) + 1e-4 * maps[1][:, ::2, ::2]]
    model = build()
    model.set_scales(maps, distances)
    assert float(model.score_scales[1]) == pytest.approx(0.05 * 200 / WEIGHTS[1], rel=1e-3)
