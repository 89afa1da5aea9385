"""Downloads with the real huggingface_hub against a hub of our own on this machine, each run in a fresh process."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from safetensors.numpy import save

from edgeq.converters import hub
from edgeq.errors import DiskFullError

REPO = "acme/tiny"
COMMIT = "1" * 40
OLD_COMMIT = "2" * 40


@dataclasses.dataclass
class Request:
    method: str
    path: str
    token: str | None
    range: str | None
    status: int = 0


@dataclasses.dataclass
class Hub:
    """What the server answers; tests change the fields between runs."""

    files: dict[str, bytes]
    url: str = ""
    token: str | None = None
    """Asked of every request: without it the model does not exist, as on the real hub."""
    gated: bool = False
    """Files (not the listing) are refused."""
    down: bool = False
    """Every answer is 503."""
    cut: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    """File to the bytes at which its next connections break."""
    seen: list[Request] = dataclasses.field(default_factory=list)

    def revisions(self) -> dict[str, str]:
        return {"main": COMMIT, COMMIT: COMMIT, "v1": OLD_COMMIT, OLD_COMMIT: OLD_COMMIT}

    def fetched(self, name: str) -> list[Request]:
        return [r for r in self.seen if r.method == "GET" and "/resolve/" in r.path and r.path.endswith("/" + name)]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.request_ = Request(self.command, path, self.headers.get("Authorization"), self.headers.get("Range"))
        self.hub.seen.append(self.request_)
        if self.hub.down:
            self._answer(503, b"out of order")
        elif self.hub.token is not None and self.request_.token != f"Bearer {self.hub.token}":
            self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith(f"/api/models/{REPO}"):
            self._api(path.removeprefix(f"/api/models/{REPO}").strip("/").split("/"))
        elif path.startswith(f"/{REPO}/resolve/"):
            self._file(*path.removeprefix(f"/{REPO}/resolve/").split("/", 1))
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _api(self, parts: list[str]) -> None:
        commit = self.hub.revisions().get(parts[1] if len(parts) > 1 else "main")
        if commit is None:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif parts[0] == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.hub.files.items()
            ]
            self._answer(200, json.dumps(tree).encode())
        else:
            siblings = [{"rfilename": name} for name in self.hub.files]
            info = {"_id": "0", "id": REPO, "modelId": REPO, "sha": commit, "siblings": siblings, "private": False}
            self._answer(200, json.dumps(info).encode())

    def _file(self, revision: str, name: str) -> None:
        commit, data = self.hub.revisions().get(revision), self.hub.files.get(name)
        if self.hub.gated:
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif commit is None or data is None:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound" if commit is None else "EntryNotFound"})
        else:
            self._send(name, data, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    def _send(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        start = int(self.request_.range.removeprefix("bytes=").split("-")[0]) if self.request_.range else 0
        headers |= {"Accept-Ranges": "bytes"}
        if self.request_.range:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cuts = self.hub.cut.get(name) if self.command == "GET" else None
        sent = max(0, cuts.pop(0) - start) if cuts else None
        self._answer(206 if self.request_.range else 200, data[start:], headers, sent)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, sent: int | None = None) -> None:
        self.request_.status = status
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if sent is None else body[:sent])
        self.close_connection = True


@contextmanager
def running_hub(files: dict[str, bytes]) -> Iterator[Hub]:
    """A hub with one model on a free port of this machine."""
    hub = Hub(dict(files))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"]}).encode()
FILES = {
    "config.json": CONFIG,
    "model.safetensors": save({"w": np.ones((100, 100), np.float16)}),
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"chat_template": ""}',
    "README.md": b"---\nlicense: mit\n---\n",
    "pytorch_model.bin": b"\x80\x02never to be fetched",
    "onnx/model.onnx": b"never to be fetched",
    "onnx/config.json": b"{}",
    "consolidated.safetensors": b"never to be fetched",
}
PROGRAM = """
import json, logging, sys
from pathlib import Path
from edgeq.converters.source import resolve, weights_sha256
from edgeq.errors import EdgeqError
from edgeq.types import to_json
logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
options, steps = json.loads(sys.argv[1]), []
if options.pop("quiet", False):
    report = None
else:
    report = lambda *step: steps.append(step)
try:
    source = resolve(progress=report, **options)
except EdgeqError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
else:
    print(json.dumps({"source": json.loads(to_json(source)), "sha256": weights_sha256(source), "steps": steps}))
"""


@dataclasses.dataclass
class Client:
    """Runs `resolve` in a child process with a cache of its own."""

    hub: Hub
    home: Path
    warnings: str = ""

    def resolve(self, ref: str = REPO, *, env: dict[str, str] | None = None, **options: object) -> dict[str, Any]:
        base = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        settings = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "NO_PROXY": "127.0.0.1", **(env or {})}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps({"ref": ref, **options})],
            env={**base, **settings},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.warnings = done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def fails(self, ref: str = REPO, *, env: dict[str, str] | None = None, **options: object) -> str:
        answer = self.resolve(ref, env=env, **options)
        assert answer.get("error") in {"SourceError", "UnsupportedModelError"}, answer
        assert "\n" not in answer["text"]
        return str(answer["text"])


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with running_hub(FILES) as hub:
        yield Client(hub, tmp_path / "home")


def test_download_and_second_run_offline(client: Client) -> None:
    first = client.resolve()
    source = first["source"]
    folder = Path(source["path"])
    assert (source["id"], source["revision"], source["license"]) == (REPO, COMMIT, "mit")
    assert folder.is_relative_to(client.home), "HF_HOME is honoured"
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    ), "pickles, other frameworks' weights and folders are not fetched"
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    done, total, label = first["steps"][-1]
    assert label == REPO
    assert done == total == sum(p.stat().st_size for p in folder.iterdir())
    assert all(request.token is None for request in client.hub.seen)

    client.hub.seen.clear()
    assert client.resolve(env={"HF_HUB_OFFLINE": "1"})["source"] == source
    assert client.hub.seen == [], "HF_HUB_OFFLINE is honoured"

    assert client.resolve()["source"] == source
    assert client.hub.fetched("model.safetensors") == [], "what is cached is not fetched again"

    client.hub.down = True
    assert client.resolve()["source"] == source
    assert "cannot be reached; using acme/tiny from the cache" in client.warnings


def test_revision(client: Client) -> None:
    assert client.resolve(revision="v1")["source"]["revision"] == OLD_COMMIT
    assert client.resolve(revision=COMMIT)["source"]["revision"] == COMMIT
    assert "no revision 'v9'" in client.fails(revision="v9")


def test_broken_connection_is_resumed(client: Client) -> None:
    weights = save({"w": np.arange(6_000_000, dtype=np.float32)})
    client.hub.files["model.safetensors"] = weights
    client.hub.cut["model.safetensors"] = [15_000_000]  # the client writes by 10 MB
    answer = client.resolve()
    assert (Path(answer["source"]["path"]) / "model.safetensors").read_bytes() == weights
    first, second = [request.range for request in client.hub.fetched("model.safetensors")]
    assert first is None
    assert second is not None
    assert int(second.removeprefix("bytes=").rstrip("-")) > 0
    assert answer["steps"][-1][0] == answer["steps"][-1][1]


def test_failed_download_is_not_taken_offline_and_finished_later(client: Client) -> None:
    client.hub.cut["model.safetensors"] = [1000] * 100
    assert "files that are complete are kept" in client.fails()
    client.hub.cut.clear()
    assert "Unset HF_HUB_OFFLINE" in client.fails(env={"HF_HUB_OFFLINE": "1"})
    client.hub.seen.clear()
    assert client.resolve()["source"]["revision"] == COMMIT
    assert client.hub.fetched("model.safetensors")
    assert client.hub.fetched("tokenizer.json") == []


def test_full_disk_is_named() -> None:
    """Not provoked: without root there is no way to fill the cache's disk and nothing else."""
    error = hub._explained(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), hub._Request(REPO, None, None, None))
    assert isinstance(error, DiskFullError)
    assert "HF_HOME" in error.remedy


def test_token(client: Client) -> None:
    client.hub.token = "secret"
    text = client.fails()
    assert "not found on the hub, or is private" in text
    assert "HF_TOKEN" in text
    assert client.resolve(token="secret")["source"]["revision"] == COMMIT
    assert client.resolve(env={"HF_TOKEN": "secret"})["source"]["revision"] == COMMIT
    assert client.hub.seen[-1].token == "Bearer secret"


def test_gated(client: Client) -> None:
    client.hub.gated = True
    text = client.fails()
    assert "is gated" in text
    assert "Accept its licence" in text


def test_unknown_model(client: Client) -> None:
    assert "acme/other was not found" in client.fails(ref="acme/other")


def test_offline_and_not_cached(client: Client) -> None:
    text = client.fails(env={"HF_HUB_OFFLINE": "1"})
    assert "Unset HF_HUB_OFFLINE" in text
    assert client.hub.seen == []


def test_hub_out_of_reach(client: Client) -> None:
    assert "cannot be reached" in client.fails(env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    client.hub.down = True
    assert "cannot be reached" in client.fails()


@pytest.mark.parametrize(
    ("names", "cause"),
    [
        (["config.json", "pytorch_model.bin"], "pickles only"),
        (["README.md", "model-q4_k_m.gguf"], "holds GGUF files"),
        (["model.safetensors"], "no config.json"),
        (["README.md"], "holds no weights"),
    ],
)
def test_models_of_the_wrong_kind_are_not_fetched(client: Client, names: list[str], cause: str) -> None:
    client.hub.files = {name: FILES.get(name, b"?") for name in names}
    assert cause in client.fails()
    assert not any("/resolve/" in request.path for request in client.hub.seen)


def test_without_progress_nothing_is_drawn(client: Client) -> None:
    assert client.resolve(quiet=True)["source"]["revision"] == COMMIT
    assert client.warnings == ""


def test_a_model_that_was_found_is_not_asked_for_again(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within `hub.looked_up_once`, and only there."""
    found: list[hub.Download] = []

    def snapshot(request: Any, progress: Any, **options: Any) -> hub.Download:
        found.append(hub.Download(client.home, f"commit {len(found)}"))
        return found[-1]

    monkeypatch.setattr(hub, "_look_up", lambda request: None)
    monkeypatch.setattr(hub, "_snapshot", snapshot)
    client.home.mkdir()
    with hub.looked_up_once():
        assert hub.download(REPO) is hub.download(REPO)
        assert hub.download(REPO, revision="v1") is not hub.download(REPO)
        assert len(found) == 2
        client.home.rmdir()
        hub.download(REPO)
        assert len(found) == 3, "a snapshot that is gone is fetched again"
    client.home.mkdir()
    hub.download(REPO)
    hub.download(REPO)
    assert len(found) == 5


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "ViTModel"])
@pytest.mark.parametrize("command", ["plan", "convert"])
def test_a_command_asks_the_hub_once(client: Client, architecture: str, command: str) -> None:
    """What kind of model it is is one question, what to make of it the next; the files do for both."""
    client.hub.files["config.json"] = json.dumps({"architectures": [architecture], "image_size": 8}).encode()
    client.resolve()
    once = [(request.method, request.path) for request in client.hub.seen]
    client.hub.seen.clear()
    output = ["-o", str(client.home / "out")] if command == "convert" else []
    base = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    settings = {"HF_ENDPOINT": client.hub.url, "HF_HOME": str(client.home / "cli"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-m", "edgeq.cli", command, REPO, "--target", "laptop-cpu", *output],
        env={**base, **settings},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr  # the files are no model that could be planned for
    assert "hub" not in done.stderr
    assert sorted((request.method, request.path) for request in client.hub.seen) == sorted(once)
