"""Normalisation, random erasing, mixup and CutMix of whole batches, beside torchvision and timm."""

import lightning
import numpy as np
import pytest
import timm.data.mixup
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.data.random_erasing import RandomErasing as TimmErasing
from torch.nn import functional as F
from torchvision.transforms import functional as pixels

from nat_models.data import device_transforms
from nat_models.data.device_transforms import DeviceTransform, Mixup, RandomErasing, batch_generator

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def training(epoch: int = 0, batch: int = 0) -> lightning.Trainer:
    """A trainer that is about to train on one batch of an epoch."""
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.training = True
    trainer.fit_loop.epoch_progress.current.completed = epoch
    trainer.fit_loop.epoch_loop.batch_progress.current.ready = batch
    return trainer


def expected_normalisation(image: torch.Tensor) -> torch.Tensor:
    return pixels.normalize(image.float() / 255, list(MEAN), list(STD))


def test_normalisation_is_torchvisions_for_images_clips_and_views():
    images = random_images(4, 3, 6, 5)
    (normalised,) = DeviceTransform(MEAN, STD, 2)([images], None)
    assert torch.equal(normalised, expected_normalisation(images))
    views = random_images(2, 6, 3, 4, 6, 5)  # two videos of six views of four frames
    normalised, labels = DeviceTransform(MEAN, STD, 3)([views, torch.tensor([1, 2])], None)
    expected = expected_normalisation(views.transpose(2, 3)).transpose(2, 3)
    assert torch.equal(normalised, expected) and labels.tolist() == [1, 2]


def test_training_alone_erases_and_the_batch_decides_where():
    transform = DeviceTransform(MEAN, STD, 2, RandomErasing(1.0, "pixel"))
    images = random_images(8, 3, 24, 20)
    (plain,) = transform([images], None)
    erased = {place: transform([images], training(*place))[0] for place in ((0, 0), (0, 1), (1, 0))}
    assert not any(torch.equal(a, b) for a in erased.values() for b in erased.values() if a is not b)
    assert torch.equal(transform([images], training(0, 1))[0], erased[0, 1])
    evaluating = training()
    evaluating.validating = True
    assert torch.equal(transform([images], evaluating)[0], plain)


def test_ranks_and_purposes_draw_differently(monkeypatch):
    def drawn(rank: int, purpose: str) -> float:
        trainer = training()
        monkeypatch.setattr(type(trainer), "global_rank", rank)
        return batch_generator(trainer, purpose).random()

    assert len({drawn(rank, purpose) for rank in (0, 1) for purpose in ("erasing", "mixup")}) == 4


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("shape", [(6, 3, 24, 20), (6, 3, 4, 24, 20)])
def test_erased_is_a_rectangle_and_nothing_else(mode, shape):
    images = random_images(*shape)
    spatial = len(shape) - 2
    (plain,) = DeviceTransform(MEAN, STD, spatial)([images], None)
    trainer = training()
    (erased,) = DeviceTransform(MEAN, STD, spatial, RandomErasing(0.8, mode))([images], trainer)
    boxes = RandomErasing(0.8, mode).boxes(6, 24, 20, batch_generator(trainer, "erasing"))[:, 0].tolist()
    assert 0 < sum(bottom > top for top, bottom, *_ in boxes) < 6
    for image, before, (top, bottom, left, right) in zip(erased, plain, boxes, strict=True):
        inside = torch.zeros(24, 20, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(image[..., ~inside], before[..., ~inside])
        if inside.any():
            frames = image[..., inside].view(3, -1, inside.sum())
            assert torch.equal(frames, frames[:, :1].expand_as(frames))
            values = frames[:, 0]
            distinct = {"const": 1, "rand": 3, "pixel": values.numel()}[mode]
            assert len(values.unique()) == distinct and (mode != "const" or not values.any())


def test_erased_areas_are_distributed_as_timms():
    ours = RandomErasing(0.5, count=3).boxes(4000, 32, 48, np.random.default_rng(0))
    area = torch.zeros(4000, 32, 48, dtype=torch.bool)
    for image, boxes in zip(area, ours.tolist(), strict=True):
        for top, bottom, left, right in boxes:
            image[top:bottom, left:right] = True
    torch.manual_seed(0)
    erase = TimmErasing(0.5, max_count=3, mode="const", device="cpu")
    theirs = torch.stack([erase(torch.ones(1, 32, 48))[0] == 0 for _ in range(4000)])
    for statistic in (lambda x: x.float().mean(), lambda x: x.any(dim=(1, 2)).float().mean()):
        assert statistic(area).item() == pytest.approx(statistic(theirs).item(), rel=0.08)
    shares = [x.float().mean(dim=(1, 2)).quantile(torch.tensor([0.6, 0.75, 0.9])) for x in (area, theirs)]
    torch.testing.assert_close(*shares, rtol=0.1, atol=0.01)


@given(
    mode=st.sampled_from(["batch", "pair", "elem"]),
    alphas=st.sampled_from([(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)]),
    batch_size=st.integers(1, 6),
    seed=st.integers(0, 10**6),
)
def test_mixing_is_what_the_draw_says(mode, alphas, batch_size, seed):
    images, labels = torch.rand(batch_size, 3, 2, 9, 7), torch.arange(batch_size) % 4
    mix = Mixup(4, *alphas, prob=0.8, mode=mode, label_smoothing=0.1)
    mixed, targets = mix(images, labels, np.random.default_rng(seed))
    shares, boxes = mix.draw(batch_size, 9, 7, np.random.default_rng(seed))
    one_hot = F.one_hot(labels, 4).float() * 0.9 + 0.1 / 4
    for i, (share, (top, bottom, left, right)) in enumerate(zip(shares, boxes[:, 0].tolist(), strict=True)):
        expected, other = images[i].clone(), images[-1 - i]
        if (bottom - top) * (right - left):
            expected[..., top:bottom, left:right] = other[..., top:bottom, left:right]
            assert share.item() == pytest.approx(1 - (bottom - top) * (right - left) / 63)
            assert alphas[1]
        else:
            expected = share * expected + (1 - share) * other
            assert share == 1 or alphas[0]
        torch.testing.assert_close(mixed[i], expected)
        torch.testing.assert_close(targets[i], share * one_hot[i] + (1 - share) * one_hot[-1 - i])
        if mode == "pair":
            assert share == shares[-1 - i] and torch.equal(boxes[i], boxes[-1 - i])
    if mode == "batch":
        assert len(shares.unique()) == 1


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_shares_are_distributed_as_timms(alphas):
    np.random.seed(0)
    ours = Mixup(4, *alphas, prob=0.7).draw
    theirs = timm.data.mixup.Mixup(*alphas, prob=0.7, mode="elem", num_classes=4)
    generator = np.random.default_rng(0)
    drawn = torch.cat([ours(1, 32, 24, generator)[0] for _ in range(4000)])
    expected = []
    for share, cut in zip(*theirs._params_per_elem(4000), strict=True):
        corrected = timm.data.mixup.cutmix_bbox_and_lam((3, 32, 24), share)[1] if cut else share
        expected.append(float(corrected))
    quantiles = torch.linspace(0.05, 0.95, 10)
    expected = torch.tensor(expected)
    torch.testing.assert_close(drawn.quantile(quantiles), expected.quantile(quantiles), rtol=0, atol=0.04)
    assert (drawn == 1).float().mean().item() == pytest.approx((expected == 1).float().mean().item(), abs=0.04)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomErasing(0.5, "noise"), "data.augmentation.re_mode must be const, rand or pixel, got 'noise'"),
        (lambda: Mixup(3, mode="half"), "model.mixup.mode must be batch, pair or elem, got 'half'"),
        (lambda: Mixup(3, 0.0, 0.0), "model.mixup needs mixup_alpha or cutmix_alpha above 0"),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_each_step_is_one_graph():
    images, labels = random_images(4, 3, 16, 12), torch.arange(4)
    mean, std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    generator = np.random.default_rng(0)
    erasing = RandomErasing(1.0, "pixel")
    boxes, noise = erasing.boxes(4, 16, 12, generator), erasing.noise(images, generator)
    drawn = Mixup(5, 0.8, 1.0, mode="elem").draw(4, 16, 12, generator)
    for function, arguments in (
        (device_transforms._normalize, (images, mean, std)),
        (device_transforms._normalize_and_erase, (images, mean, std, boxes, noise)),
        (device_transforms._mix, (images.float(), labels, *drawn, 5, 0.1)),
    ):
        traced = torch.compile(function.__wrapped__, fullgraph=True, backend="eager")
        for result, expected in zip(traced(*arguments), function(*arguments), strict=True):
            assert torch.equal(result, expected)


@pytest.mark.gpu
def test_compiled_equals_eager():
    images, labels = random_images(16, 3, 64, 48), torch.arange(16) % 5
    erase, mix = RandomErasing(1.0, "const"), Mixup(5, 0.8, 1.0, mode="elem")
    results = []
    for device in ("cpu", "cuda"):
        (erased,) = DeviceTransform(MEAN, STD, 2, erase)([images.to(device)], training())
        mixed, targets = mix(erased, labels.to(device), np.random.default_rng(0))
        results.append((erased.cpu(), mixed.cpu(), targets.cpu()))
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-6, atol=1e-6)
