"""Tiles by measurement: what is timed, kept and read back."""

import json
import re
from pathlib import Path

import pytest

from fused_na.triton.tiles import choose_tiles
from fused_na.window import Axis

autotune = pytest.importorskip("fused_na.triton.autotune", reason="needs Triton")
WORKLOAD = autotune.Workload((Axis(28, 7), Axis(28, 7)), 64, 64, 2)


@pytest.fixture
def cache_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSED_NA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune.torch.cuda, "get_device_name", lambda: "Some GPU")
    autotune._kept.cache_clear()
    return tmp_path / "cache" / f"Some-GPU-triton{autotune.triton.__version__}.json"


def test_the_fastest_choice_is_found_and_kept(cache_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def bench(run, return_mode: str) -> float:
        run()
        return 1.0 if len(ran) == 2 else 2.0  # the second choice is the fastest

    monkeypatch.setattr(autotune.triton.testing, "do_bench", bench)
    tiles = autotune.measured_tiles("forward", WORKLOAD, ran.append)
    assert len(ran) >= 2 and tiles == ran[1] != choose_tiles("forward", WORKLOAD)
    assert len(json.loads(cache_file.read_text())) == 1

    measured = len(ran)
    autotune._kept.cache_clear()  # as a new process would
    assert autotune.measured_tiles("forward", WORKLOAD, ran.append) == tiles and len(ran) == measured
    for other in (dict(has_rpb=True), dict(is_wide=True), dict(shared_memory=101376)):
        autotune.measured_tiles("forward", WORKLOAD._replace(**other), ran.append)
        assert len(ran) > measured, f"{other} is another problem"
        measured = len(ran)


@pytest.mark.parametrize("choice", [[[16, 1, 2], [2, 1, 8], 1, 9, True, None, False], [[16, 1, 2]], None])
def test_a_choice_of_another_version_is_not_taken(
    choice: list | None, cache_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(autotune.triton.testing, "do_bench", lambda run, return_mode: run() or 1.0)
    tiles = autotune.measured_tiles("forward", WORKLOAD, ran.append)
    (key,) = json.loads(cache_file.read_text())
    cache_file.write_text(json.dumps({key: choice}))
    autotune._kept.cache_clear()
    ran.clear()
    assert autotune.measured_tiles("forward", WORKLOAD, ran.append) == tiles and len(ran) >= 2
    assert autotune.Tiles(*json.loads(cache_file.read_text())[key])._replace(query=tiles.query, key=tiles.key) == tiles


def test_what_other_processes_found_meanwhile_is_kept(cache_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune.triton.testing, "do_bench", lambda run, return_mode: 1.0)
    autotune.measured_tiles("forward", WORKLOAD, lambda tiles: None)
    cache_file.write_text(json.dumps({"by another": 1}))
    autotune.measured_tiles("query", WORKLOAD, lambda tiles: None)
    assert len(json.loads(cache_file.read_text())) == 3


@pytest.mark.parametrize("content", [b"", b'{"half', b"[]", b"\xff\xfe"])
def test_a_damaged_file_is_named(content: bytes, cache_file: Path) -> None:
    cache_file.parent.mkdir()
    cache_file.write_bytes(content)
    with pytest.raises(ValueError, match=f"FUSED_NA_CACHE: {re.escape(str(cache_file))} is damaged; remove it"):
        autotune.measured_tiles("forward", WORKLOAD, lambda tiles: None)


@pytest.mark.parametrize(("value", "enabled"), [("1", True), ("0", False), (None, False)])
def test_is_enabled(value: str | None, enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSED_NA_AUTOTUNE", raising=False)
    if value is not None:
        monkeypatch.setenv("FUSED_NA_AUTOTUNE", value)
    assert autotune.is_enabled() is enabled
