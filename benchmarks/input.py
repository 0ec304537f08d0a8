"""Images per second of training with batches at hand, with tar shards and with a folder, and where the time goes.

    python benchmarks/input.py
    python benchmarks/input.py --device cpu --model test_vit --images 256 --links 8 --batch-size 16 --steps 8

The data is made here: JPEG files of 500 x 375 pixels and about 110 kB, as ImageNet's are, of random smooth fields with
fine texture, linked several times over to make a longer epoch. They are read from memory: `/dev/shm`, or what the
system has kept of files just written.
Loading is `ImageDataModule` with the augmentation of the ImageNet recipes, training `ClassificationModule` with mixup
under Lightning, of which only the steady steps count. Rows:

    case   loader               nothing but the loader, all workers at work
           training             images per second, ms of a step, ms and share of the wait for data
    stage  one core             ms of CPU time of an image in each stage of loading, in the benchmark's own process
           GPU kernels          ms of a step, of the kernels that take the most (from the profiler)

A trace of some steps that read shards is written beside the table.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import lightning
import numpy as np
import torch
import yaml
from PIL import Image
from record import ROOT, write_csv
from rich.console import Console
from rich.table import Table
from timing import provenance
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from training import Repeated, SteadySteps, module_for, trainer_for

import nat_models  # noqa: F401  registers the models with timm
from nat_models.data import ImageDataModule
from nat_models.engine.classification import COMPILE_MODES
from nat_models.shards import main as write_shards

SIZE = (500, 375)  # width and height
BYTES = 110_000  # of a file
CLASSES = 10
PROFILED = 5  # steps
SKIPPED = 120  # steps, at the start of each training: until what workers read ahead while it compiled is used up


def write_jpeg(index: int, root: Path) -> None:
    """Writes image `index` of the set: smooth fields of several scales, and noise that makes it as large as a photo."""
    rng = np.random.default_rng(index)
    pixels = np.full((SIZE[1], SIZE[0], 3), 128.0, np.float32)
    for cells, strength in ((3, 60), (12, 30), (50, 16)):
        field = rng.normal(0, strength, (cells * 3 // 4, cells, 3)).astype(np.float32)
        channels = [np.asarray(Image.fromarray(field[..., c]).resize(SIZE, Image.Resampling.BICUBIC)) for c in range(3)]
        pixels += np.stack(channels, axis=-1)
    pixels += rng.normal(0, 20, (SIZE[1], SIZE[0], 1)).astype(np.float32)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(root / f"class_{index % CLASSES}" / f"{index:06d}.jpg", quality=92)


def write_folder(root: Path, images: int, links: int, workers: int) -> int:
    """Writes `root/train` and a small `root/val`; returns the mean size of a file in bytes."""
    for split in ("train", "val"):
        for label in range(CLASSES):
            (root / split / f"class_{label}").mkdir(parents=True)
    with Pool(workers) as pool:
        pool.map(partial(write_jpeg, root=root / "train"), range(images), chunksize=16)
    files = sorted((root / "train").glob("*/*.jpg"))
    for file in files:
        for copy in range(1, links):
            os.link(file, file.with_name(f"{file.stem}_{copy}.jpg"))
    for label in range(CLASSES):
        file = root / "train" / f"class_{label}" / f"{label:06d}.jpg"
        os.link(file, root / "val" / file.parent.name / file.name)
    return sum(file.stat().st_size for file in files) // len(files)


def place(needed: int) -> str | None:
    """`/dev/shm` if that has so many bytes, else the usual place, from which files are read through memory as well."""
    shm = "/dev/shm"
    return shm if os.path.isdir(shm) and shutil.disk_usage(shm).free > needed else None


def data_module(name: str, root: Path, options: argparse.Namespace) -> ImageDataModule:
    recipe = yaml.safe_load((ROOT / "configs" / "data" / "imagenet.yaml").read_text())
    settings = {key: recipe[key] for key in ("mean", "std", "interpolation", "crop_pct", "augmentation")}
    data = ImageDataModule(
        name,
        str(root),
        val_split="val",
        img_size=options.image_size,
        batch_size=options.batch_size,
        num_workers=options.workers,
        **settings,
    )
    data.setup("fit")
    return data


def loader_rate(data: ImageDataModule, batches: int) -> float:
    """Images per second that the workers deliver, from when all of them have delivered."""
    iterator = iter(data.train_dataloader())
    for _ in range(max(2 * data.num_workers, 1)):
        next(iterator)
    start = perf_counter()
    for _ in range(batches):
        next(iterator)
    return batches * data.batch_size / (perf_counter() - start)


def stages(data: ImageDataModule, images: int) -> dict[str, float]:
    """Milliseconds of CPU time of one image in each stage of loading: mean over `images` images."""
    dataset = data.train_dataset
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[[Any], Any], argument: Any) -> Any:
        start = process_time()
        result = function(argument)
        seconds[name] = seconds.get(name, 0.0) + process_time() - start
        return result

    for index in np.random.default_rng(0).integers(0, len(dataset), images).tolist():
        file, _ = timed("read", dataset.source.reader.__getitem__, index)
        with file:
            image = timed("decode", lambda file: Image.open(file).convert("RGB"), file)
        for transform in dataset.transform.transforms:
            image = timed(type(transform).__name__, transform, image)
    return {name: 1000 * total / images for name, total in seconds.items()}


class Profile(lightning.Callback):
    """Profiles `PROFILED` steps from step `first` on."""

    def __init__(self, first: int, activities: list[ProfilerActivity]) -> None:
        self.first = first
        self.profiler = profile(activities=activities)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.profiler.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first + PROFILED - 1:
            self.profiler.stop()

    def kernels(self, count: int) -> dict[str, float]:
        """Milliseconds of a step, by kernel, of the `count` longest; the others together."""
        # Operators of the host have their kernels' time as well; those are left out, and marked ranges.
        kernels = [event for event in self.profiler.key_averages() if event.device_type == DeviceType.CUDA]
        totals = {k.key: k.self_device_time_total / 1000 / PROFILED for k in kernels if not k.is_user_annotation}
        longest = dict(sorted(totals.items(), key=lambda item: -item[1])[:count])
        return longest | {"all others": sum(totals.values()) - sum(longest.values())}


def train(data: ImageDataModule, options: argparse.Namespace, profiled: Profile | None) -> dict[str, Any]:
    """Images per second, step and wait of steady training steps."""
    times = SteadySteps(SKIPPED)
    cuda = options.device == "cuda"
    module = module_for(options.model, CLASSES, compile=cuda and options.compile)
    steps = SKIPPED + options.steps
    callbacks = [profiled] if profiled else []
    precision = "bf16-mixed" if cuda else "32-true"
    trainer_for(times, steps, callbacks, accelerator=options.device, devices=1, precision=precision).fit(module, data)
    assert times.epoch.steps == options.steps, f"{times.epoch.steps} steps, the data has too few images"
    metrics = {name.removeprefix("speed/"): round(value, 4) for name, value in times.epoch.metrics().items()}
    peak = None if options.compile == "reduce-overhead" else times.gpu_peak()  # CUDA graphs keep memory of their own
    return metrics | ({"gpu_peak_gib": round(peak / 2**30, 2)} if peak else {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", default="nat_tiny")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--images", type=int, default=4096, help="different files (default: %(default)s)")
    parser.add_argument(
        "--links", type=int, default=8, help="times that each file is in the set (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=100, help="measured of each training (default: %(default)s)")
    parser.add_argument(
        "--compile",
        choices=COMPILE_MODES,
        default="default",
        help="mode of torch.compile on a GPU (default: %(default)s)",
    )
    parser.add_argument("--loader-only", action="store_true", help="train nothing")
    parser.add_argument("--commit", help="commit to record, where git cannot tell")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "input.csv", help="CSV to write")
    parser.add_argument("--trace", type=Path, help="where to write the trace, a .json.gz (default: none)")
    options = parser.parse_args()
    needed = options.batch_size * (0 if options.loader_only else SKIPPED + options.steps)
    needed = max(needed, options.batch_size * (4 * options.workers + 2))
    if options.images * options.links < needed:
        parser.error(f"--images x --links must be at least {needed}")
    where = provenance(torch.device(options.device), options.commit)
    rows: list[dict[str, Any]] = []

    def add(case: str, source: str, stage: str = "", **values: Any) -> None:
        row = {"case": case, "source": source, "stage": stage, "workers": options.workers}
        columns = ("images_per_second", "ms", "step_ms", "data_wait_ms", "data_wait", "gpu_peak_gib")
        row |= {"model": options.model, "batch_size": options.batch_size} | {name: "" for name in columns} | values
        rows.append(row | {"image": f"{options.image_size} px", "file_bytes": file_bytes, **where})
        write_csv(options.output, rows)  # a run that is cut off leaves what it has
        print(case, source, stage, values, flush=True)

    folder = Path(tempfile.mkdtemp(dir=place(2 * BYTES * options.images * (1 + options.links))))
    try:
        file_bytes = write_folder(folder / "folder", options.images, options.links, options.workers)
        command = [str(folder / "folder"), str(folder / "shards"), "--workers", str(options.workers)]
        assert write_shards(command) == 0
        sources = {name: data_module(name, folder / name, options) for name in ("shards", "folder")}
        for name, data in sources.items():
            for stage, ms in stages(data, 200).items():
                add("stage, one core", name, stage, ms=round(ms, 3))
        for name, data in sources.items():
            rate = loader_rate(data, 2 * options.workers)
            add("loader", name, images_per_second=round(rate, 1))
        if not options.loader_only:
            data = data_module("folder", folder / "folder", options)
            batch = next(iter(data.train_dataloader()))
            repeated = Repeated(tuple(batch), SKIPPED + options.steps)
            data.train_dataloader = lambda: repeated  # type: ignore[method-assign, return-value]
            add("training", "batches at hand", **train(data, options, None))
            for name, data in sources.items():
                add("training", name, **train(data, options, None))
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (options.device == "cuda")
            profiled = Profile(SKIPPED, activities)
            train(data_module("shards", folder / "shards", options), options, profiled)
            if options.device == "cuda":
                for kernel, ms in profiled.kernels(12).items():
                    add("stage, GPU kernels", "shards", kernel[:100], ms=round(ms, 3))
            if options.trace:
                profiled.profiler.export_chrome_trace(str(options.trace))
    finally:
        shutil.rmtree(folder)
    table = Table("case", "source", "stage", "images/s", "ms", "step ms", "wait ms", "wait", title=str(where["device"]))
    for row in rows:
        names = ("case", "source", "stage", "images_per_second", "ms", "step_ms", "data_wait_ms", "data_wait")
        table.add_row(*(str(row[name]) for name in names))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
