"""The run folder: its name, and the record of how the run came to be."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import datetime
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch.distributed import TCPStore

from nat_models.data import DataModule
from nat_models.engine.files import replace_file

# Of these variables, results or speed may depend on any.
VARIABLES = (
    "CUDA",
    "CUBLAS",
    "CUDNN",
    "NVIDIA",
    "NCCL",
    "TORCH",
    "PYTORCH",
    "TRITON",
    "FUSED_NA",
    "OMP",
    "MKL",
    "SLURM",
)
SOURCES = ("*.py", "*.yaml", "*.toml")  # new files of these kinds belong to a changed working copy


@cache
def launch_time() -> str:
    """When this run was started, `2026-01-31_23-59-59-123`, the same in all its processes.

    Processes started by torchrun agree through the store that torchrun keeps for them; those started by Lightning get
    the run folder of the first process on their command line. Those started by SLURM know each other by nothing but
    the job and its step, which then take the time's place: `slurm-1234-0`.
    """
    time = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")[:-3]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        return store.compare_set("nat_models/launch_time", "", time).decode()
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 or os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        # All jobs of a sweep are in one array. A job that was requeued has been restarted.
        job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ["SLURM_JOB_ID"])
        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        return f"slurm-{job}-{os.environ['SLURM_STEP_ID']}" + (f"-{restarts}" if restarts != "0" else "")
    return time


# Hydra resolves the run folder's name before it calls `train.py`'s function, so importing this module must suffice.
OmegaConf.register_new_resolver("launch_time", launch_time, replace=True)


def hydra_folder(cfg: DictConfig) -> Path:
    """The folder that Hydra made for the run, which need not be the one it uses; `cfg.run_dir` without Hydra."""
    return Path(HydraConfig.get().runtime.output_dir if HydraConfig.initialized() else cfg.run_dir)


def record_run(
    config: DictConfig, digest: str, run_dir: Path, datamodule: DataModule, world_size: int, device: torch.device
) -> None:
    """Writes `config.yaml` (resolved) and `manifest.json` (versions, commit, command line, ...) into the run folder.

    Where the working copy differs from its commit, the difference is written too, as `changes-SHA256.patch`. A run that
    goes on keeps its manifest, which lists the manifests of resuming under `resumed`.

    Args:
        config: of the run.
        digest: of the config as it was composed, by which `ckpt_path=auto` finds the run.
        run_dir: created if missing.
        datamodule: tells the size and the classes of the data.
        world_size, device: of the trainer.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_file(run_dir / "config.yaml", OmegaConf.to_yaml(config, resolve=True).encode())
    patch = uncommitted_changes()
    path, record = run_dir / "manifest.json", manifest(config.seed, datamodule, world_size, device, patch)
    if patch:
        replace_file(run_dir / f"changes-{record['git']['changes'][:12]}.patch", patch)
    if (first := read_manifest(run_dir)) is not None:
        record = first | {"resumed": [*first.get("resumed", []), record]}
    replace_file(path, (json.dumps(record | {"config_digest": digest}, indent=2) + "\n").encode())


def read_data_config(run_dir: Path) -> dict[str, Any]:
    """How a run's evaluation prepares images, as timm's data config: `input_size`, `mean`, `std`, ..."""
    data: Any = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml").data)
    img_size = data["img_size"]
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    same = {key: data[key] for key in ("mean", "std", "interpolation", "crop_pct")}
    return {"input_size": (data.get("in_chans", 3), height, width)} | same


def read_manifest(run_dir: Path) -> dict[str, Any] | None:
    """What `manifest.json` of a run folder holds, or None if there is none; ValueError if it is damaged."""
    path = run_dir / "manifest.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}; copy it again, or remove it") from error


def read_results(folder: Path) -> dict[str, Any] | None:
    """What `results.json` of a run folder, or of an evaluation's, holds; None if there is none or it is damaged."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return results if isinstance(results, dict) else None


def manifest(
    seed: int, datamodule: DataModule, world_size: int, device: torch.device, patch: bytes | None
) -> dict[str, Any]:
    """What is needed to repeat a run: the same `overrides` of the same code, packages, data and number of processes.

    Args:
        seed: of the run.
        datamodule: of the run, opened for training.
        world_size, device: of the trainer.
        patch: of `uncommitted_changes`.
    """
    packages = {distribution.metadata["Name"]: distribution.version for distribution in distributions()}
    return {
        "command": [Path(sys.executable).name, *sys.argv],
        "overrides": list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else None,
        "folder": os.getcwd(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seed": seed,
        "git": None
        if patch is None
        else {"commit": _git("rev-parse", "HEAD").decode().strip(), "changes": _sha256(patch)},
        "data": {
            "training": len(datamodule.train_dataset),
            "validation": len(datamodule.val_dataset),
            "classes": _sha256(json.dumps(datamodule.classes).encode()),
        },
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(VARIABLES)},
        "packages": dict(sorted(packages.items())),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_threads": torch.get_num_threads(),
        "world_size": world_size,
    }


def uncommitted_changes() -> bytes | None:
    """Patch of what differs from the commit in the working copy that holds this file; None outside git."""
    with tempfile.TemporaryDirectory() as folder:
        index = os.path.join(folder, "index")
        try:
            top = _git("rev-parse", "--show-toplevel").decode().strip()
            _git("read-tree", "HEAD", folder=top, index=index)
            _git("add", "--update", folder=top, index=index)
            _git("add", "--", *SOURCES, folder=top, index=index)
            return _git("diff", "--cached", "--binary", "HEAD", folder=top, index=index)
        except (OSError, subprocess.CalledProcessError):
            return None


def _sha256(content: bytes) -> str | None:
    return hashlib.sha256(content).hexdigest() if content else None


def _git(*arguments: str, folder: str | Path = Path(__file__).parent, index: str | None = None) -> bytes:
    """What git prints, in `folder` and with another index than the working copy's if one is named."""
    environment = os.environ | ({"GIT_INDEX_FILE": index} if index else {})
    return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, check=True, env=environment).stdout
