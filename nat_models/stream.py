"""`python -m nat_models.stream MODEL_OR_RUN VIDEO`: the running top-1 class of a video, frame by frame, with latencies.

MODEL is a `nat_stream_*` name in timm's registry, with the weights of `--checkpoint FILE`; RUN a run folder of
`train.py`, or a checkpoint in one. VIDEO is whatever FFmpeg opens: a file, a stream's address, a camera's device.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from PIL import Image

from nat_models.data.video.decoding import VideoError, check_decoder
from nat_models.nat_stream import NATStream
from nat_models.predict import Predictor, add_model_options, load


@dataclass
class Answer:
    """What the model says after a frame.

    Attributes:
        time: of the frame, in seconds from the first one.
        latency: seconds from the decoded frame to the class, preparing the frame included.
        class_name: the most likely class.
        probability: its probability.
    """

    time: float
    latency: float
    class_name: str
    probability: float


def read_frames(source: str, rate: float) -> Iterator[tuple[float, Image.Image]]:
    """Decodes frames one after the other, and leaves out those that come faster than `rate` a second.

    Yields:
        Seconds from the first frame, and the picture, upright as the file asks for.

    Raises:
        ValueError: PyAV is missing.
        VideoError: the video cannot be opened or decoded, or holds no frames.
    """
    check_decoder("pyav")
    import av

    due = None
    try:
        with av.open(source) as container:
            stream: Any = container.streams.best("video")
            if stream is None:
                raise VideoError(f"cannot decode {source}: it holds no video")
            begin = None
            frame: Any
            for number, frame in enumerate(container.decode(stream)):
                time = frame.time if frame.time is not None else number / float(stream.guessed_rate or 30)
                begin = time if begin is None else begin
                if due is not None and time - begin < due - 1e-3:  # timestamps are rounded to the file's time base
                    continue
                due = (0.0 if due is None else due) + 1 / rate
                due = max(due, time - begin)  # after a gap, go on from there
                image = frame.to_image()
                yield time - begin, image.rotate(frame.rotation, expand=True) if frame.rotation else image
    except (av.error.FFmpegError, EOFError) as error:
        raise VideoError(f"cannot decode {source}: {error}") from error
    if due is None:
        raise VideoError(f"cannot decode {source}: it holds no frames")


@torch.no_grad()
def classify(predictor: Predictor, frames: Iterator[tuple[float, Image.Image]], compiled: bool) -> Iterator[Answer]:
    """The running answers of a streaming model.

    Args:
        predictor: of a `NATStream`.
        frames: from `read_frames`.
        compiled: compile the steps, on a GPU into CUDA graphs; the first ones then take long.

    Raises:
        ValueError: the model is no streaming model.
    """
    model = predictor.model
    if not isinstance(model, NATStream):
        raise ValueError(f"the model must be a streaming one (nat_stream_*), got a {type(model).__name__}")
    device = next(model.parameters()).device
    in_chans, height, width = predictor.data_config["input_size"]
    step = torch.compile(model.step, dynamic=False, mode="reduce-overhead") if compiled else model.step
    state = model.init_state(1, height, width)
    for time, image in frames:
        begin = perf_counter()
        frame = predictor.transform(image.convert("L" if in_chans == 1 else "RGB")).to(device)
        logits, state = step(frame[None, :, None], state)
        state = state.clone() if compiled else state
        probability, label = logits[0, -1].float().softmax(-1).max(-1)
        answer = Answer(time, 0.0, predictor.class_names[int(label)], float(probability))
        answer.latency = perf_counter() - begin
        yield answer


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nat_models.stream", description="Classifies a video as it runs.")
    parser.add_argument("model", metavar="MODEL_OR_RUN", help="nat_stream_* name, or run folder of train.py")
    parser.add_argument("video", metavar="VIDEO", help="file, address or device that FFmpeg opens")
    parser.add_argument(
        "--rate", type=float, default=15.0, metavar="FPS", help="frames a second for the model (default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    add_model_options(parser)
    options = parser.parse_args(arguments)
    if options.rate <= 0:
        parser.error(f"--rate must be positive, got {options.rate}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Prints a line per frame; exits with status 2 and one line for what the user can correct."""
    options = parse_arguments(arguments)
    latencies = []
    try:
        predictor = load(options)
        for answer in classify(predictor, read_frames(options.video, options.rate), options.compile):
            latencies.append(answer.latency)
            print(
                f"{answer.time:8.2f} s  {1e3 * answer.latency:8.1f} ms  {100 * answer.probability:5.1f} %"
                f"  {answer.class_name}",
                flush=True,
            )
    except KeyboardInterrupt:
        pass  # how a live stream ends
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if latencies:
        print(
            f"{len(latencies)} frames, latency of a frame: median {1e3 * median(latencies):.1f} ms, "
            f"longest {1e3 * max(latencies):.1f} ms"
        )


if __name__ == "__main__":
    main()
