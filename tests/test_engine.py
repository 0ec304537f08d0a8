"""The Lightning module: parameter groups, schedule, accumulation, averaging, resuming, metrics, checkpoints."""

import errno
import hashlib
import json
import math
import pickle
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import lightning
import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, top_k_accuracy_score
from torch.nn import functional as F

from nat_models.data import ImageDataModule
from nat_models.data.device_transforms import batch_generator
from nat_models.engine import errors
from nat_models.engine.build import quiet_lightning
from nat_models.engine.callbacks import Mistake, PredictionRecorder
from nat_models.engine.checkpoint import check_resumable, check_unfinished, find_checkpoint, read_checkpoint
from nat_models.engine.classification import COMPILE_MODES, ClassificationModule
from nat_models.engine.errors import PREEMPTED_STATUS, RUN_ERRORS, NonFiniteStepsError, exit_on
from nat_models.engine.evaluation import evaluate
from nat_models.engine.non_finite import SkipNonFiniteSteps
from nat_models.engine.plots import plot_batch, plot_confusion, plot_curves, plot_mistakes, plot_per_class
from nat_models.engine.run_folder import manifest, read_manifest

STEPS_PER_EPOCH = 4
SCHEDULE = {"sched": "cosine", "warmup_epochs": 1, "warmup_lr": 1e-5, "min_lr": 1e-4, "cooldown_epochs": 1}


@pytest.fixture(autouse=True)
def quiet():
    quiet_lightning()


def tiny_module(**settings) -> ClassificationModule:
    """A vision transformer of 0.4 M parameters for 32 x 32 grey images, without random layers."""
    settings = {"optimizer": {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05}, "schedule": SCHEDULE} | settings
    torch.manual_seed(0)
    return ClassificationModule("test_vit", 10, in_chans=1, model_kwargs={"img_size": 32}, **settings)


def digits(batch_size: int = 8) -> ImageDataModule:
    no_augmentation = {"no_aug": True}
    return ImageDataModule(
        "digits", img_size=32, in_chans=1, crop_pct=1.0, batch_size=batch_size, augmentation=no_augmentation
    )


def tiny_trainer(max_epochs: int, callbacks: list[Callback] | None = None, **settings) -> lightning.Trainer:
    """A trainer whose epochs are the same few batches in the same order, so that runs can be compared."""
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=bool(callbacks) and any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"overfit_batches": STEPS_PER_EPOCH, "limit_val_batches": 0} | settings),
    )


class LearningRates(Callback):
    """Keeps the learning rate that each optimiser step uses, of the first parameter group."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_schedule_is_warmup_cosine_and_cooldown_by_step():
    rates = LearningRates()
    tiny_trainer(5, [rates]).fit(tiny_module(), digits())
    expected = []
    for step in range(5 * STEPS_PER_EPOCH):
        if step < STEPS_PER_EPOCH:
            expected.append(1e-5 + (1e-3 - 1e-5) * step / STEPS_PER_EPOCH)
        else:
            progress = min(step / (4 * STEPS_PER_EPOCH), 1)
            expected.append(1e-4 + (1e-3 - 1e-4) * (1 + math.cos(math.pi * progress)) / 2)
    assert rates.rates == pytest.approx(expected)


def test_schedule_counts_accumulated_steps():
    rates = LearningRates()
    linear = {"sched": "poly", "decay_rate": 1.0, "min_lr": 0.0}
    tiny_trainer(3, [rates], accumulate_grad_batches=2).fit(tiny_module(schedule=linear), digits())
    assert rates.rates == pytest.approx([1e-3 * (1 - step / 6) for step in range(6)])


def test_accumulation_equals_a_larger_batch():
    sgd = {"optimizer": {"opt": "sgd", "lr": 0.1}, "schedule": {"sched": "constant"}}
    small, large = tiny_module(**sgd), tiny_module(**sgd)
    tiny_trainer(2, accumulate_grad_batches=2).fit(small, digits(batch_size=4))
    tiny_trainer(2, overfit_batches=STEPS_PER_EPOCH // 2).fit(large, digits(batch_size=8))
    start = tiny_module().state_dict()
    for name, value in large.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert not torch.equal(large.state_dict()["model.head.weight"], start["model.head.weight"])


def test_loss_with_mixup_is_the_soft_target_cross_entropy():
    module = tiny_module(mixup={"mixup_alpha": 1.0, "prob": 1.0}, label_smoothing=0.2)
    module._trainer = tiny_trainer(1)
    module.trainer.strategy._optimizers = [torch.optim.SGD(module.parameters(), lr=0.1)]
    images, labels = torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 2, 3])
    generator = batch_generator(module.trainer, "mixup")
    share = module.mixup.draw(4, 32, 32, generator)[0][0].item()
    module.log = lambda *args, **kwargs: None
    module.eval()
    loss = module.training_step((images.clone(), labels), 0)
    smooth = torch.full((4, 10), 0.2 / 10).scatter_(1, labels[:, None], 0.8 + 0.2 / 10)
    targets = share * smooth + (1 - share) * smooth.flip(0)
    logits = module(share * images + (1 - share) * images.flip(0))
    assert 0 < share < 1
    torch.testing.assert_close(loss, -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean())


def test_parameter_groups_follow_the_model():
    module = tiny_module(optimizer={"opt": "adamw", "lr": 1.0, "weight_decay": 0.1, "layer_decay": 0.5})
    trainer = tiny_trainer(3)
    trainer.fit(module, digits())
    groups = {id(p): group for group in trainer.optimizers[0].param_groups for p in group["params"]}
    for name, parameter in module.model.named_parameters():
        decayed = parameter.ndim > 1 and name not in module.model.no_weight_decay()
        assert groups[id(parameter)]["weight_decay"] == (0.1 if decayed else 0.0), name
    first, last = module.model.blocks[0].mlp.fc1.weight, module.model.blocks[-1].mlp.fc1.weight
    distance = len(module.model.blocks) - 1
    assert groups[id(first)]["lr"] == pytest.approx(groups[id(last)]["lr"] * 0.5**distance)


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_backbone_learns_at_its_share_of_the_rate(layer_decay):
    optimizer = {"opt": "adamw", "lr": 1.0, "weight_decay": 0.1, "layer_decay": layer_decay}
    rates = []
    for factor in (1.0, 0.1):
        module, trainer = tiny_module(optimizer=optimizer | {"backbone_lr_factor": factor}), tiny_trainer(3)
        trainer.fit(module, digits())
        groups = {id(p): group for group in trainer.optimizers[0].param_groups for p in group["params"]}
        assert len(groups) == sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)
        named = module.model.named_parameters()
        rates.append({name: (groups[id(p)]["lr"], groups[id(p)]["weight_decay"]) for name, p in named})
    for name, (rate, decay) in rates[0].items():
        share = 1.0 if name.startswith("head.") else 0.1
        assert rates[1][name] == (pytest.approx(share * rate), decay), name


def test_norms_biases_rpb_and_layer_scale_of_a_nat_are_not_decayed():
    size = {"depths": [2, 1], "embed_dim": 16, "num_heads": [1, 2], "kernel_size": 3}
    decayed = {"patch_embed.proj.0.weight", "patch_embed.proj.1.weight", "levels.0.downsample.reduction.weight"}
    decayed |= {"head.weight"}
    for block in ("levels.0.blocks.0", "levels.0.blocks.1", "levels.1.blocks.0"):
        decayed |= {f"{block}.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    optimizer = {"opt": "adamw", "lr": 1.0, "weight_decay": 0.1}
    for layer_decay in (None, 0.5):
        module = ClassificationModule(
            "nat_small", 10, in_chans=1, model_kwargs=size, optimizer=optimizer | {"layer_decay": layer_decay}
        )
        trainer = tiny_trainer(1)
        trainer.fit(module, digits())
        groups = {id(p): group for group in trainer.optimizers[0].param_groups for p in group["params"]}
        names = {name for name, p in module.model.named_parameters() if groups[id(p)]["weight_decay"]}
        assert names == decayed
        assert any(name.endswith(".rpb") for name, _ in module.model.named_parameters())
        assert any(name.endswith(".gamma1") for name, _ in module.model.named_parameters())
    rates = {name: groups[id(p)]["lr"] for name, p in module.model.named_parameters()}
    blocks = [rates[f"levels.{block}.mlp.fc1.weight"] for block in ("0.blocks.0", "0.blocks.1", "1.blocks.0")]
    assert rates["patch_embed.proj.0.weight"] < blocks[0] < blocks[1] < blocks[2] < rates["head.weight"] == 1.0


class Gradients(Callback):
    """Keeps the norm and the largest element of the gradients that each optimiser step uses."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.largest: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        gradients = torch.cat([parameter.grad.flatten() for parameter in pl_module.parameters()])
        self.norms.append(gradients.norm().item())
        self.largest.append(gradients.abs().max().item())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped(precision, fused):
    settings = {"precision": precision, "gradient_clip_val": 0.015625}
    by_norm, by_value, module = Gradients(), Gradients(), tiny_module(optimizer={"opt": "adamw", "fused": fused})
    tiny_trainer(3, [by_norm], **settings).fit(module, digits())
    assert by_norm.norms == pytest.approx([0.015625] * 3 * STEPS_PER_EPOCH, rel=1e-3)
    tiny_trainer(3, [by_value], gradient_clip_algorithm="value", **settings).fit(module, digits())
    assert by_value.largest == [0.015625] * 3 * STEPS_PER_EPOCH < by_value.norms


def test_optimisers_are_not_fused_on_the_cpu():
    for opt in ("adam", "adamw", "sgd"):
        optimizer, _ = tiny_module(optimizer={"opt": opt, "lr": 1.0}).build_optimizer(3, 1)
        assert not any(group["fused"] for group in optimizer.param_groups)


@pytest.mark.gpu
def test_adam_is_fused_on_a_gpu_unless_settings_say_otherwise():
    def is_fused(precision: str = "bf16-mixed", **settings) -> bool:
        module = tiny_module(optimizer={"opt": "adamw", "lr": 1.0, "layer_decay": 0.5} | settings).cuda()
        module.trainer = lightning.Trainer(
            accelerator="gpu", devices=1, precision=precision, logger=False, enable_checkpointing=False
        )
        fused = {bool(group.get("fused")) for group in module.build_optimizer(3, 1)[0].param_groups}
        assert len(fused) == 1
        return fused.pop()

    assert is_fused() and is_fused(opt="adam") and is_fused("32-true", backbone_lr_factor=0.1)
    assert not (is_fused("16-mixed") or is_fused(fused=False) or is_fused(foreach=True))
    assert not (is_fused(opt="sgd") or is_fused(opt="lamb") or is_fused(opt="lookahead_adamw"))
    assert is_fused(opt="sgd", fused=True)


def test_metrics_agree_with_scikit_learn():
    module, data, recorder = tiny_module(), digits(batch_size=64), PredictionRecorder()
    data.setup("fit")
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, callbacks=[recorder], enable_progress_bar=False, enable_model_summary=False
    )
    metrics = trainer.validate(module, data, verbose=False)[0]
    with torch.inference_mode():
        batches = (data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader())
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        logits = module.eval()(images)
    predicted = logits.argmax(dim=1)
    assert metrics["val/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics["val/top1"] == pytest.approx(accuracy_score(labels, predicted))
    assert metrics["val/top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5))
    assert metrics["val/mean_class_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert np.array_equal(recorder.confusion, confusion_matrix(labels, predicted))
    assert torch.equal(recorder.label_counts[:, 0], labels.bincount())
    assert torch.equal(recorder.label_counts[:, 1], labels[labels == predicted].bincount(minlength=10))
    confident = logits.softmax(dim=1).max(dim=1).values[predicted != labels].sort(descending=True).values[:25]
    assert [mistake.probability for mistake in recorder.mistakes] == pytest.approx(confident.tolist(), abs=1e-6)


def test_top5_needs_more_than_five_classes():
    assert "top5" not in ClassificationModule("test_vit", 5, model_kwargs={"img_size": 32}).val_metrics
    assert "top5" in ClassificationModule("test_vit", 6, model_kwargs={"img_size": 32}).val_metrics


def test_a_full_disk_is_named_with_the_run_folder(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"), exit_on(RUN_ERRORS, tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    message = f"error: [Errno 28] No space left on device; the run folder is {tmp_path}\n"
    assert capsys.readouterr().err == message


def test_a_preempted_run_keeps_its_status_when_signalled_again_on_its_way_out():
    script = (
        "import atexit, os, signal\n"
        "from nat_models.engine.errors import Preempted, exit_on\n"
        "atexit.register(lambda: [os.kill(os.getpid(), number) for number in (signal.SIGTERM, signal.SIGUSR1)])\n"
        "with exit_on(()):\n"
        "    raise Preempted"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == PREEMPTED_STATUS


def test_non_finite_loss_stops_training(tmp_path):
    module = tiny_module()
    with torch.no_grad():
        module.model.head.bias[0] = math.nan
    with pytest.raises(NonFiniteStepsError, match="not finite in 3 steps in a row"):
        tiny_trainer(3, [SkipNonFiniteSteps(str(tmp_path / "skipped.csv"), max_consecutive=2)]).fit(module, digits())


def test_compile_takes_the_modes_of_torch_compile(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: asked.append(options))
    for compile in (True, "reduce-overhead", False):
        ClassificationModule("test_vit", 10, compile=compile).setup("fit")
    assert asked == [{"mode": None}, {"mode": "reduce-overhead"}]
    assert set(COMPILE_MODES) <= set(torch._inductor.list_mode_options())
    with pytest.raises(ValueError, match="model.compile=fast: must be true, false or one of default, reduce-overhead"):
        ClassificationModule("test_vit", 10, compile="fast")


def test_models_compiled_one_after_the_other_share_nothing(monkeypatch):
    """As in a sweep, whose runs share a process: past the limit of recompilation a model would run without it."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: compile(self, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for num_classes in range(10, 14):
            module = ClassificationModule("test_vit", num_classes, compile=True)
            module.setup("fit")
            assert module(torch.randn(2, 3, 160, 160)).shape == (2, num_classes)


def test_a_mistake_in_a_sweep_ends_its_run_alone(monkeypatch, capsys):
    for in_sweep, ends in ((False, SystemExit), (True, ValueError)):  # all of it, or what Hydra takes for a failed run
        monkeypatch.setattr(errors, "in_sweep", lambda in_sweep=in_sweep: in_sweep)
        with pytest.raises(ends), exit_on((ValueError,)):
            raise ValueError("no such setting")
        assert capsys.readouterr().err == "error: no such setting\n"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)  # the error may be that of one process
    with pytest.raises(SystemExit, match="2"), exit_on((OSError,)):
        raise OSError("no such file")


def test_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match="'resnet81' is not a registered model; the nearest names are .*resnet18"):
        ClassificationModule("resnet81", 10)
    with pytest.raises(ValueError, match="does not fit test_vit: .*kernel_sise"):
        ClassificationModule("test_vit", 10, model_kwargs={"kernel_sise": 7})


def checkpoint_to(folder: Path, **settings) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="last", enable_version_counter=False, **settings)


@pytest.mark.parametrize("ema", [False, True])
def test_resumed_training_equals_uninterrupted_training(tmp_path, ema):
    def callbacks(folder: str) -> list[Callback]:
        return [checkpoint_to(tmp_path / folder)] + ([EMAWeightAveraging(decay=0.9)] if ema else [])

    whole = tiny_module()
    tiny_trainer(4, callbacks("whole")).fit(whole, digits())
    first = tiny_trainer(4, callbacks("parts"), max_steps=2 * STEPS_PER_EPOCH)
    first.fit(tiny_module(), digits())
    resumed, trainer = tiny_module(), tiny_trainer(4, callbacks("parts"))
    last = tmp_path / "parts" / "last.ckpt"
    check_resumable(last, resumed, trainer, digits())
    trainer.fit(resumed, digits(), ckpt_path=last, weights_only=True)
    assert trainer.global_step == 4 * STEPS_PER_EPOCH
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    left, right = (read_checkpoint(tmp_path / folder / "last.ckpt") for folder in ("whole", "parts"))
    for name, value in left["state_dict"].items():
        assert torch.equal(right["state_dict"][name], value), name
    for key, value in left["optimizer_states"][0]["state"].items():
        assert torch.equal(right["optimizer_states"][0]["state"][key]["exp_avg_sq"], value["exp_avg_sq"])


def test_averaged_weights_are_validated_and_saved(tmp_path):
    class Average(Callback):
        """The moving average, from the weights after each step."""

        weights: dict | None = None

        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            current = {name: value.clone() for name, value in pl_module.model.state_dict().items()}
            if self.weights is None:
                self.weights = current
            else:
                self.weights = {name: 0.8 * value + 0.2 * current[name] for name, value in self.weights.items()}

    average, best = Average(), ModelCheckpoint(tmp_path, filename="best", monitor="val/top1", mode="max")
    callbacks = [average, EMAWeightAveraging(decay=0.8), best, checkpoint_to(tmp_path)]
    trainer = tiny_trainer(2, callbacks, limit_train_batches=4, limit_val_batches=1.0, overfit_batches=0)
    data = digits(batch_size=60)
    trainer.fit(tiny_module(), data)
    saved = read_checkpoint(tmp_path / "last.ckpt")
    assert {"state_dict", "current_model_state"} <= saved.keys()
    for name, value in average.weights.items():
        torch.testing.assert_close(saved["state_dict"][f"model.{name}"], value)
    result = evaluate(tmp_path / "best.ckpt", data, {"accelerator": "cpu"})
    assert result.metrics["val/top1"] == best.best_model_score.item()
    raw = tiny_module()
    raw.load_state_dict(saved["current_model_state"])
    assert not torch.equal(raw.model.head.weight, saved["state_dict"]["model.head.weight"])


def test_checkpoint_loads_without_config_or_data(tmp_path):
    module = tiny_module(mixup={"mixup_alpha": 0.2}, class_names=[str(digit) for digit in range(10)])
    tiny_trainer(3, [checkpoint_to(tmp_path)]).fit(module, digits())
    loaded = ClassificationModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True).eval()
    images = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(loaded(images), module.eval()(images), rtol=0, atol=0)
    assert loaded.hparams["class_names"][3] == "3" and "pretrained" not in loaded.hparams


class Exploit:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


def test_foreign_checkpoints_are_refused(tmp_path):
    trace = tmp_path / "trace"
    contents = {
        "exploit.ckpt": {"state_dict": {}, "hyper_parameters": Exploit(trace), "pytorch-lightning_version": "2"},
        "weights.pth": timm.create_model("test_resnet").state_dict(),
        "other.ckpt": {"state_dict": {}, "hyper_parameters": {"lr": 1}, "pytorch-lightning_version": "2.6"},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "truncated.ckpt").write_bytes((tmp_path / "weights.pth").read_bytes()[:1000])
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=path.name):
            read_checkpoint(path)
    assert not trace.exists()
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "missing.ckpt")


def test_checkpoint_must_fit_the_run(tmp_path):
    tiny_trainer(3, [checkpoint_to(tmp_path)]).fit(tiny_module(), digits())
    last = tmp_path / "last.ckpt"
    with pytest.raises(ValueError, match=r"trained for 3 epochs already; trainer.max_epochs=3 must be larger"):
        check_unfinished(last, tiny_trainer(3))
    other = ClassificationModule("test_vit", 11, in_chans=1, model_kwargs={"img_size": 32})
    with pytest.raises(ValueError, match="num_classes=10, but this run's is 11"):
        check_resumable(last, other, tiny_trainer(4), digits())
    other_rate = tiny_module(optimizer={"opt": "adamw", "lr": 1e-2, "weight_decay": 0.05})
    check_resumable(last, other_rate, tiny_trainer(4), digits(batch_size=16))
    check_unfinished(last, tiny_trainer(4))


def test_optimiser_and_averaging_must_stay_the_same(tmp_path):
    adamw = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05}
    tiny_trainer(3, [checkpoint_to(tmp_path / "plain")]).fit(tiny_module(), digits())
    tiny_trainer(3, [EMAWeightAveraging(), checkpoint_to(tmp_path / "ema")]).fit(tiny_module(), digits())
    plain, averaged = (tmp_path / name / "last.ckpt" for name in ("plain", "ema"))
    trainer, averaging = tiny_trainer(4), tiny_trainer(4, [EMAWeightAveraging()])
    for change, message in [
        ({"opt": "sgd"}, "optim.optimizer.opt='adamw', but this run's is 'sgd'"),
        ({"weight_decay": 0.1}, "optim.optimizer.weight_decay=0.05, but this run's is 0.1"),
        ({"layer_decay": 0.8}, "optim.optimizer.layer_decay=None, but this run's is 0.8; .* only the learning rate"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_resumable(plain, tiny_module(optimizer=adamw | change), trainer, digits())
    with pytest.raises(ValueError, match="weights are not averaged, but this run's are averaged .* callbacks=default"):
        check_resumable(plain, tiny_module(), averaging, digits())
    with pytest.raises(ValueError, match="weights are averaged, but this run's are not averaged .* callbacks=ema"):
        check_resumable(averaged, tiny_module(), trainer, digits())
    check_resumable(averaged, tiny_module(), averaging, digits())


def test_schedule_goes_on_by_epochs_where_their_steps_change(tmp_path):
    rates, whole = LearningRates(), LearningRates()
    tiny_trainer(4, [whole]).fit(tiny_module(), digits())
    longer_epochs = tiny_trainer(4, [checkpoint_to(tmp_path)], overfit_batches=2 * STEPS_PER_EPOCH, max_steps=16)
    longer_epochs.fit(tiny_module(), digits())
    assert longer_epochs.current_epoch == 2
    module = tiny_module()
    tiny_trainer(4, [rates]).fit(module, digits(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert rates.rates == pytest.approx(whole.rates[2 * STEPS_PER_EPOCH :])
    assert module.steps_left() == 0


def test_finding_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="give run=FOLDER"):
        find_checkpoint(None, None)
    with pytest.raises(FileNotFoundError, match="run='/does/not/exist'"):
        find_checkpoint("/does/not/exist", None)
    with pytest.raises(FileNotFoundError, match="checkpoints/best.ckpt"):
        find_checkpoint(str(tmp_path), None)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint '/does/not/exist/best.ckpt'"):
        find_checkpoint(None, "/does/not/exist/best.ckpt")


def test_a_damaged_manifest_is_named(tmp_path):
    assert read_manifest(tmp_path) is None
    (tmp_path / "manifest.json").write_bytes(b"")
    with pytest.raises(ValueError, match="manifest.json' is damaged: .*; copy it again, or remove it"):
        read_manifest(tmp_path)


def test_evaluation_counts_the_images(tmp_path):
    tiny_trainer(3, [checkpoint_to(tmp_path)]).fit(tiny_module(), digits())
    data = digits(batch_size=50)
    counts = evaluate(tmp_path / "last.ckpt", data, {"accelerator": "cpu"}).predictions.label_counts
    assert counts[:, 0].sum() == 360
    shortened = deepcopy(data.val_dataset)
    shortened.source.targets = shortened.source.targets[:100]
    data.val_dataloader = lambda: torch.utils.data.DataLoader(shortened, batch_size=50)
    with pytest.raises(ValueError, match="100 of the 360 validation images"):
        evaluate(tmp_path / "last.ckpt", data, {"accelerator": "cpu"})


def test_manifest_tells_what_is_needed_to_repeat():
    data = digits()
    data.setup("fit")
    record = json.loads(json.dumps(manifest(7, data, 2, torch.device("cpu"), b"a patch")))
    assert record["seed"] == 7 and record["world_size"] == 2
    assert (record["data"]["training"], record["data"]["validation"]) == (1437, 360)
    assert record["data"]["classes"] == hashlib.sha256(json.dumps([str(i) for i in range(10)]).encode()).hexdigest()
    assert record["git"]["changes"] == hashlib.sha256(b"a patch").hexdigest()
    assert record["packages"]["torch"] == torch.__version__.split("+")[0]
    assert manifest(7, data, 2, torch.device("cpu"), None)["git"] is None


@pytest.mark.parametrize("num_classes", [2, 10, 60])
def test_plots_of_any_number_of_classes(tmp_path, num_classes):
    names = [f"$5_$10, a rather long class name {label}" for label in range(num_classes)]
    confusion = torch.randint(0, 3, (num_classes, num_classes)) + 20 * torch.eye(num_classes, dtype=torch.int64)
    plot_confusion(confusion, names, tmp_path / "confusion.png")
    for count in (0, 1, 7):
        mistakes = [Mistake(torch.randn(3, 20, 30), 0, 1, 0.5)] * count
        plot_mistakes(mistakes, count, names, [0.5] * 3, [0.5] * 3, tmp_path / f"mistakes_{count}.png")
    counts = torch.stack([confusion.sum(dim=1), confusion.diagonal()], dim=1)
    counts[0] = 0  # a class without samples
    plot_per_class(counts, names, tmp_path / "per_class.png")
    for shape in ((1, 3, 20, 30), (40, 1, 20, 20), (3, 3, 1, 20, 30), (12, 3, 20, 24, 24)):
        images, labels = torch.randn(shape), [index % num_classes for index in range(shape[0])]
        path = tmp_path / f"batch_{len(shape)}_{shape[0]}.png"
        plot_batch(images, labels, names, [0.5] * shape[1], [0.5] * shape[1], path)
    for path in tmp_path.iterdir():
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) > 200 and pixels.std() > 1


def test_curves_of_one_epoch(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss_epoch,val/loss,val/top1\n0,9,,1.5,0.25\n0,9,2.0,,\n")
    plot_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 500
