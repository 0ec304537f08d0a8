"""Worker processes of the loaders."""

import signal

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def ignore_preemption(worker_id: int) -> None:
    """For `worker_init_fn`: schedulers signal all processes of a job, but it takes the workers to finish the step."""
    for number in PREEMPTION_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
