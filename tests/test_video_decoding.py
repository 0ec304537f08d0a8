"""Frames of generated videos, their numbers drawn into the pictures, are the ones shown at the wanted times."""

import io
import json
import sys
from bisect import bisect_right
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from video_files import SIZE, numbers_in, picture, rotate_display, trim, upright, write_video

from nat_models.data.video.annotated_copy import read_frames
from nat_models.data.video.decoding import (
    TorchCodecVideo,
    VideoError,
    check_decoder,
    decoder_version,
    open_video,
    shown_at,
)

FORMATS = [
    ("libx264", "mp4"),
    ("libx264", "mkv"),
    ("libx264", "mov"),
    ("libx264", "ts"),
    ("libx264", "flv"),
    ("libx264", "avi"),  # with B-frames, of which this container does not tell the times
    ("libx265", "mp4"),
    ("libvpx", "webm"),  # VP8 has packets without a frame
    ("libvpx-vp9", "webm"),
    ("libsvtav1", "mp4"),
    ("libsvtav1", "mkv"),
    ("mpeg4", "mp4"),
    ("mpeg4", "avi"),
]
TORCHCODEC_CANNOT = [("libx264", "avi"), ("libvpx", "webm"), ("libx264", "ts")]
RATES = [Fraction(30), Fraction(30000, 1001), Fraction(25), Fraction(12)]


def works(decoder: str) -> bool:
    try:
        check_decoder(decoder)
    except ValueError:
        return False
    return True


torchcodec_works = works("torchcodec")
needs_torchcodec = pytest.mark.skipif(not torchcodec_works, reason="torchcodec, or FFmpeg for it, is not installed")
DECODERS = ["pyav", pytest.param("torchcodec", marks=needs_torchcodec)]
if torch.cuda.is_available():
    DECODERS.append(pytest.param("torchcodec-cuda", marks=[needs_torchcodec, pytest.mark.gpu]))
decoders = pytest.mark.parametrize("decoder", DECODERS)


def middles(indices, rate) -> list[float]:
    """Times in the middle of the frames of a constant rate."""
    return [float((index + 0.5) / rate) for index in indices]


@decoders
@pytest.mark.parametrize(("codec", "extension"), FORMATS)
def test_every_frame_of_every_format(tmp_path, decoder, codec, extension):
    path = write_video(tmp_path / f"video.{extension}", codec=codec)
    if decoder != "pyav" and (codec, extension) in TORCHCODEC_CANNOT:
        with pytest.raises(VideoError, match="data.decoder=pyav reads them"):
            open_video(path, decoder)
        return
    video = open_video(path, decoder)
    assert video.num_frames == 60 and video.duration == pytest.approx(2, abs=0.01)
    assert numbers_in(video.frames_at(middles(range(60), 30))) == list(range(60))
    wanted = [37, 2, 59, 2, 0, 41, 13, 12, 11]  # any order, with repetitions, around the keyframe at 12
    for indices in (wanted, wanted[:1], [58], [30, 31, 32]):
        frames = open_video(path, decoder).frames_at(middles(indices, 30))
        assert frames.dtype == torch.uint8 and frames.shape == (len(indices), 3, SIZE[1], SIZE[0])
        assert numbers_in(frames) == indices


@pytest.mark.parametrize(
    ("name", "codec", "refused"),
    [("a.ts", "h264", True), ("a.avi", "h264", True), ("a.webm", "vp8", True), ("a.mp4", "h264", False),
     ("a.avi", "mpeg4", False), ("a.webm", "vp9", False)],
)  # fmt: skip
def test_what_torchcodec_may_miss_is_refused(tmp_path, monkeypatch, name, codec, refused):
    """With a stand-in for its decoder, so that this is seen where FFmpeg's libraries are missing too."""
    decoders = pytest.importorskip("torchcodec.decoders")
    metadata = SimpleNamespace(codec=codec, num_frames=3, num_frames_from_header=3)
    metadata.begin_stream_seconds, metadata.end_stream_seconds = 0.0, 0.1
    monkeypatch.setattr(decoders, "VideoDecoder", lambda *args, **kwargs: SimpleNamespace(metadata=metadata))
    if not refused:
        assert TorchCodecVideo(tmp_path / name).num_frames == 3
        return
    with pytest.raises(VideoError, match=f"torchcodec may miss frames of {codec} in {Path(name).suffix} files"):
        TorchCodecVideo(tmp_path / name)


@pytest.mark.parametrize(("codec", "extension"), [("libx264", "mp4"), ("libx264", "ts"), ("libx265", "mkv")])
def test_any_subset_of_the_frames(tmp_path, codec, extension):
    path = write_video(tmp_path / f"video.{extension}", 120, codec, keyframe_every=50)
    chance = np.random.default_rng(0)
    for count in (1, 1, 2, 5, 5, 32, 32):  # frames between them that no other needs are skipped
        indices = np.sort(chance.choice(120, count, replace=False)).tolist()
        assert numbers_in(open_video(path).frames_at(middles(indices, 30))) == indices


@pytest.mark.parametrize(("first", "num_frames"), [(0, 30), (12, 30), (40, 20), (17, 9)])
def test_frames_that_an_edit_list_leaves_out_are_not_missing(tmp_path, first, num_frames):
    trim(path := write_video(tmp_path / "video.mp4", options={"sc_threshold": "0"}), first, num_frames)
    video = open_video(path)
    assert video.num_frames == num_frames and video.duration == pytest.approx(num_frames / 30, abs=0.01)
    assert numbers_in(video.frames_at(middles(range(num_frames), 30))) == list(range(first, first + num_frames))
    frames = [torch.from_numpy(np.array(frame.image)).permute(2, 0, 1) for frame in read_frames(str(path))]
    assert numbers_in(torch.stack(frames)) == list(range(first, first + num_frames))


@decoders
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("extension", ["mp4", "mkv"])
def test_every_rate(tmp_path, decoder, rate, extension):
    video = open_video(write_video(tmp_path / f"video.{extension}", 40, rate=rate), decoder)
    assert video.duration == pytest.approx(40 / rate, abs=0.01)
    assert numbers_in(video.frames_at(middles(range(0, 40, 3), rate))) == list(range(0, 40, 3))
    assert numbers_in(video.frames_at([-1.0, 0.0, 40 / float(rate) + 1])) == [0, 0, 39]


@decoders
@pytest.mark.parametrize(("codec", "extension"), [("libx264", "mp4"), ("libx264", "mkv"), ("libvpx-vp9", "webm")])
def test_variable_frame_rate(tmp_path, decoder, codec, extension):
    gaps = [33, 100, 17, 250, 40, 40, 500, 20] * 6
    starts = np.cumsum([0, *gaps[:-1]]).tolist()  # in milliseconds
    path = write_video(
        tmp_path / f"video.{extension}", len(gaps), codec, timestamps=starts, time_base=Fraction(1, 1000)
    )
    video = open_video(path, decoder)
    times = [time + offset for time in range(3, starts[-1], 97) for offset in (0, 0.5)]
    expected = [bisect_right(starts, time) - 1 for time in times]
    assert numbers_in(video.frames_at([time / 1000 for time in times])) == expected


@decoders
def test_first_timestamp_need_not_be_zero(tmp_path, decoder):
    path = write_video(tmp_path / "late.mkv", 20, timestamps=range(100, 120), time_base=Fraction(1, 30))
    assert numbers_in(open_video(path, decoder).frames_at(middles([0, 7], 30))) == [0, 7]


@decoders
@pytest.mark.parametrize("keyframe_every", [1, 250])
def test_keyframes_everywhere_or_once(tmp_path, decoder, keyframe_every):
    video = open_video(write_video(tmp_path / "video.mp4", keyframe_every=keyframe_every), decoder)
    if decoder == "torchcodec-cuda" and keyframe_every == 1:  # torchcodec 0.17 fails on a GPU
        with pytest.raises(VideoError, match="data.decoder=pyav"):
            video.frames_at(middles([50, 3, 20], 30))
        return
    assert numbers_in(video.frames_at(middles([50, 3, 20], 30))) == [50, 3, 20]


@decoders
def test_sound_odd_sizes_single_frames_and_a_missing_duration(tmp_path, decoder):
    with_sound = open_video(write_video(tmp_path / "sound.mp4", audio=True), decoder)
    assert with_sound.num_frames == 60 and numbers_in(with_sound.frames_at([0.55])) == [16]
    odd = open_video(write_video(tmp_path / "odd.mp4", size=(97, 63), pixel_format="yuv444p"), decoder)
    frames = odd.frames_at(middles([8], 30))
    assert frames.shape == (1, 3, 63, 97) and numbers_in(frames) == [8]
    single = open_video(write_video(tmp_path / "single.mp4", 1, first_number=77), decoder)
    assert single.num_frames == 1 and single.duration > 0 and numbers_in(single.frames_at([0, 5])) == [77, 77]
    live = write_video(tmp_path / "live.mkv", container_options={"live": "1"})
    assert numbers_in(open_video(live, decoder).frames_at(middles([59], 30))) == [59]


@decoders
def test_rotation_asked_for_by_the_file(tmp_path, decoder):
    path = write_video(tmp_path / "phone.mp4")
    rotate_display(path)
    frames = open_video(path, decoder).frames_at(middles([5, 44], 30))
    assert frames.shape == (2, 3, SIZE[0], SIZE[1])
    assert numbers_in(upright(frames)) == [5, 44]


def test_pixels_are_the_encoded_ones(tmp_path):
    path = write_video(tmp_path / "video.mp4", 4, options={"crf": "1"})
    frame = open_video(path).frames_at([0.0])[0].permute(1, 2, 0)
    assert np.abs(frame.numpy().astype(int) - picture(0)).max() < 8


@needs_torchcodec
def test_decoders_agree(tmp_path):
    path = write_video(tmp_path / "video.mp4")
    ours, theirs = (open_video(path, decoder).frames_at([0.31, 1.7]).int() for decoder in ("pyav", "torchcodec"))
    assert (ours - theirs).abs().max() <= 3


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    import av

    decoded = []
    video = open_video(write_video(tmp_path / "video.mp4", 120, options={"sc_threshold": "0", "bf": "0"}))
    frames_from = video._frames_from

    def counted(*arguments):
        for pts, frame in frames_from(*arguments):
            decoded.append(frame)
            yield pts, frame

    monkeypatch.setattr(video, "_frames_from", counted)
    assert numbers_in(video.frames_at(middles([62, 64, 115], 30))) == [62, 64, 115]
    assert len(decoded) == 5 + 8  # from the keyframe at 60 to 64, from the one at 108 to 115
    assert all(isinstance(frame, av.VideoFrame) for frame in decoded)


def test_damaged_files_are_named(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", container_options={"movflags": "faststart"})
    content = whole.read_bytes()
    damaged = {
        "empty.mp4": b"",
        "text.mp4": b"not a video\n" * 50,
        "cut.mp4": content[: len(content) * 2 // 3],
        "header_only.mp4": content[: content.index(b"mdat")],
        "index_lost.mp4": write_video(tmp_path / "plain.mp4").read_bytes()[:-200],
    }
    matroska = write_video(tmp_path / "whole.mkv").read_bytes()
    damaged["cut.mkv"] = matroska[: len(matroska) // 2]
    image = io.BytesIO()
    Image.fromarray(picture(1)).save(image, "png")
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VideoError, match=name):
            open_video(tmp_path / name).frames_at([0.0, 1.9])
    zero = write_video(tmp_path / "zero.mp4", 0)
    with pytest.raises(VideoError, match="zero.mp4"):
        open_video(zero)
    with pytest.raises(VideoError, match="missing.mp4: there is no such file"):
        open_video(tmp_path / "missing.mp4")


def test_bits_flipped_within_a_file(tmp_path):
    path = write_video(tmp_path / "video.mp4", keyframe_every=60, options={"crf": "5"})
    content = bytearray(path.read_bytes())
    middle = content.index(b"mdat") + (len(content) - content.index(b"mdat")) // 3
    content[middle : middle + 400] = bytes(400)
    path.write_bytes(content)
    with pytest.raises(VideoError, match="video.mp4"):
        open_video(path).frames_at(middles(range(60), 30))


def test_folders_of_frames(tmp_path):
    for index in range(12):  # natural order: frame_2 before frame_10
        Image.fromarray(picture(index)).save(tmp_path / f"frame_{index}.png")
    video = open_video(tmp_path, frame_rate=4)
    assert (video.num_frames, video.duration) == (12, 3.0)
    assert numbers_in(video.frames_at([0, 0.26, 2.9, 2.5])) == [0, 1, 11, 10]
    (tmp_path / "frame_3.png").write_text("text")
    with pytest.raises(VideoError, match="frame_3.png"):
        video.frames_at([0.8])
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="empty: it holds no images"):
        open_video(tmp_path / "empty")


def test_shards_of_decoded_frames(tmp_path):
    def jpeg(number: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(picture(number)).save(buffer, "jpeg")
        return buffer.getvalue()

    with webdataset.TarWriter(str(tmp_path / "clips-000.tar")) as shard:
        for key, first, timestamps in (("diving/a", 0, None), ("diving/b", 50, [0, 1, 4, 5])):
            sample = {f"{index:06d}.jpg": jpeg(first + index) for index in range(4)}
            if timestamps:
                sample["json"] = json.dumps({"timestamps": timestamps}).encode()
            shard.write({"__key__": key, **sample, "cls": b"1"})
    constant = open_video(f"{tmp_path}/clips-000.tar/diving/a", frame_rate=2)
    assert constant.duration == 2.0 and numbers_in(constant.frames_at([0.6, 1.9])) == [1, 3]
    variable = open_video(f"{tmp_path}/clips-000.tar/diving/b")
    assert numbers_in(variable.frames_at([0, 1.5, 3.99, 4, 9])) == [50, 51, 51, 52, 53]
    with pytest.raises(VideoError, match="clips-000.tar/c: the shard holds no frames"):
        open_video(f"{tmp_path}/clips-000.tar/c")
    with pytest.raises(VideoError, match="missing.tar"):
        open_video(f"{tmp_path}/missing.tar/c")


def test_frame_shown_at_a_time():
    assert shown_at([0.0, 0.5, 2.0], [-1, 0, 0.49, 0.5, 1.99, 2, 9]) == [0, 0, 0, 1, 1, 2, 2]


def test_decoders_are_named():
    assert decoder_version("pyav").startswith("PyAV ")
    with pytest.raises(ValueError, match="data.decoder='decord' is unknown; allowed are pyav, torchcodec"):
        check_decoder("decord")


def test_missing_decoder_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # makes `import av` fail as where it is not installed
    check_decoder.cache_clear()
    with pytest.raises(
        ValueError, match=r"data.decoder='pyav' cannot be used here \(pip install 'nat-models\[video\]'"
    ):
        check_decoder("pyav")
