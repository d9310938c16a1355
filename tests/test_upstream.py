"""The rewritten code of upstream gives values calculated by hand."""

import math

import numpy as np
import pytest
import torch
import upstream
from sklearn.metrics import roc_auc_score

LOSSES = [upstream.global_cosine_hm, upstream.global_cosine_hm_repaired]
BOTH_LOSSES = pytest.mark.parametrize("loss", LOSSES, ids=["hook", "repaired"])


def make_three_points():
    """Make a teacher and a student (1, 2, 1, 3) that are equal at two points and orthogonal at the third.

    The distances are 0, 0 and 1, with mean 1/3 and unbiased standard deviation sqrt(1/3). For the whole vectors,
    <a, b> = 2 and |a|^2 = |b|^2 = 3.
    """
    teacher = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]]).view(1, 2, 1, 3)
    student = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]]).view(1, 2, 1, 3)
    return teacher, student.requires_grad_()


# -(a / (|a| |b|) - cos * b / |b|^2) = -(a / 3 - 2 / 9 * b), point by point
GRADIENT = -torch.tensor([[[1.0, 0.0, 3.0], [0.0, 1.0, -2.0]]]).view(1, 2, 1, 3) / 9


@BOTH_LOSSES
@pytest.mark.parametrize(
    "alpha, factor, weight",
    [
        (-3.0, 0.0, [1.0, 1.0, 1.0]),  # threshold 1/3 - 3 * 0.577 < 0: no point is easy
        (0.0, 0.0, [0.0, 0.0, 1.0]),  # threshold 1/3
        (1.0, 0.3, [0.3, 0.3, 1.0]),  # threshold 0.911
        (1.2, 0.5, [0.5, 0.5, 0.5]),  # threshold 1.026 (0.899 with the biased standard deviation)
    ],
)
def test_global_cosine_hm(loss, alpha, factor, weight):
    teacher, student = make_three_points()
    value = loss([teacher], [student], alpha=alpha, factor=factor)
    torch.testing.assert_close(value.item(), 1 / 3)
    value.backward()
    torch.testing.assert_close(student.grad, GRADIENT * torch.tensor(weight))


@BOTH_LOSSES
def test_levels_are_summed_and_images_averaged(loss):
    teacher, student = make_three_points()
    two = torch.cat([teacher, student.detach()])  # the pair of the second image is equal: distance 0
    value = loss([two, teacher], [torch.cat([student, student]), student], alpha=-3.0)
    torch.testing.assert_close(value.item(), (1 / 3 + 0) / 2 + 1 / 3)
    torch.testing.assert_close(
        upstream.global_cosine([two, teacher], [torch.cat([student, student]), student]).item(), 1 / 6 + 1 / 3
    )


@BOTH_LOSSES
def test_target_gets_no_gradient(loss):
    teacher, student = make_three_points()
    teacher.requires_grad_()
    loss([teacher], [student]).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("alpha", [-3.0, 0.0, 1.0])
@pytest.mark.parametrize("factor", [0.0, 0.3])
def test_repaired_loss_equals_the_loss(alpha, factor):
    teachers = [torch.randn(2, 8, s, s).relu() for s in (6, 3)]
    teachers[0][:, :, 0] = 0  # points with zeros in all channels
    gradients = []
    for loss in LOSSES:
        torch.manual_seed(1)
        students = [torch.randn_like(t).requires_grad_() for t in teachers]
        value = loss(teachers, students, alpha=alpha, factor=factor)
        value.backward()
        gradients.append([value.detach(), *(s.grad for s in students)])
    torch.testing.assert_close(*gradients)


def test_repaired_loss_compiles_to_one_graph():
    step = torch.compile(upstream.global_cosine_hm_repaired, fullgraph=True, backend="aot_eager")
    teacher, student = make_three_points()
    step([teacher], [student], 0.0, 0.0).backward()
    torch.testing.assert_close(student.grad, GRADIENT * torch.tensor([0.0, 0.0, 1.0]))


def test_global_cosine_hm_percent():
    teacher, student = make_three_points()
    value = upstream.global_cosine_hm_percent(
        [teacher, teacher], [student, student.detach().requires_grad_()], 0.5, 0.1
    )
    torch.testing.assert_close(value.item(), 1 / 3)  # the mean over levels
    value.backward()  # k = 1: the threshold is the largest distance
    torch.testing.assert_close(student.grad, GRADIENT / 2 * torch.tensor([0.1, 0.1, 1.0]))


def test_global_cosine_hm_adaptive():
    teacher, student = make_three_points()
    upstream.global_cosine_hm_adaptive([teacher], [student], y=3).backward()
    torch.testing.assert_close(student.grad, GRADIENT * torch.tensor([0.0, 0.0, 27.0]))  # (1 / (1/3)) ** 3


def test_alpha_at():
    assert [upstream.alpha_at(it, 2000) for it in (0, 50, 100, 200, 1999)] == [-3, -2, -1, 1, 1]


def make_pair(distance):
    """Make (teacher, student), (1, 2, h, w) each, with the given distances in [0, 2]."""
    cosine = 1 - torch.as_tensor(distance, dtype=torch.float32)
    teacher = torch.stack([torch.ones_like(cosine), torch.zeros_like(cosine)])
    return teacher[None], torch.stack([cosine, (1 - cosine**2).sqrt()])[None]


def test_upsampling_aligns_corners():
    distance = upstream.upsample(*make_pair([[0.0, 1.0], [0.5, 1.5]]), (3, 3))[0, 0]
    torch.testing.assert_close(distance, torch.tensor([[0, 0.5, 1], [0.25, 0.75, 1.25], [0.5, 1, 1.5]]))


def test_maps_of_constant_distance():
    pairs = [make_pair(torch.full((s, s), d)) for s, d in ((8, 1.0), (4, 0.5), (2, 2.0))]
    summed = upstream.anomaly_map_sum(pairs, 16)
    assert summed.dtype == np.float64
    np.testing.assert_allclose(summed, np.full((1, 16, 16), 3.5), rtol=1e-6)  # the border is mirrored
    mean = upstream.anomaly_map_unified(pairs, (16, 12))[0]
    assert mean.shape == (16, 12)
    torch.testing.assert_close(mean[2:-2, 2:-2], torch.full((12, 8), 3.5 / 3))
    side = [math.exp(-(x**2) / 32) for x in (-2, -1, 0, 1, 2)]
    torch.testing.assert_close(mean[0, 0].item(), 3.5 / 3 * (sum(side[2:]) / sum(side)) ** 2)  # zeros outside


def test_sum_is_blurred_with_33_taps():
    distance = torch.zeros(65, 65)
    distance[32, 32] = 1.0
    row = upstream.anomaly_map_sum([make_pair(distance)], 65)[0, 32]
    assert np.flatnonzero(row).tolist() == list(range(16, 49))
    np.testing.assert_allclose(row[36] / row[32], math.exp(-0.5), rtol=1e-6)


def test_gaussian_kernel():
    kernel = upstream.gaussian_kernel()
    torch.testing.assert_close(kernel.sum().item(), 1.0)
    torch.testing.assert_close((kernel[0, 0, 2, 1] / kernel[0, 0, 2, 2]).item(), math.exp(-1 / 32))


def test_image_score():
    amap = np.arange(200.0).reshape(10, 20)
    assert upstream.image_score(amap) == 199
    assert upstream.image_score(amap, 0.01) == 198.5  # mean of 2 pixels


def test_compute_pro():
    # Thresholds 0, 1, 2, 3. Of 11 good pixels 2, 1, 0, 0 lie above them: 1, 0.5, 0, 0 of the largest rate. Of the two
    # regions, one pixel of 4 and (diagonally connected) 2 and 4, the mean overlaps are 1, 1, 0.75, 0.75.
    mask = np.array([[1, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0]])
    amap = np.array([[4.0, 0, 0, 1, 2, 0, 2], [0, 0, 0, 0, 0, 4, 0]])
    expected = 0.5 * (0.75 + 1) / 2 + 0.5
    assert upstream.compute_pro(mask, amap, num_th=4) == pytest.approx(expected)


def test_compute_pro_leaves_out_high_rates():
    amap = np.array([[0.0, 1, 1, 1, 2, 2, 3, 0, 0, 0, 4]])
    mask = np.array([[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]])
    # Rates of the ten good pixels above 0, 1, 2, 3: 0.6 and 0.3 are dropped (strictly below), 0.1 and 0 are left.
    assert upstream.compute_pro(mask, amap, num_th=4) == 1.0


def test_evaluate():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.random((4, 3, 32, 32), dtype=np.float32))
    masks = torch.zeros(4, 1, 32, 32)
    masks[1, 0, 4:9, 4:9] = masks[3, 0, 20:30, 10:16] = 0.2  # values above 0 are anomalous
    images[:, 0] += 2 * (masks[:, 0] > 0)
    labels = [0, 1, 0, 1]

    def model(x):
        target = torch.tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1).expand_as(x)
        return [(target, x), (target[..., ::2, ::2], x[..., ::2, ::2])]

    maps = upstream.anomaly_map_sum(model(images), 32)
    gt = (masks[:, 0] > 0).numpy().astype(int)
    pixel, image, aupro = upstream.evaluate(model, images, masks, labels)
    assert pixel == roc_auc_score(gt.ravel(), maps.ravel())
    assert image == 1.0
    assert aupro == np.mean([upstream.compute_pro(gt[n], maps[n]) for n in (1, 3)])
    assert 0.5 < aupro < 1
    assert math.isnan(upstream.evaluate(model, images, masks, labels, max_ratio=0.01, calc_pro=False)[2])


class TinyModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 1)

    def forward(self, x):
        frozen, trained = torch.cat([x, x[:, :1]], 1), self.encoder(x)
        return [(frozen, self.decoder(trained))] * 1 + [(trained, self.decoder(frozen))] * 1


def test_pairs_loss_halves_the_groups():
    teacher, student = make_three_points()
    pairs = [(teacher, student), (teacher, student), (student, student), (teacher, student)]
    torch.testing.assert_close(upstream.pairs_loss(pairs, -3.0).item(), (1 / 3 + 1 / 3) / 2 + (0 + 1 / 3) / 2)


def test_first_training_step():
    model = TinyModel()
    images = torch.randn(2, 3, 5, 5)
    expected = upstream.pairs_loss(model(images), -3.0).item()  # no point is easy at alpha -3
    before = [p.detach().clone() for p in model.parameters()]
    losses = upstream.train(model, [images] * 3, 1, model.decoder.parameters(), model.encoder.parameters())
    assert losses == [expected]
    for old, new, lr in zip(before, model.parameters(), [1e-5, 1e-5, 2e-3, 2e-3], strict=True):
        # Adam's first step changes each parameter by the learning rate, after AdamW has multiplied it by 1 - lr * 1e-5.
        torch.testing.assert_close((new - old * (1 - lr * 1e-5)).abs(), torch.full_like(old, lr), rtol=2e-2, atol=1e-9)


def test_training_lowers_the_loss_equally_for_both_losses():
    histories = []
    for loss in LOSSES:
        torch.manual_seed(0)
        model, images = TinyModel(), torch.randn(2, 3, 5, 5)
        histories.append(
            upstream.train(model, [images] * 50, 50, model.decoder.parameters(), model.encoder.parameters(), loss=loss)
        )
    assert histories[0][-1] < histories[0][0]
    np.testing.assert_allclose(*histories, rtol=1e-4)


def test_too_few_batches_raise():
    model = TinyModel()
    with pytest.raises(ValueError, match="wanted 3 of them, got 1"):
        upstream.train(model, [torch.randn(2, 3, 5, 5)], 3, model.decoder.parameters(), model.encoder.parameters())
