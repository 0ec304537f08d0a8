"""Every config composes and holds only keys that something reads; every experiment trains."""

import inspect
import json
import re

import lightning
import pytest
import timm
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object
from omegaconf import OmegaConf
from safetensors.torch import save_file
from timm.data import create_transform
from timm.scheduler import create_scheduler_v2
from training_runs import REPOSITORY, compose_train, train, write_image_folder
from video_files import write_video

from nat_models.data.datamodule import split_augmentation
from nat_models.data.device_transforms import Mixup
from nat_models.data.video.sampling import Sampling
from nat_models.data.video.transforms import training_transform
from nat_models.engine.build import (
    build_datamodule,
    build_module,
    build_trainer,
    effective_batch,
    learning_rate,
    prepare_process,
    quiet_lightning,
)
from nat_models.engine.classification import ClassificationModule
from nat_models.engine.errors import message_of

EXPERIMENTS = REPOSITORY / "configs" / "experiment"
IMAGENET = sorted(path.stem for path in (EXPERIMENTS / "imagenet").glob("*.yaml"))
IMAGENET = [name for name in IMAGENET if name not in ("recipe", "finetune_384")]
VIDEO_SETS = ("kinetics400", "something_v2", "ucf101", "hmdb51")
VIDEO = [f"{folder}/{path.stem}" for folder in VIDEO_SETS for path in sorted((EXPERIMENTS / folder).glob("*.yaml"))]
VIDEO = [name for name in VIDEO if not name.endswith("/recipe")]
ALL = ["digits", "digits_224", "moving_digits", *(f"imagenet/{name}" for name in IMAGENET), *VIDEO]
DEBUG = sorted(path.stem for path in (REPOSITORY / "configs" / "debug").glob("*.yaml"))
TINY = ["model.pretrained=false", "+model.model_kwargs.depths=[1,1,1,1]", "+model.model_kwargs.embed_dim=16"]
TINY += ["+model.model_kwargs.num_heads=[1,2,4,8]"]
TWO_STEPS = ["trainer.max_steps=2", "trainer.accelerator=cpu", "data.batch_size=4", "data.num_workers=0"]


@pytest.fixture(autouse=True)
def quiet():
    quiet_lightning()


def keys_read_by(function) -> set[str]:
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("experiment", "debug"),
    [*((name, None) for name in ALL), *((name, debug) for name in ("digits", "moving_digits") for debug in DEBUG)],
)
def test_every_key_is_read(tmp_path, experiment, debug):
    overrides = [f"experiment={experiment}", "data.root=/data"] + ([f"debug={debug}"] if debug else [])
    cfg = compose_train(tmp_path, *overrides)
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert plain["data"].keys() - {"_target_"} <= keys_read_by(get_object(plain["data"]["_target_"]))
    is_video = plain["data"]["_target_"].endswith("VideoDataModule")
    transform = training_transform if is_video else create_transform
    assert split_augmentation(plain["data"]["augmentation"])[0].keys() <= keys_read_by(transform)
    assert plain["data"].get("sampling", {}).keys() <= keys_read_by(Sampling)
    assert plain["model"].keys() <= keys_read_by(ClassificationModule)
    assert (plain["model"]["mixup"] or {}).keys() <= keys_read_by(Mixup)
    assert plain["optim"].keys() == {"base_lr", "base_batch", "optimizer", "schedule"}
    assert plain["optim"]["schedule"].keys() <= keys_read_by(create_scheduler_v2)
    assert plain["trainer"].keys() <= keys_read_by(lightning.Trainer)
    for group in ("callbacks", "logger"):
        for entry in plain[group].values():
            assert entry.keys() - {"_target_"} <= keys_read_by(get_object(entry["_target_"]))


@pytest.mark.parametrize("group, choice", [("callbacks", "ema"), ("data", "fake"), ("data", "timm")])
def test_other_choices_compose(tmp_path, group, choice):
    cfg = compose_train(tmp_path, f"{group}={choice}")
    assert all(callable(get_object(entry["_target_"])) for entry in cfg.callbacks.values())


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_recipe_states_its_source_and_builds(tmp_path, name):
    header = (EXPERIMENTS / "imagenet" / f"{name}.yaml").read_text().split("defaults:")[0]
    for field in ("Paper:", "Command:", "Hardware:", "Time:", "Expected top-1:"):
        assert f"\n# {field}" in header
    assert f"experiment=imagenet/{name} " in header
    root = write_image_folder(tmp_path / "images")
    overrides = ["data.batch_size=4", "trainer.accelerator=cpu", "trainer.devices=1", "model.pretrained=false"]
    cfg = compose_train(tmp_path, f"experiment=imagenet/{name}", f"data.root={root}", *overrides)
    with torch.device("meta"):
        module = build_module(cfg, build_datamodule(cfg), build_trainer(cfg))
    assert module.model.num_classes == 3
    fine_tuned = name == "dinat_large" or name.endswith("_384")
    assert learning_rate(cfg, 8 * (64 if fine_tuned else 128)) == (5e-5 if fine_tuned else 1e-3)


def test_fine_tuning_at_384_starts_from_a_run_at_224(tmp_path):
    root = write_image_folder(tmp_path / "images")
    data = [f"data.root={root}", "trainer.accelerator=cpu", "data.num_workers=0", "data.batch_size=4"]
    train(compose_train(tmp_path / "224", "experiment=imagenet/nat_tiny", *data, *TINY, "data.img_size=64",
                        "debug=smoke"))  # fmt: skip
    checkpoint = tmp_path / "224" / "checkpoints" / "last.ckpt"
    given = f"+model.model_kwargs.pretrained_cfg_overlay.file={checkpoint}"
    cfg = compose_train(tmp_path / "384", "experiment=imagenet/nat_tiny_384", *data, *TINY[1:], given)
    datamodule = build_datamodule(cfg)
    assert datamodule.train_dataset[0][0].shape == (3, 384, 384)
    module = build_module(cfg, datamodule, build_trainer(cfg))
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, weights[f"model.{name}"]) for name, value in module.model.state_dict().items())


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_recipe_trains_two_steps(tmp_path, name):
    root = write_image_folder(tmp_path / "images")
    run_dir = tmp_path / "run"
    small = [*TINY, *TWO_STEPS, "data.img_size=64"]
    train(compose_train(run_dir, f"experiment=imagenet/{name}", f"data.root={root}", *small))
    results = json.loads((run_dir / "results.json").read_text())
    assert results["images"] == 6 and results["metrics"]["val/loss"] > 0
    assert torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of six small videos of three classes with the lists `train.csv` and `validation.csv`."""
    root = tmp_path_factory.mktemp("videos")
    for index in range(6):
        write_video(root / f"{index}.mp4", 12, size=(72, 64))
    for name in ("train", "validation"):
        (root / f"{name}.csv").write_text("".join(f"{index}.mp4,{index % 3}\n" for index in range(6)))
    return root


@pytest.mark.parametrize("name", VIDEO)
def test_video_recipe_states_its_source_and_builds(tmp_path, videos, name):
    header = (EXPERIMENTS / f"{name}.yaml").read_text().split("defaults:")[0]
    for field in ("Paper:", "Command:", "Hardware:", "Time:", "Expected top-1:"):
        assert f"\n# {field}" in header
    assert f"experiment={name} " in header
    cfg = compose_train(tmp_path, f"experiment={name}", *video_data(videos), "model.pretrained=false")
    data = build_datamodule(cfg)
    with torch.device("meta"):
        module = build_module(cfg, data, build_trainer(cfg))
    assert module.model.num_classes == 3 and cfg.data.img_size == [224, 224]
    assert learning_rate(cfg, 64) == (3e-4 if name.startswith("something") else 1e-3)
    directional = name.startswith("something")
    assert (cfg.data.augmentation.hflip == 0) == directional and (cfg.data.sampling.mode == "uniform") == directional


def test_the_model_is_for_clips_of_the_length_of_the_data(tmp_path, videos):
    overrides = ["experiment=kinetics400/nat_stream_tiny", *video_data(videos), *TINY, "data.sampling.num_frames=6"]
    cfg = compose_train(tmp_path, *overrides)
    assert build_module(cfg, build_datamodule(cfg), build_trainer(cfg)).model.num_frames == 6
    cfg = compose_train(tmp_path, *overrides, "model.model_kwargs.num_frames=32")
    with pytest.raises(ValueError, match="num_frames must be data.sampling.num_frames=6, got 32"):
        build_module(cfg, build_datamodule(cfg), build_trainer(cfg))


def video_data(root) -> list[str]:
    lists = ["data.train_list=train.csv", "data.val_list=validation.csv", "data.num_classes=null"]
    devices = ["trainer.accelerator=cpu", "trainer.devices=1", "data.num_workers=0", "data.batch_size=2"]
    return [f"data.root={root}", *lists, *devices]


def test_fine_tuning_starts_from_the_weights_it_is_given_or_not_at_all(tmp_path, videos):
    weights = timm.create_model("nat3d_tiny", depths=[1, 1, 1, 1], embed_dim=16, num_heads=[1, 2, 4, 8], num_classes=7)
    file = tmp_path / "kinetics.safetensors"
    save_file(weights.state_dict(), file)
    small = [*TINY[1:], "data.img_size=64", "data.sampling.num_frames=4", "trainer.precision=32-true", "debug=smoke"]
    overrides = ["experiment=ucf101/nat3d_tiny", *video_data(videos), *small]
    given = f"model.model_kwargs.pretrained_cfg_overlay.file={file}"
    cfg = compose_train(tmp_path / "run", *overrides)
    with pytest.raises(ValueError, match="pretrained_cfg_overlay.file must be set, or model.pretrained=false"):
        build_module(cfg, build_datamodule(cfg), build_trainer(cfg))
    cfg = compose_train(tmp_path / "run", *overrides, given)
    module = build_module(cfg, build_datamodule(cfg), build_trainer(cfg))
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, weights.state_dict()[name]) == (not name.startswith("head.")), name
    train(compose_train(tmp_path / "run", *overrides, given))
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_video_models_start_from_image_weights_of_choice(tmp_path, videos, monkeypatch):
    small = dict(depths=[1, 1, 1, 1], embed_dim=16, num_heads=[1, 2, 4, 8])
    image_model = timm.create_model("nat_tiny", **small, num_classes=7)
    file, of_video = tmp_path / "image.safetensors", tmp_path / "video.safetensors"
    save_file(image_model.state_dict(), file)
    save_file(timm.create_model("nat3d_tiny", **small).state_dict(), of_video)

    def module(*overrides: str) -> ClassificationModule:
        settings = ["experiment=kinetics400/nat3d_tiny", *video_data(videos), *TINY[1:], *overrides]
        cfg = compose_train(tmp_path, *settings)
        return build_module(cfg, build_datamodule(cfg), build_trainer(cfg))

    started = module(f"model.init_from_image={file}")
    assert started.model.load_report.inflated and "init_from_image" not in started.hparams
    for name, value in image_model.state_dict().items():
        if value.dim() != 4 and not name.startswith("head."):
            assert torch.equal(started.model.state_dict()[name], value), name
    overlays = []
    create_model = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *args, pretrained_cfg_overlay, **kwargs: overlays.append(pretrained_cfg_overlay)
        or create_model(*args, pretrained_cfg_overlay={"file": str(file)}, **kwargs),
    )  # fmt: skip
    module("model.init_from_image=dinat_large.in22k_ft_in1k")
    assert overlays[0]["url"].endswith("dinat_large_in22k_in1k_224.pth")
    monkeypatch.undo()
    overlay = "+model.model_kwargs.pretrained_cfg_overlay.file=weights.pth"
    for overrides, message in (
        ([f"model.init_from_image={file}", "model.pretrained=false"], "init_from_image=.* needs model.pretrained=true"),
        ([f"model.init_from_image={file}", overlay], "both name weights to start from; one must be null"),
        (["model.init_from_image=nat_tinny"], "init_from_image='nat_tinny' is neither a file nor a registered model"),
        (["model.init_from_image=nat_tiny.in23k"], "model.init_from_image='nat_tiny.in23k': "),
        ([f"model.init_from_image={of_video}"], "init_from_image=.* must be weights of images"),
    ):
        with pytest.raises(ValueError, match=message):
            module(*overrides)


def test_fine_tuning_needs_95_percent_of_the_backbone(tmp_path, videos, capsys):
    small = dict(depths=[1, 1, 1, 1], embed_dim=16, num_heads=[1, 2, 4, 8])
    weights = timm.create_model("nat3d_tiny", **small, num_classes=7).state_dict()
    file = tmp_path / "kinetics.safetensors"
    overrides = ["experiment=ucf101/nat3d_tiny", *video_data(videos), *TINY[1:], "data.img_size=64"]
    overrides += ["data.sampling.num_frames=4", "trainer.precision=32-true", "debug=smoke"]
    given = f"model.model_kwargs.pretrained_cfg_overlay.file={file}"

    def run_with(lacking: str, *more: str):
        save_file({name: value for name, value in weights.items() if not name.startswith(lacking)}, file)
        run_dir = tmp_path / lacking
        train(compose_train(run_dir, *overrides, given, *more))
        return capsys.readouterr().out

    backbone = {name: value.numel() for name, value in weights.items() if not name.startswith("head.")}
    lacking = {name for name in backbone if name.startswith("levels.3")}
    share = 100 * (1 - sum(backbone[name] for name in lacking) / sum(backbone.values()))
    assert share < 95
    with pytest.raises(SystemExit, match="2"):
        run_with("levels.3")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"missing keys: {min(lacking)}"[:22] in error and "levels.3.blocks.0" in error
    assert f"they hold {share:.1f} % of the backbone's parameters, but 95 % are needed" in error
    assert f"{share:.1f} % of the backbone's parameters loaded" in run_with("levels.3", "model.from_scratch=true")
    output = run_with("patch_embed.norm")
    assert "parameters loaded; new: " in output and "patch_embed.norm.weight" in output


def test_weights_of_timms_own_models_must_fit(tmp_path):
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.safetensors")}}
    with pytest.raises(ValueError, match="model.pretrained=true: .*Missing key"):
        ClassificationModule("test_resnet", 1000, pretrained=True, model_kwargs=overlay)


def test_smoke_run_on_fake_data(tmp_path):
    overrides = ["data=fake", "model.model_name=test_resnet", "trainer.accelerator=cpu", "debug=smoke"]
    train(compose_train(tmp_path, "experiment=none", *overrides, "optim.base_batch=null", "callbacks=ema"))
    assert json.loads((tmp_path / "results.json").read_text())["images"] == 2 * 8
    cfg = OmegaConf.load(tmp_path / "config.yaml")
    assert (cfg.data.img_size, cfg.data.crop_pct) == ([160, 160], 0.95)  # what timm says of test_resnet


def test_effective_batch_and_learning_rate(tmp_path):
    settings = ["data.batch_size=16", "optim.base_lr=1e-3", "optim.base_batch=64"]
    cfg = compose_train(tmp_path, *settings, "trainer.accumulate_grad_batches=3", "trainer.devices=1")
    data = build_datamodule(cfg)
    trainer = build_trainer(cfg)
    assert effective_batch(data, trainer) == 48
    module = build_module(cfg, data, trainer)
    assert module.hparams["optimizer"]["lr"] == pytest.approx(1e-3 * 48 / 64)
    cfg.optim.base_batch = None
    assert learning_rate(cfg, 48) == 1e-3


MISTAKES = {
    "model.mixup={mixup_alpa: 0.8}": "model.mixup has no setting 'mixup_alpa'; allowed are mixup_alpha, cutmix_alpha, ",
    "model.mixup=0.8": "model.mixup must be a mapping or null, got 0.8",
    "model.distillation={teachr: test_vit}": "model.distillation has no setting 'teachr'; allowed are teacher, ",
    "model.distillation={kind: soft}": "model.distillation.teacher must be set",
    "model.label_smoothing=2": "model.label_smoothing must be a number, at least 0 and at most 1, got 2",
    "model.pretrained=abc": "model.pretrained must be true or false, got 'abc'",
    "+model.pretraind=true": "model has no setting 'pretraind'; allowed are model_name, ",
    "optim.optimizer.opt=adamww": "optim.optimizer.opt='adamww' is unknown; the nearest names are adamw, ",
    "optim.optimizer.weight_decay=abc": "optim.optimizer.weight_decay must be a number, got 'abc'",
    "+optim.optimizer.lrr=1": "optim.optimizer={'opt': 'adamw', .*'lrr': 1, .*unexpected keyword argument 'lrr'",
    "optim.schedule.sched=cosin": "optim.schedule.sched='cosin' is unknown; allowed are cosine, ",
    "optim.schedule.warmup_epochs=abc": "optim.schedule.warmup_epochs must be an integer, got 'abc'",
    "+optim.schedule.min_lrr=0": "optim.schedule has no setting 'min_lrr'; the nearest names are min_lr, ",
    "optim.base_lr=abc": "optim.base_lr must be a number, at least 0, got 'abc'",
    "optim.base_batch=0": "optim.base_batch must be a number, above 0, got 0",
    "trainer.max_epochs=abc": "trainer.max_epochs must be an integer or null, got 'abc'",
    "+trainer.fooo=1": "trainer has no setting 'fooo'; allowed are accelerator, ",
    "+trainer.fast_dev_run=true": "trainer.fast_dev_run must be false",
    "trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches must be an integer, at least 1, got 0",
    "trainer.limit_train_batches=0": "trainer.limit_train_batches must be a number, above 0, got 0",
    "callbacks.non_finite.max_total=abc": "callbacks.non_finite.max_total must be an integer, got 'abc'",
    "+callbacks.best.monitr=loss": "callbacks.best has no setting 'monitr'; the nearest names are monitor",
    "+logger.csv.names=csv": "logger.csv has no setting 'names'; allowed are save_dir, name",
    "data.interpolation=bicubicc": "data.interpolation='bicubicc' is unknown; allowed are nearest, bilinear, bicubic, ",
    "+data.augmentation.hflipp=1": "data.augmentation has no setting 'hflipp'; the nearest names are hflip",
    "data.eval_batch_size=abc": "data.eval_batch_size must be an integer or null, got 'abc'",
    "num_threads=0": "num_threads must be an integer, at least 1, got 0",
    "seed=abc": "seed must be an integer, at least 0 and at most 4294967295, got 'abc'",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_in_settings_are_named_before_there_is_a_run_folder(tmp_path, override):
    cfg = compose_train(tmp_path / "run", "trainer.accelerator=cpu", override)
    with pytest.raises((ValueError, InstantiationException)) as mistake:
        prepare_process(cfg)
        build_module(cfg, build_datamodule(cfg), build_trainer(cfg))
    assert re.search(MISTAKES[override], message_of(mistake.value))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_epochs=0", "trainer.max_epochs=0 must exceed"),
        ("model.model_name=nat_miny", "nat_miny.*nearest names are .*nat_mini"),
        ("data.batch_size=15", "data.batch_size must be even"),
    ],
)
def test_settings_that_cannot_work_together(tmp_path, override, message):
    cfg = compose_train(tmp_path, "model.mixup={mixup_alpha: 0.2}", override)
    with pytest.raises(ValueError, match=message):
        build_module(cfg, build_datamodule(cfg), build_trainer(cfg))
