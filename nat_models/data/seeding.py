"""Randomness of training as a function of (seed, epoch, sample), so that a run can go on in the middle of an epoch.

Neither the number of worker processes nor what they did before changes a sample; nothing needs to be stored.
"""

import os
import random
from collections.abc import Iterator, Sized
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, get_worker_info

ORDER, SAMPLE, BATCH = range(3)  # what is drawn: the first number of a key


def run_seed() -> int:
    """The seed that `lightning.seed_everything` was called with; 0 if it was not."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def seed_generators(*key: int) -> None:
    """Seeds the global generators of Python, NumPy and PyTorch (on all devices in use) with a function of `key`."""
    python, numpy, *words = np.random.SeedSequence(key).generate_state(4).tolist()
    random.seed(python)
    np.random.seed(numpy)
    torch_seed = words[0] << 32 | words[1]
    torch.default_generator.manual_seed(torch_seed)
    if torch.cuda.is_initialized():  # never in a worker process
        torch.cuda.manual_seed_all(torch_seed)


class SeededSamples(Dataset):
    """A map-style dataset, before each of whose samples the generators are seeded.

    Args:
        dataset: the dataset; its augmentation draws from the global generators.
        seed: of the run.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: tuple[int, int] | int) -> Any:
        """The sample of an `(epoch, index)` of `TrainingSampler`; a mere index is taken as of epoch 0."""
        epoch, index = draw if isinstance(draw, tuple) else (0, draw)
        seed_generators(SAMPLE, self.seed, epoch, index)
        return self.dataset[index]


class TrainingSampler(DistributedSampler):
    """Yields `(epoch, index)` of this process's samples, shuffled anew in each epoch, from any batch on.

    Together, the processes' batches are those of a single process with the same effective batch.

    Args:
        dataset: tells the number of samples. The last ones of the order are left out where processes do not divide it.
        batch_size: samples in a batch of this process.
        seed: of the run.
        epoch, start: the first epoch, and the batch that it starts with.
    """

    def __init__(self, dataset: Sized, batch_size: int, seed: int, epoch: int = 0, start: int = 0) -> None:
        distributed = torch.distributed.is_initialized()
        replicas = torch.distributed.get_world_size() if distributed else 1
        rank = torch.distributed.get_rank() if distributed else 0
        super().__init__(dataset, replicas, rank, shuffle=True, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.epoch = epoch
        self.start = start

    def set_epoch(self, epoch: int) -> None:
        """Goes to the beginning of an epoch, unless the sampler is in it already."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        indices = self._order(self.epoch)[self.start * self.batch_size :]
        return iter([(self.epoch, index) for index in indices])

    def batch(self, epoch: int, batch_idx: int) -> list[int]:
        """The indices of one batch of this process."""
        return self._order(epoch)[batch_idx * self.batch_size : (batch_idx + 1) * self.batch_size]

    def _order(self, epoch: int) -> list[int]:
        random_order = np.random.default_rng((ORDER, self.seed, epoch)).permutation(len(self.dataset))  # type: ignore
        return random_order[self.rank : self.total_size : self.num_replicas].tolist()


class SeededStream(IterableDataset):
    """A streamed dataset of timm, before each of whose samples the generators are seeded.

    timm's readers draw the order of samples from the seeds of worker processes, of which there must be one at least;
    the loader draws those from `generator`. So the samples are the same ones again with the same number of workers, if
    each epoch starts its workers anew.

    Args:
        stream: timm's `IterableImageDataset`.
        seed: of the run.
        epoch, start: the first epoch, and the batch that `StreamLoader` starts it with.
    """

    def __init__(self, stream: Any, seed: int, epoch: int = 0, start: int = 0) -> None:
        self.stream = stream
        self.seed = seed
        self.generator = torch.Generator()
        self._go_to(epoch, start)

    def __len__(self) -> int:
        return len(self.stream)

    def set_epoch(self, epoch: int) -> None:
        """Goes to the beginning of an epoch, unless the stream is in it already."""
        if epoch != self.epoch:
            self._go_to(epoch, 0)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        samples = iter(self.stream)
        for position in count():
            seed_generators(SAMPLE, self.seed, self.epoch, self._rank, worker.id if worker else 0, position)
            try:
                sample = next(samples)
            except StopIteration:
                return
            yield sample

    def _go_to(self, epoch: int, start: int) -> None:
        self.epoch, self.start = epoch, start
        self.stream.set_epoch(epoch)
        self._rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self.generator.manual_seed(int(np.random.SeedSequence((ORDER, self.seed, epoch)).generate_state(1)[0]))


class StreamLoader(DataLoader):
    """A loader of a `SeededStream`, which goes on in the middle of an epoch by dropping the batches before."""

    def __iter__(self) -> Any:
        batches = super().__iter__()
        for _ in range(self.dataset.start):  # type: ignore[attr-defined]
            next(batches)
        return batches
