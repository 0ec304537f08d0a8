"""Downloads, from a local server: what comes whole is used and cached, what does not leaves nothing behind."""

import hashlib
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import timm
import torch
from golden_models import golden, relative_error
from timm.models import set_pretrained_check_hash
from torch import nn


class Server(ThreadingHTTPServer):
    """Serves `files`, name -> (announced length, None for chunks, and body), and counts requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, tuple[int | None, bytes]] = {}
        self.requests: list[str] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # has chunks
    server: Server

    def do_GET(self) -> None:
        name = self.path.removeprefix("/")
        self.server.requests.append(name)
        if name not in self.server.files:
            return self.send_error(404)
        length, body = self.server.files[name]
        self.send_response(200)
        header, value = ("Content-Length", length) if length is not None else ("Transfer-Encoding", "chunked")
        self.send_header(header, str(value))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        """Keeps the test's output clean."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def body() -> bytes:
    buffer = io.BytesIO()
    torch.save(golden("nat")[1], buffer)
    return buffer.getvalue()


@pytest.fixture(params=["cache_dir", "hub"])
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of `create_model` under which downloads go to `tmp_path / "checkpoints"`."""
    if request.param == "cache_dir":
        return {"cache_dir": str(tmp_path / "checkpoints")}
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    return {}


@pytest.fixture
def check_hash() -> Iterator[None]:
    set_pretrained_check_hash(True)
    yield
    set_pretrained_check_hash(False)


def load(url: str, **kwargs: Any) -> nn.Module:
    overlay = dict(url=url, num_classes=10)
    return timm.create_model("nat_mini", pretrained=True, pretrained_cfg_overlay=overlay, **golden("nat")[0], **kwargs)


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.rglob("*") if path.is_file())


def test_a_download_is_used_and_cached(server: Server, body: bytes, cache: dict[str, Any], tmp_path: Path) -> None:
    server.files["nat_mini.pth"] = (len(body), body)
    for _ in range(2):
        model = load(server.url("nat_mini.pth"), **cache).eval()
        with torch.no_grad():
            assert relative_error(model(golden("nat")[2]["input"]), golden("nat")[2]["logits"]) < 1e-4
    assert server.requests == ["nat_mini.pth"] and cached(tmp_path) == ["nat_mini.pth"]


def test_a_truncated_download(server: Server, body: bytes, cache: dict[str, Any], tmp_path: Path) -> None:
    server.files["nat_mini.pth"] = (len(body), body[: len(body) // 2])
    with pytest.raises(ValueError, match=f"cannot load weights from {server.url('nat_mini.pth')}"):
        load(server.url("nat_mini.pth"), **cache)
    assert cached(tmp_path) == []
    server.files["nat_mini.pth"] = (len(body), body)
    assert load(server.url("nat_mini.pth"), **cache).num_classes == 10


def test_a_truncated_download_of_the_older_format(server: Server, cache: dict[str, Any], tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(golden("nat")[1], buffer, _use_new_zipfile_serialization=False)
    server.files["nat_mini.pth"] = (len(buffer.getvalue()), buffer.getvalue()[:600])
    with pytest.raises(ValueError, match=f"cannot load weights from {server.url('nat_mini.pth')}: it is damaged"):
        load(server.url("nat_mini.pth"), **cache)
    assert cached(tmp_path) == []


def test_a_connection_that_breaks(server: Server, body: bytes, cache: dict[str, Any], tmp_path: Path) -> None:
    """Within a chunk, where the reader knows that more was to come."""
    server.files["nat_mini.pth"] = (None, b"%x\r\n" % len(body) + body[: len(body) // 2])
    with pytest.raises(ValueError, match=f"cannot load weights from {server.url('nat_mini.pth')}: IncompleteRead"):
        load(server.url("nat_mini.pth"), **cache)
    assert cached(tmp_path) == []


def test_a_model_that_cannot_be_built_leaves_the_cached_download(
    server: Server, body: bytes, cache: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["nat_mini.pth"] = (len(body), body)
    load(server.url("nat_mini.pth"), **cache)
    monkeypatch.setattr(torch, "empty", Mock(side_effect=RuntimeError("can't allocate memory")))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load(server.url("nat_mini.pth"), **cache)
    assert cached(tmp_path) == ["nat_mini.pth"]


def test_a_missing_file(server: Server, cache: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"cannot load weights from {server.url('nat_mini.pth')}: .*404"):
        load(server.url("nat_mini.pth"), **cache)
    assert cached(tmp_path) == []


def test_no_server(tmp_path: Path) -> None:
    with Server() as server:
        url = server.url("nat_mini.pth")
    with pytest.raises(ValueError, match=f"cannot load weights from {url}: .*refused"):
        load(url, cache_dir=str(tmp_path))
    assert cached(tmp_path) == []


def test_a_wrong_hash(server: Server, body: bytes, cache: dict[str, Any], tmp_path: Path, check_hash: None) -> None:
    server.files["nat_mini-0badc0de.pth"] = (len(body), body)
    with pytest.raises(ValueError, match=f"cannot load weights from {server.url('')}.*invalid hash"):
        load(server.url("nat_mini-0badc0de.pth"), **cache)
    assert cached(tmp_path) == []
    right = f"nat_mini-{hashlib.sha256(body).hexdigest()[:8]}.pth"
    server.files[right] = (len(body), body)
    load(server.url(right), **cache)
    assert cached(tmp_path) == [right]


def test_a_whole_download_of_another_model_stays_cached(server: Server, cache: dict[str, Any], tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(golden("dinat_s")[1], buffer)
    server.files["dinat_s.pth"] = (len(buffer.getvalue()), buffer.getvalue())
    with pytest.raises(ValueError, match=f"the weights of {server.url('dinat_s.pth')} do not fit this NAT"):
        load(server.url("dinat_s.pth"), **cache)
    assert cached(tmp_path) == ["dinat_s.pth"]
