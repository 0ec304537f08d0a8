"""Worker processes of the loaders."""

import os
import signal
import threading

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def ignore_preemption(worker_id: int) -> None:
    """For `worker_init_fn`: schedulers signal all processes of a job, but it takes the workers to finish the step.

    A SIGTERM of the main process still ends a worker: with it, Python ends those that are left when it exits, and then
    waits for them.
    """
    if hasattr(signal, "sigwaitinfo"):  # macOS, which has no such schedulers, lacks it
        signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION_SIGNALS)
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while True:
        received = signal.sigwaitinfo(PREEMPTION_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
            os._exit(0)
