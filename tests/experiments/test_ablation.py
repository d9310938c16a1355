"""Configurations of the ablation (Table 6), each compared with its formula written with the parts of the model."""

import pytest
import torch
import upstream
from small_run import RECIPE
from tiny import tiny_set

from recontrast import checkpoint
from recontrast.evaluation.evaluate import evaluate
from recontrast.experiments.paper_tables import ABLATION
from recontrast.loss import global_cosine, pairs_loss, point_cosine
from recontrast.mining import deviation
from recontrast.models.recontrast import ReContrast
from recontrast.recipes.recipe import Recipe
from recontrast.training.train import build_model, train

SMALL = {"backbone": "test_resnet", "weights": "random", "seed": 0}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return tiny_set(tmp_path_factory.mktemp("data"))


def region_cosine(teachers, students):
    """``region_cosine`` of utils.py: mean over points, sum over levels, detached targets."""
    distances = zip(teachers, students, strict=True)
    return sum(1 - torch.nn.CosineSimilarity()(t.detach(), s).mean() for t, s in distances)


def attached(teachers, students):
    """``global_cosine`` of utils.py with ``stop_grad=False``."""
    pairs = zip(teachers, students, strict=True)
    return sum((1 - torch.nn.CosineSimilarity()(t.flatten(1), s.flatten(1))).mean() for t, s in pairs)


def mined(teachers, students):
    """``global_cosine_hm`` on copies: without heads, a hook would also receive the gradient of the finer levels."""
    return upstream.global_cosine_hm(teachers, [s.clone() for s in students], alpha=0.5)


def frozen_pairs(model, x):
    with torch.no_grad():
        target = model.encoder.eval()(x)
    return [(target, model.decoder(model.bottleneck(target)))]


def own_pairs(model, x):
    features = model.encoder(x)
    return [(features, model.decoder(model.bottleneck(features)))]


def cross_pairs(model, x):
    trained, frozen = model.encoder(x), model.frozen(x)
    students = model.decoder(model.bottleneck([torch.cat(both) for both in zip(trained, frozen, strict=True)]))
    return [(frozen, students[:3]), (trained, students[3:])]


# Pairs and loss of each configuration: columns of Table 6.
FORMULAS = {
    "A": (frozen_pairs, region_cosine),
    "B": (frozen_pairs, upstream.global_cosine),
    "B+hm": (frozen_pairs, mined),
    "C": (own_pairs, attached),
    "D": (own_pairs, upstream.global_cosine),
    "C+cp": (cross_pairs, attached),
    "E-gl": (cross_pairs, region_cosine),
    "E": (cross_pairs, upstream.global_cosine),
    "ours": (cross_pairs, mined),
}


@pytest.mark.parametrize("name, backbone", [*((name, "test_resnet") for name in ABLATION), ("B+hm", "resnet18")])
def test_value_and_gradient_of_each_configuration(name, backbone):
    recipe = Recipe(**{**SMALL, "backbone": backbone}, **ABLATION[name])
    torch.manual_seed(0)
    model = build_model(recipe, "any").double().train()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    pairs, loss = FORMULAS[name]
    groups = pairs(model, x)
    expected = sum(loss(*group) for group in groups) / len(groups)
    expected.backward()
    expected_gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rule = deviation(0.5) if recipe.mining else None
    loss_value = pairs_loss(model(x), rule, form=recipe.loss, groups=len(groups), stop_gradient=recipe.stop_gradient)
    loss_value.backward()
    torch.testing.assert_close(loss_value, expected.detach(), rtol=1e-12, atol=0)
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected_gradients.keys()
    for key in expected_gradients:
        torch.testing.assert_close(
            gradients[key], expected_gradients[key], rtol=1e-9, atol=1e-9 * float(expected_gradients[key].abs().max())
        )
    assert any(key.startswith("encoder.") for key in gradients) == recipe.train_encoder
    assert not any(key.startswith("frozen.") for key in gradients)


def test_columns_of_table_6():
    """Columns: global loss, trained encoder, stop-gradient, contrastive pairs, hard mining."""
    ticks = {"A": "", "B": "g", "B+hm": "gh", "C": "ge", "D": "ges", "C+cp": "gep", "E-gl": "esp", "E": "gesp"}
    ticks["ours"] = "gesph"
    assert set(ticks) == set(ABLATION)
    for name, letters in ticks.items():
        recipe = Recipe(**SMALL, **ABLATION[name])
        ticked = {
            "g": recipe.loss == "global",
            "e": recipe.train_encoder,
            "s": recipe.stop_gradient and recipe.train_encoder,  # a frozen encoder has no gradient to stop
            "p": recipe.pairs == "cross",
            "h": recipe.mining,
        }
        assert {letter for letter, is_ticked in ticked.items() if is_ticked} == set(letters), name


@pytest.mark.parametrize("name", ["A", "C", "C+cp"])  # one frozen encoder, one trained encoder, two encoders
def test_each_configuration_learns_and_can_be_loaded(samples, tmp_path, name):
    """All configurations use the same training loop, and a checkpoint gives the same model."""
    recipe = RECIPE.replace(steps=6, batch=7, alpha_end=-3.0, **ABLATION[name])
    result = train(recipe, samples, out=tmp_path, device="cpu")
    assert result.losses[-1] < 0.97 * result.losses[0]
    reloaded, loaded, _ = checkpoint.load_model(tmp_path / "checkpoint.pt", "cpu")
    assert loaded == recipe and reloaded.config == result.model.config
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for (_, loaded_student), (_, trained_student) in zip(reloaded(x), result.model(x), strict=True):
            torch.testing.assert_close(loaded_student, trained_student)


def test_rd4ad_has_the_size_given_in_table_a5():
    """RD4AD has one encoder, always in eval mode, and a decoder without heads."""
    with torch.device("meta"):
        rd4ad = ReContrast("wide_resnet50_2", weights="random", pairs="self", train_encoder=False)
    unused = 2 * 2048**2 + 2 * 2048  # conv4 and bn4, that upstream never calls
    assert (sum(p.numel() for p in rd4ad.parameters()) + unused) / 1e6 == pytest.approx(117, rel=0.003)
    assert rd4ad.frozen is None and len(rd4ad.decoder.heads) == 0 and not list(rd4ad.encoder_parameters())
    assert not any(m.training for m in rd4ad.train().encoder.modules())


def test_frozen_encoder_does_not_change(samples):
    model = build_model(RECIPE.replace(**ABLATION["B+hm"]), "nut")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(RECIPE.replace(**ABLATION["B+hm"]), samples, model=model, device="cpu")
    after = model.state_dict()
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"bottleneck", "decoder"}


# ---- views: feature pairs of the map -----------------------------------------------


@pytest.mark.parametrize("options", [{}, {"backbone": "test_resnet"}], ids=["resnet", "mirror"])
def test_each_view_is_one_half_of_both(options):
    model = ReContrast(**{"backbone": "resnet18", **options}, weights="random").eval()
    for p in model.frozen.parameters():  # so that the encoders differ, as after training
        p.mul_(1.1)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        both = model(x)
        for view, expected in (("frozen", both[:3]), ("trained", both[3:])):
            for student, expected_student in zip(model(x, view), expected, strict=True):
                torch.testing.assert_close(student, expected_student, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"views: wanted 'both' in training mode and .*, got 'frozen'"):
        model.train()(x, "frozen")
    with pytest.raises(ValueError, match="views: wanted 'both' or 'trained' or 'frozen', got 'all'"):
        model(x, "all")


def test_views_change_the_map(samples):
    model = build_model(RECIPE, "nut")
    for p in model.frozen.parameters():
        p.mul_(1.5)
    rows = [
        evaluate(model, samples, RECIPE.replace(views=v), device="cpu").rows[0] for v in ("both", "trained", "frozen")
    ]
    thresholds = [row.p_threshold for row in rows]
    assert len(set(thresholds)) == 3
    assert rows[0].i_auroc is not None


# ---- invalid combinations ------------------------------------------------------------


def test_invalid_combinations_are_refused():
    with pytest.raises(ValueError, match="ReContrast: pairs: wanted 'self' where train_encoder is False, got 'cross'"):
        ReContrast("resnet18", weights="random", train_encoder=False)
    with pytest.raises(ValueError, match="pairs: wanted 'cross' or 'self', got 'both'"):
        ReContrast("resnet18", weights="random", pairs="both")
    pair = (torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3))
    with pytest.raises(ValueError, match="pairs_loss: rule: wanted none where form is 'point', got deviation"):
        pairs_loss([pair], deviation(1.0), form="point")
    for form, plain in (("global", global_cosine), ("point", point_cosine)):
        torch.testing.assert_close(pairs_loss([pair], None, form=form, groups=1), plain(*pair))
