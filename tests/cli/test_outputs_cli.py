from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeq.bundle import MANIFEST

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]

_NASTY = "x\x1b[2J\nok: all fine\r\x9b1m\u202e\u2028\x7f"
_VALUES: list[Any] = [
    _NASTY, "", -1, 0, 2**31, 2**63 - 1, 2**64, 10**400, -1.5, 0.0, 1e308, None, True, [], {}, [[]], {_NASTY: _NASTY}
]  # fmt: skip


@pytest.fixture
def bundle(tmp_path: Path, make_bundle: Callable[[Path], Path]) -> Path:
    (tmp_path / "weights").write_bytes(b"weights" * 1000)
    return make_bundle(tmp_path / "weights")


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of everything in a JSON document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _leaves(item, (*path, key))


def _with(document: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """A copy of the document with one value replaced."""
    copy = json.loads(json.dumps(document))
    where = copy
    for key in path[:-1]:
        where = where[key]
    where[path[-1]] = value
    return copy


def _full(bundle: Path) -> Any:
    """The bundle's manifest with an entry in every list that may be empty."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["plan"].update(
        tensor_types={"blk.0.attn_q.weight": "f16"},
        fallbacks=[{"tensor": "blk.0.attn_q.weight", "wanted": "q4_k", "got": "f16", "reason": "rows"}],
        rejected=[{"option": "f32", "reason": "too large"}],
        notes=["a note"],
        preset="q4_k_m",
    )
    manifest["plan"]["search"] = {
        "estimator": "fisher",
        "objective": "kld",
        "predicted_kld": 0.025,
        "gap": 0.0001,
        "compensated": True,
        "calibration": {
            "source": "file",
            "name": "letters.txt",
            "tokens": 10240,
            "chunks": 40,
            "seed": None,
            "text_sha256": "0" * 64,
            "importance": "fisher",
        },
        "costs": "kernels timed here",
        "trials": [
            {"label": "optimum", "file_bytes": 100, "predicted_kld": 0.025, "measured_kld": 0.026, "chosen": True}
        ],
        "selection": "prose",
        "selection_tokens": 3072,
    }
    manifest["tools"] = {"edgeq": "1"}
    manifest["source"].update(revision="main", license="mit")
    manifest["budget"] = {"peak_memory_bytes": 1, "itl_ms": 1.0}
    manifest["smoke"] = {"tokens": 1, "mean_kld": 0.0, "max_kld": 0.0, "top1_agreement": 1.0, "text_sha256": "0" * 64}
    interval = {"low": 0.04, "high": 0.06}
    manifest["quality"] = {
        "tokens": 5120,
        "chunks": 20,
        "chunk_tokens": 256,
        "mean_kld": 0.05,
        "mean_kld_interval": interval,
        "p99_kld": 0.5,
        "p999_kld": 1.0,
        "max_kld": 3.0,
        "top1": 0.9,
        "top1_interval": {"low": 0.88, "high": 0.92},
        "ppl_ratio": 1.02,
        "ppl_ratio_interval": {"low": None, "high": None},
        "noise_floor_kld": 1e-6,
        "confidence": 0.95,
        "reference": "f16",
        "text": "prose",
        "text_sha256": "0" * 64,
        "overlap": 0.001,
        "kv_type": "q8_0",
    }
    return manifest


def test_inspect_shows_the_quality(bundle: Path, cli: RunCli) -> None:
    assert "against the f16 reference" not in cli("inspect", bundle).stdout
    manifest = _full(bundle)
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    shown = cli("inspect", bundle).stdout
    read = "5120 tokens in 20 chunks of prose, 0.10% of it calibrated on, with a KV cache in q8_0"
    assert f"quality  against the f16 reference over {read}" in shown
    assert "mean KL 0.0500 (0.0400 to 0.0600), 99 % 0.500, 99.9 % 1.000, max 3.00, noise floor 1.0e-06 nats" in shown
    assert "same top token 90.0% (88.0% to 92.0%), perplexity ratio 1.0200; intervals at 95%" in shown
    assert json.loads(cli("inspect", bundle, "--json").stdout)["quality"] == manifest["quality"]


def test_no_value_of_a_manifest_disturbs_inspect(bundle: Path, cli: RunCli) -> None:
    """Whatever one value is, inspect shows the bundle or says in one line what is wrong with it."""
    manifest = _full(bundle)
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    n_lines = {flag: len(cli("inspect", bundle, *flag).stdout.splitlines()) for flag in ((), ("--tensors",))}
    outcomes = {0: 0, 1: 0}
    for path in _leaves(manifest):
        for value in _VALUES if path else ():
            (bundle / MANIFEST).write_text(json.dumps(_with(manifest, path, value)))
            flag = ("--tensors",) if path[:2] == ("plan", "tensor_types") else ()
            done = cli("inspect", bundle, *flag)
            outcomes[done.returncode] += 1
            if done.returncode == 1:
                assert len(done.stderr.splitlines()) == 1, (path, value, done.stderr)
            else:
                assert all(line.isprintable() for line in done.stdout.split("\n")), (path, value, done.stdout)
                assert not any(line.startswith("ok: all fine") for line in done.stdout.splitlines())
                if value == _NASTY:
                    assert len(done.stdout.splitlines()) == n_lines[flag], (path, done.stdout)
    assert min(outcomes.values()) > 100


def test_what_a_manifest_says_cannot_pose_as_edgeq(bundle: Path, cli: RunCli) -> None:
    manifest = _full(bundle)
    manifest["name"] = "m\nok: all fine\x1b[8m"
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    shown = cli("inspect", bundle).stdout
    assert shown.splitlines()[0].startswith(r"bundle   m\nok: all fine\x1b[8m (llm)")
    assert json.loads(cli("inspect", bundle, "--json").stdout)["name"] == manifest["name"]
