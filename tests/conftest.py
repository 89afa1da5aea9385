"""Shared by all tests: where they keep what they make, and skips by what the machine has."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

pytest_plugins = (
    "tests.fixtures.command",
    "tests.fixtures.language_bundles",
    "tests.fixtures.language_models",
    "tests.fixtures.tensor_bundles",
)

# Machines that run tests are loaded; how long an example takes says nothing about whether it is right.
hypothesis.settings.register_profile("edgeq", deadline=None)
hypothesis.settings.load_profile("edgeq")

# A shell that runs tests in the background ignores Ctrl-C for all that it starts; the tests of interrupts are about it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests, and the commands that they run, keep results in a folder of this session, never in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("EDGEQ_CACHE", str(folder))
        yield folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``small_disk(20)``: a folder on a file system of its own with so many MiB."""
    mounted: list[Path] = []

    def mount(size_mib: int) -> Path:
        folder = tmp_path / f"disk-{size_mib}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@functools.cache
def _missing_cuda() -> str | None:
    return None if Path("/dev/nvidiactl").exists() else "no NVIDIA driver on this machine"


@functools.cache
def _missing_jetson() -> str | None:
    return None if Path("/etc/nv_tegra_release").exists() else "this machine is no Jetson"


@functools.cache
def _missing_network() -> str | None:
    hub = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        with socket.create_connection((hub.hostname or "", hub.port or 443), timeout=3):
            return None
    except OSError as error:
        return f"the model hub {hub.hostname} cannot be reached ({error})"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, and say why."""
    for marker, missing in (("cuda", _missing_cuda), ("jetson", _missing_jetson), ("network", _missing_network)):
        if item.get_closest_marker(marker) is not None and (reason := missing()) is not None:
            pytest.skip(reason)
