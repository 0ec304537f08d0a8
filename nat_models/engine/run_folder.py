"""The run folder: its name, and the record of how the run came to be."""

import json
import os
import platform
import subprocess
import sys
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.distributed import TCPStore

from nat_models.engine.files import replace_file

PACKAGES = (
    "nat-models",
    "torch",
    "torchvision",
    "triton",
    "timm",
    "lightning",
    "torchmetrics",
    "hydra-core",
    "numpy",
    "av",
    "torchcodec",
)


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


def record_run(config: DictConfig, digest: str, run_dir: Path, world_size: int, device: torch.device) -> None:
    """Writes `config.yaml` (resolved) and `manifest.json` (versions, commit, command line, ...) into the run folder.

    A run that goes on keeps its manifest, which lists the manifests of resuming under `resumed`.

    Args:
        config: of the run.
        digest: of the config as it was composed, by which `ckpt_path=auto` finds the run.
        run_dir: created if missing.
        world_size, device: of the trainer.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_file(run_dir / "config.yaml", OmegaConf.to_yaml(config, resolve=True).encode())
    path, record = run_dir / "manifest.json", manifest(config.seed, world_size, device)
    if path.exists():
        first = json.loads(path.read_text())
        record = first | {"resumed": [*first.get("resumed", []), record]}
    replace_file(path, (json.dumps(record | {"config_digest": digest}, indent=2) + "\n").encode())


def read_data_config(run_dir: Path) -> dict[str, Any]:
    """How a run's evaluation prepares images, as timm's data config: `input_size`, `mean`, `std`, ..."""
    data: Any = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml").data)
    img_size = data["img_size"]
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    same = {key: data[key] for key in ("mean", "std", "interpolation", "crop_pct")}
    return {"input_size": (data["in_chans"], height, width)} | same


def manifest(seed: int, world_size: int, device: torch.device) -> dict[str, Any]:
    """What is needed to repeat a run, beside its config."""
    return {
        "command": [Path(sys.executable).name, *sys.argv],
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seed": seed,
        "git": _git_state(),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_threads": torch.get_num_threads(),
        "world_size": world_size,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit of the working copy that holds this file, and whether it was changed since; None outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
