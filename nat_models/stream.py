"""`python -m nat_models.stream MODEL_OR_RUN VIDEO`: the running top-1 class of a video, frame by frame, with latencies.

MODEL is a `nat_stream_*` name in timm's registry, with the weights of `--checkpoint FILE`; RUN a run folder of
`train.py`, or a checkpoint in one. VIDEO is whatever FFmpeg opens: a file, a stream's address, a camera's device.
`--annotate` also writes a copy of it with the running prediction drawn into each frame. A RUN takes frames as far apart
as those of its clips, MODEL 15 a second; `--rate` sets another number.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from nat_models.data.video.annotated_copy import AnnotatedCopy, Frame, copy_paths, read_frames
from nat_models.nat_stream import NATStream
from nat_models.predict import Predictor, add_annotate_option, add_model_options, load

MODEL_RATE = 15.0  # frames a second for a registered model: every second one of most videos, as the recipes train


@dataclass
class Answer:
    """What the model says after a frame.

    Attributes:
        time: of the frame, in seconds from the first one.
        latency: seconds from the decoded frame to the classes, preparing the frame included.
        prediction: the most likely classes with their probabilities.
        is_new: whether the frame gave the model a map; every second one only waits for the next, at next to no cost.
    """

    time: float
    latency: float
    prediction: list[tuple[str, float]]
    is_new: bool


@torch.no_grad()
def classify(
    predictor: Predictor, frames: Iterable[Frame], rate: float | None, compiled: bool
) -> Iterator[tuple[Frame, Answer]]:
    """Every frame with the answer that stands then; frames that come faster than `rate` a second leave it as it was.

    Args:
        predictor: of a `NATStream`.
        frames: from `read_frames`.
        rate: frames a second for the model; None: those of a dense clip of `predictor.views`.
        compiled: compile the steps, on a GPU into CUDA graphs; the first ones then take long.

    Raises:
        ValueError: the model is no streaming model, or `rate` is None and the clips have none.
    """
    model = predictor.model
    if not isinstance(model, NATStream):
        raise ValueError(f"the model must be a streaming one (nat_stream_*), got a {type(model).__name__}")
    assert predictor.views is not None  # as of every model of clips
    sampling = predictor.views.sampling
    if rate is None and sampling.mode != "dense":
        raise ValueError(f"--rate must be given: clips of data.sampling.mode={sampling.mode} have no fixed rate")
    device = next(model.parameters()).device
    in_chans, height, width = predictor.data_config["input_size"]
    step = torch.compile(model.step, dynamic=False, mode="reduce-overhead") if compiled else model.step
    state = model.init_state(1, height, width)
    due = last = 0.0
    for frame in frames:
        time = float(frame.time)
        if time < last:  # another recording begins
            due, state = time, model.init_state(1, height, width)
        last = time
        if time >= due - 1e-3:  # timestamps are rounded to the file's time base
            interval = 1 / rate if rate is not None else sampling.interval(float(frame.rate))
            due = max(due + interval, time)  # after a gap, go on from there
            begin = perf_counter()
            pixels = predictor.transform(frame.image.convert("L" if in_chans == 1 else "RGB")).to(device)
            is_new = state.phase == 0
            logits, state = step(pixels[None, :, None], state)
            state = state.clone() if compiled else state
            prediction = predictor.most_likely(logits[0, -1].float().softmax(-1))
            answer = Answer(time, perf_counter() - begin, prediction, is_new)
        yield frame, answer


def summary(frames: int, latencies: Sequence[float], compiled: bool) -> str:
    """The last line: the latencies, in seconds, of the frames with a new answer, but the first, which warm up.

    Of compiled steps the first compiles, the second is recorded as a CUDA graph, and the third replays it first.
    """
    warm_up = 3 if compiled else 1
    warm = latencies[warm_up:]
    if not warm:
        return f"{frames} frames, too few to tell a latency"
    return (
        f"{frames} frames, every second one with a new answer; latency of {len(warm)} of these, after {warm_up} to "
        f"warm up: median {1e3 * median(warm):.1f} ms, longest {1e3 * max(warm):.1f} ms"
    )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nat_models.stream", description="Classifies a video as it runs.")
    parser.add_argument("model", metavar="MODEL_OR_RUN", help="nat_stream_* name, or run folder of train.py")
    parser.add_argument("video", metavar="VIDEO", help="file, address or device that FFmpeg opens")
    parser.add_argument(
        "--rate", type=float, metavar="FPS",
        help=f"frames a second for the model (default: as the run's clips; {MODEL_RATE:g} for a registered model)",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    add_annotate_option(parser)
    add_model_options(parser)
    options = parser.parse_args(arguments)
    if options.rate is not None and not options.rate > 0:
        parser.error(f"--rate must be positive, got {options.rate}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Prints a line per frame; exits with status 2 and one line for what the user can correct."""
    options = parse_arguments(arguments)
    count, latencies = 0, []  # of the new answers
    printed = None
    try:
        copy = None if options.annotate is None else copy_paths(options.annotate, [options.video])[0]
        predictor = load(options)
        rate = MODEL_RATE if options.rate is None and not Path(options.model).exists() else options.rate
        with ExitStack() as stack:
            writer = None if copy is None else stack.enter_context(AnnotatedCopy(copy))
            for frame, answer in classify(predictor, read_frames(options.video), rate, options.compile):
                if answer is not printed:
                    count += 1
                    latencies += [answer.latency] if answer.is_new else []
                    printed = answer
                    name, probability = answer.prediction[0]
                    latency = f"{1e3 * answer.latency:8.1f} ms"
                    print(f"{answer.time:8.2f} s  {latency}  {100 * probability:5.1f} %  {name}", flush=True)
                if writer is not None:
                    writer.write(frame, answer.prediction)
    except KeyboardInterrupt:
        pass  # how a live stream ends
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if count:
        print(summary(count, latencies, options.compile))
        if copy is not None:
            print(f"annotated copy in {copy}")


if __name__ == "__main__":
    main()
