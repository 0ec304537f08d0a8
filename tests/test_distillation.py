"""Knowledge distillation: the loss, what the teacher gets, and what it leaves behind."""

import json

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch.nn import functional as F
from training_runs import compose_train, train

from nat_models.engine.classification import ClassificationModule
from nat_models.engine.distillation import Distillation

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A random teacher of ten classes with weights on disk; timm says 160 x 160 of it."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    torch.nn.init.normal_(model.get_classifier().weight)
    folder = tmp_path_factory.mktemp("teacher")
    save_for_hf(model, str(folder), data_config={"mean": (0.3, 0.4, 0.5), "std": (0.2, 0.25, 0.3)})
    return f"local-dir:{folder}"


def teacher_logits(teacher: str, pixels: torch.Tensor) -> torch.Tensor:
    """For pixels `[B, 3, H, W]` in 0..1, by torch's own functions."""
    model = timm.create_model(teacher, pretrained=True).eval()
    resized = F.interpolate(pixels, (160, 160), mode="bicubic", antialias=True)
    mean, std = torch.tensor([0.3, 0.4, 0.5])[:, None, None], torch.tensor([0.2, 0.25, 0.3])[:, None, None]
    return model((resized - mean) / std).detach()


@pytest.mark.parametrize("in_chans", [3, 1])
@pytest.mark.parametrize("kind, alpha, temperature", [("soft", 0.3, 2.0), ("soft", 1.0, 1.0), ("hard", 0.7, 1.0)])
def test_loss(teacher, in_chans, kind, alpha, temperature):
    torch.manual_seed(1)
    pixels = torch.rand(4, in_chans, 40, 40)
    logits = torch.randn(4, 10, requires_grad=True)
    mean, std = torch.tensor(MEAN[:in_chans])[:, None, None], torch.tensor(STD[:in_chans])[:, None, None]
    distillation = Distillation(10, in_chans, teacher, kind=kind, alpha=alpha, temperature=temperature)
    images = (pixels - mean) / std
    loss = distillation.loss(torch.tensor(2.0), logits, images, MEAN[:in_chans], STD[:in_chans])
    answers = teacher_logits(teacher, pixels.expand(-1, 3, -1, -1))
    if kind == "hard":
        expected = -logits.log_softmax(1)[range(4), answers.argmax(1)].mean()
    else:
        target, own = (answers / temperature).softmax(1), (logits / temperature).softmax(1)
        expected = temperature**2 * (target * (target / own).log()).sum(1).mean()
    assert loss.item() == pytest.approx(((1 - alpha) * 2 + alpha * expected).item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().sum() > 0 and all(not p.requires_grad for p in distillation.teacher.parameters())


def test_clips_are_resized_frame_by_frame(teacher):
    distillation = Distillation(10, 3, teacher)
    clip = torch.rand(2, 3, 4, 20, 30)
    prepared = distillation.prepare(clip, MEAN, STD)
    frames = [distillation.prepare(clip[:, :, index], MEAN, STD) for index in range(4)]
    torch.testing.assert_close(prepared, torch.stack(frames, dim=2))


@pytest.mark.parametrize("callbacks", ["default", "ema"])
def test_the_teacher_sees_what_is_mixed_and_leaves_nothing_in_the_checkpoint(tmp_path, teacher, callbacks, monkeypatch):
    seen, given = [], []
    original, forward = Distillation.loss, ClassificationModule.forward
    monkeypatch.setattr(ClassificationModule, "forward", lambda self, x: (given.append(x), forward(self, x))[1])

    def loss(self, loss, logits, images, mean, std):
        assert not self.teacher.training
        before = {name: value.clone() for name, value in self.teacher.state_dict().items()}
        result = original(self, loss, logits, images, mean, std)
        assert all(torch.equal(value, before[name]) for name, value in self.teacher.state_dict().items())
        assert given[-1] is images and list(mean) == list(std) == [0.5] * 3  # what timm says of test_vit
        seen.append(result)
        return result

    monkeypatch.setattr(Distillation, "loss", loss)
    settings = ["experiment=none", "data=fake", "model.model_name=test_vit", "data.img_size=160", "data.batch_size=4"]
    settings += ["trainer.accelerator=cpu", "debug=smoke", "optim.base_batch=null", f"callbacks={callbacks}"]
    settings += [f"model.distillation={{teacher: '{teacher}', kind: hard}}", "model.mixup={mixup_alpha: 1.0}"]
    train(compose_train(tmp_path, *settings))
    assert len(seen) == 2
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    names = {f"model.{name}" for name in timm.create_model("test_vit", num_classes=10).state_dict()}
    assert {name for name in checkpoint["state_dict"] if not name.startswith(("val_", "train_", "test_"))} == names
    optimized = sum(len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"])
    assert optimized == len(list(timm.create_model("test_vit").parameters()))
    assert "distillation" not in checkpoint["hyper_parameters"]
    assert json.loads((tmp_path / "results.json").read_text())["images"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "warm"}, "kind must be soft or hard, got 'warm'"),
        ({"alpha": 2}, "alpha must be in 0..1, got 2"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"num_classes": 7}, "has 10 classes, the data 7"),
        ({"teacher": "test_resnett"}, "model.distillation.teacher='test_resnett' is not a registered model"),
        ({"teacher_kwargs": {"width": 3}}, "width"),
    ],
)
def test_settings_that_cannot_work(teacher, settings, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**({"num_classes": 10, "in_chans": 3, "teacher": teacher} | settings))
