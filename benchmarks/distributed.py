"""Training on several GPUs of one machine beside one of them: images per second, efficiency, and the losses.

    python benchmarks/distributed.py
    python benchmarks/distributed.py --device cpu --processes 2 --models test_vit --batch-sizes 8 --steps 4

Each measurement is a run of its own under torchrun: `ClassificationModule` under Lightning with DDP, compiled and
in bfloat16 on GPUs, on batches that are at hand. Efficiency is images per second over processes times those of one
process with the same batch per device. The losses are those of a small model in float32 on random images, learned by
heart in a few epochs by one process and by several with the same effective batch: the largest relative difference.
Rows are written as they come; on GPUs each measurement compiles anew, which takes minutes.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from record import ROOT, write_csv
from timing import provenance
from training import Repeated, SteadySteps, module_for, trainer_for

import nat_models  # noqa: F401  registers the models with timm
from nat_models.data import ImageDataModule
from nat_models.data.device_transforms import DeviceTransform
from nat_models.engine.classification import COMPILE_MODES

SKIPPED = 20  # steps, at the start of each measurement
CLASSES = 400
LOSS_EPOCHS = 6
LOSS_BATCH = 64
MODELS = {"nat_tiny": (128, (3, 224, 224)), "nat3d_tiny": (8, (3, 32, 224, 224))}
"""Batch per device and shape of an image or clip."""
COLUMNS = ["what", "model", "processes", "batch_per_device", "images_per_second", "step_ms", "data_wait_ms"]
COLUMNS += ["data_wait", "gpu_peak_gib", "efficiency", "loss_difference"]


class BatchesAtHand(lightning.LightningDataModule):
    """The same random uint8 batch `length` times, normalised on the device as ever."""

    def __init__(self, batch_size: int, shape: tuple[int, ...], length: int) -> None:
        super().__init__()
        images = torch.randint(0, 256, (batch_size, *shape), dtype=torch.uint8)
        labels = torch.randint(0, CLASSES, (batch_size,))
        self.batches = Repeated((images, labels), length)
        self.device_transform = DeviceTransform([0.5] * shape[0], [0.25] * shape[0], len(shape) - 1)

    def train_dataloader(self) -> Any:
        return self.batches

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.device_transform(batch, self.trainer)


def data_parallel() -> Any:
    """The strategy of `train.py` on several devices."""
    return instantiate(OmegaConf.load(ROOT / "configs" / "trainer" / "ddp.yaml").strategy)


def measure_speed(job: dict[str, Any]) -> dict[str, Any]:
    """Images per second of all processes together, and the times of a step."""
    cuda = job["device"] == "cuda"
    steps = SKIPPED + job["steps"]
    data = BatchesAtHand(job["batch_size"], tuple(job["shape"]), steps)
    kwargs = {"num_frames": job["shape"][1]} if len(job["shape"]) == 4 else {}
    module = module_for(job["model"], CLASSES, compile=cuda and job["compile"], model_kwargs=kwargs)
    times = SteadySteps(SKIPPED)
    settings = {"accelerator": job["device"], "devices": job["processes"], "use_distributed_sampler": False}
    settings |= {"strategy": data_parallel()} if job["processes"] > 1 else {}
    trainer_for(times, steps, [], precision="bf16-mixed" if cuda else "32-true", **settings).fit(module, data)
    metrics = {name.removeprefix("speed/"): round(value, 4) for name, value in times.epoch.metrics().items()}
    return metrics | ({"gpu_peak_gib": round(peak / 2**30, 2)} if (peak := times.gpu_peak()) else {})


def measure_losses(job: dict[str, Any]) -> dict[str, Any]:
    """The loss of each epoch, of all processes together."""
    lightning.seed_everything(0, verbose=False)
    batch_size = LOSS_BATCH // job["processes"]
    data = ImageDataModule("fake", img_size=32, batch_size=batch_size, num_classes=10, augmentation={"no_aug": True})
    small = {"embed_dim": 32, "depths": [1, 1], "num_heads": [1, 2], "kernel_size": 3, "drop_path_rate": 0.0}
    optimizer = {"opt": "adamw", "lr": 2e-3, "weight_decay": 0.05}
    module = module_for("nat_mini", 10, compile=False, mixup=None, model_kwargs=small)
    module.hparams["optimizer"] = optimizer

    class Losses(lightning.Callback):
        values: list[float] = []

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.values.append(pl_module.train_loss.compute().item())

    losses = Losses()
    lightning.Trainer(
        accelerator=job["device"],
        devices=job["processes"],
        strategy=data_parallel() if job["processes"] > 1 else "auto",
        max_epochs=LOSS_EPOCHS,
        limit_val_batches=0,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data)
    return {"losses": losses.values}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one measurement under torchrun; returns what its first process found."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(job["processes"]), __file__]
        subprocess.run([*command, "--job", json.dumps(job | {"result": str(result)})], check=True)
        return json.loads(result.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--processes", type=int, default=2, help="GPUs beside one (default: %(default)s)")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="without one, only the losses")
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="per device, for each model")
    parser.add_argument("--steps", type=int, default=100, help="measured of each training (default: %(default)s)")
    parser.add_argument(
        "--compile",
        choices=COMPILE_MODES,
        default="default",
        help="mode of torch.compile on GPUs (default: %(default)s)",
    )
    parser.add_argument("--commit", help="commit to record, where git cannot tell")
    parser.add_argument("--no-losses", action="store_true", help="only the speed")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "distributed.csv", help="CSV to write")
    parser.add_argument("--append", action="store_true", help="keep the rows that the output file has")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        found = {"speed": measure_speed, "losses": measure_losses}[job["what"]](job)
        distributed = torch.distributed.is_initialized()
        if not distributed or torch.distributed.get_rank() == 0:
            Path(job["result"]).write_text(json.dumps(found))
        if distributed:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        return 0

    where = provenance(torch.device(options.device), options.commit)
    rows: list[dict[str, Any]] = []
    if options.append and options.output.exists():
        with options.output.open(newline="") as file:
            rows = list(csv.DictReader(file))

    def write(row: dict[str, Any]) -> None:
        rows.append(dict.fromkeys(COLUMNS, "") | row | where)
        write_csv(options.output, rows)
        print(row, flush=True)

    for position, model in enumerate(options.models):
        batch_size, shape = MODELS.get(model, (16, (3, 160, 160)))
        batch_size = options.batch_sizes[position] if options.batch_sizes else batch_size
        job = {"what": "speed", "model": model, "batch_size": batch_size, "shape": shape, "steps": options.steps}
        job |= {"device": options.device, "compile": options.compile}
        of_one = 0.0
        for processes in (1, options.processes):
            found = run(job | {"processes": processes})
            of_one = of_one or found["images_per_second"]
            found["efficiency"] = round(found["images_per_second"] / (processes * of_one), 4)
            write({"what": "speed", "model": model, "processes": processes, "batch_per_device": batch_size} | found)
    if not options.no_losses:
        losses = [
            run({"what": "losses", "device": options.device, "processes": p})["losses"] for p in (1, options.processes)
        ]
        difference = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
        print(f"losses by epoch: {losses}")
        row = {"what": f"losses of {LOSS_EPOCHS} epochs", "model": "nat_mini, small", "processes": options.processes}
        write(row | {"batch_per_device": LOSS_BATCH // options.processes, "loss_difference": f"{difference:.2e}"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
