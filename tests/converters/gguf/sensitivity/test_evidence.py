"""What is measured about a model, how it is kept, and what of a user's is refused before any work is done."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.converters.gguf.export import export_gguf
from edgeq.converters.gguf.header import GgufHeader, read_header
from edgeq.converters.gguf.imatrix import Activations, ImportanceMatrix, write_imatrix
from edgeq.converters.gguf.sensitivity import evidence as module
from edgeq.converters.gguf.sensitivity import inputs
from edgeq.converters.gguf.sensitivity.evidence import Evidence, EvidenceRequest, Workshop, gather
from edgeq.errors import MissingPackageError, UnsupportedModelError, UsageError

EMBEDDING, Q = "token_embd.weight", "blk.0.attn_q.weight"
MATRICES = [EMBEDDING, Q, "blk.0.attn_k.weight", "blk.1.ffn_down.weight", "output.weight"]
KINDS = ("f16", "q4_0", "q8_0")
PLAIN = EvidenceRequest(tokens=300, estimator="imatrix")
FISHER = EvidenceRequest(tokens=300)


class Stages:
    """Tells what was really done: progress by stage, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def __call__(self, stage: str, _done: int, _total: int, detail: str) -> None:
        self.seen.append((stage, detail))

    def take(self) -> list[str]:
        """The stages since the last call, each once."""
        found = list(dict.fromkeys(stage for stage, _ in self.seen))
        self.seen.clear()
        return found


@dataclasses.dataclass
class Bench:
    """One tiny model with a workshop and a cache of its own."""

    folder: Path
    work: Path
    stages: Stages
    threads: int = 1

    @property
    def header(self) -> GgufHeader:
        return read_header(self.folder.with_suffix(".gguf"))

    @property
    def menu(self) -> dict[str, tuple[str, ...]]:
        """Some of its matrices: each of them takes a part of a second."""
        return {name: KINDS for name in self.header.tensors if name in MATRICES}

    def gather(
        self,
        request: EvidenceRequest,
        *,
        hf: bool = True,
        key: str = "w",
        menu: Mapping[str, Sequence[str]] | None = None,
    ) -> Evidence:
        shop = Workshop(self.work, key, self.threads, self.stages)
        return gather(self.header, self.folder if hf else None, menu or self.menu, request, shop)


@pytest.fixture
def bench(tiny_hf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    return Bench(tiny_hf("llama-tied"), tmp_path / "work", Stages())


def _same(a: Evidence, b: Evidence) -> None:
    assert a.errors == b.errors
    assert (a.curvatures.estimator, a.curvatures.tokens, a.curvatures.key) == (
        b.curvatures.estimator,
        b.curvatures.tokens,
        b.curvatures.key,
    )
    assert (a.text.text_sha256, a.importance_source, a.notes) == (b.text.text_sha256, b.importance_source, b.notes)
    for name, one in a.curvatures.by_tensor.items():
        other = b.curvatures.by_tensor[name]
        assert np.array_equal(one.rows, other.rows)
        assert np.array_equal(one.columns, other.columns)
        assert one.activation_kld == other.activation_kld
        assert (one.correlation is None) == (other.correlation is None)
        assert one.correlation is None or np.array_equal(one.correlation, np.asarray(other.correlation))
        assert np.array_equal(a.importance[name], b.importance[name])


def _imatrix(header: GgufHeader, path: Path, *, skip: tuple[str, ...] = (), **lengths: int) -> Path:
    rng = np.random.default_rng(len(skip))
    entries = {
        name: Activations(
            rng.gamma(1.0, size=(1, lengths.get(name.replace(".", "_"), tensor.shape[0]))).astype(np.float32),
            np.array([100]),
        )
        for name, tensor in header.tensors.items()
        if len(tensor.shape) == 2 and name not in skip
    }
    write_imatrix(ImportanceMatrix(entries, 1, 100), path)
    return path


# What is measured


def test_fisher_is_the_default_where_it_can_be(bench: Bench) -> None:
    found = bench.gather(FISHER)
    assert bench.stages.take() == ["write calibration text", "curvature", "price types"]
    assert (found.curvatures.estimator, found.importance_source, found.notes) == ("fisher", "fisher", ())
    assert found.compensated
    assert found.curvatures.tokens == found.text.n_tokens <= 300
    assert found.curvatures.by_tensor.keys() == found.errors.keys() == bench.menu.keys()
    for name, prices in found.errors.items():
        assert tuple(prices) == KINDS
        assert prices["f16"] == 0 < prices["q8_0"] < prices["q4_0"]
        weights = found.importance[name]
        assert weights.dtype == np.float32
        assert weights.min() > 0
        assert weights.mean() == pytest.approx(1.001, rel=1e-4)
    assert list(bench.work.iterdir()) == []


@pytest.mark.parametrize("case", ["llama-tied", "llama-untied"])
def test_without_torch_activations_and_probes_do(case: str, bench: Bench, tiny_hf: Callable[..., Path]) -> None:
    """Untied too, where the embedding is multiplied with nothing and no importance matrix has it."""
    bench.folder = tiny_hf(case)
    found = bench.gather(PLAIN)
    assert bench.stages.take() == ["write calibration text", "collect imatrix", "probe", "price types"]
    assert (found.curvatures.estimator, found.importance_source, found.notes) == ("imatrix", "activations", ())
    assert found.compensated
    assert set(bench.menu) == found.errors.keys()
    uniform = len(set(found.importance[EMBEDDING].tolist())) == 1
    assert uniform == (case == "llama-untied")
    assert all(prices["q4_0"] > prices["q8_0"] > 0 for prices in found.errors.values())


def test_a_text_of_the_users(bench: Bench, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the robot moves its arm to the shelf and waits for the camera " * 60)
    request = EvidenceRequest(tokens=400, estimator="imatrix", calibration=text)
    found = bench.gather(request)
    assert bench.stages.take()[0] == "collect imatrix"
    assert (found.text.source, found.text.name, found.text.n_tokens) == ("file", "text.txt", 400)
    text.write_text("the camera waits for the shelf and the robot moves its arm " * 60)
    assert bench.gather(request).text.text_sha256 != found.text.text_sha256
    assert "collect imatrix" in bench.stages.take()
    with pytest.raises(UsageError, match=r"text\.txt gives \d+ tokens, and 2048 are needed"):
        bench.gather(dataclasses.replace(request, tokens=5000))


# Kept and resumed


@pytest.mark.parametrize("request_", [PLAIN, FISHER], ids=["imatrix", "fisher"])
def test_the_second_time_nothing_is_measured_and_the_numbers_are_the_same(
    request_: EvidenceRequest, bench: Bench
) -> None:
    first = bench.gather(request_)
    bench.stages.take()
    second = bench.gather(request_)
    assert bench.stages.take() == []
    _same(first, second)
    groups = {id(c.correlation) for c in second.curvatures.by_tensor.values() if c.correlation is not None}
    assert len(groups) == 3, "query and key share theirs"
    # More types and fewer tensors are found in the same record.
    more = bench.gather(request_, menu={Q: (*KINDS, "q5_0")})
    assert bench.stages.seen == [("price types", Q)]
    assert {kind: more.errors[Q][kind] for kind in KINDS} == first.errors[Q]
    for other, key in (
        (request_, "other weights"),
        (dataclasses.replace(request_, seed=1), "w"),
        (dataclasses.replace(request_, tokens=290), "w"),
    ):
        bench.stages.take()
        bench.gather(other, key=key)
        assert bench.stages.take()[0] == "write calibration text"


@pytest.mark.parametrize("change", ["rms_norm_eps", "chat_template"])
def test_the_same_weights_in_another_model_are_measured_again(change: str, bench: Bench, tmp_path: Path) -> None:
    """What RoPE, norms, vocabulary and template do is in the file's metadata, not in its weights."""
    bench.gather(PLAIN)
    folder = shutil.copytree(bench.folder, tmp_path / bench.folder.name)
    if change == "rms_norm_eps":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, change: 0.1}))
    else:
        (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    export_gguf(folder, folder.with_suffix(".gguf"), float_type="f16")
    bench.folder = folder
    bench.stages.take()
    bench.gather(PLAIN)
    assert bench.stages.take() == ["write calibration text", "collect imatrix", "probe", "price types"]


def _damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)


@pytest.mark.parametrize("request_", [PLAIN, FISHER], ids=["imatrix", "fisher"])
@pytest.mark.parametrize("how", ["flipped", "cut", "empty"])
def test_every_damaged_entry_is_made_again(how: str, request_: EvidenceRequest, bench: Bench) -> None:
    first = bench.gather(request_)
    files = sorted((bench.work.parent / "cache").rglob("*.*"))
    assert len(files) >= len(bench.menu) + 2
    for file in files:
        if how == "flipped" and file.suffix != ".gguf":
            _damage(file)
        elif how != "flipped":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if how == "cut" else b"")
    bench.stages.take()
    _same(first, bench.gather(request_))
    assert {"write calibration text", "price types"} <= set(bench.stages.take())
    bench.gather(request_)
    assert bench.stages.take() == []


@pytest.mark.parametrize("stage", ["collect imatrix", "probe", "price types"])
def test_an_interrupted_search_keeps_what_was_finished(
    stage: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = 1 if stage == "collect imatrix" else 2  # the first is told several times a second at most

    class Stop(Stages):
        def __call__(self, name: str, done: int, total: int, detail: str) -> None:
            super().__call__(name, done, total, detail)
            if name == stage and len([s for s, _ in self.seen if s == stage]) == times:
                raise KeyboardInterrupt

    done = bench.stages
    bench.stages = Stop()
    with pytest.raises(KeyboardInterrupt):
        bench.gather(PLAIN)
    finished = [detail for name, detail in bench.stages.seen if name == "price types"]
    assert list(bench.work.iterdir()) == []
    bench.stages = done
    resumed = bench.gather(PLAIN)
    order = ["write calibration text", "collect imatrix", "probe", "price types"]
    priced = [detail for name, detail in done.seen if name == "price types"]
    assert done.take() == order[order.index(stage) :]
    assert set(finished).isdisjoint(priced)
    assert sorted(finished + priced) == sorted(bench.menu)
    monkeypatch.setenv("EDGEQ_CACHE", str(bench.work.parent / "another"))
    _same(resumed, bench.gather(PLAIN))


def test_a_cache_that_cannot_be_written_is_no_failure(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bench.gather(PLAIN)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        bench.stages.take()
        assert bench.gather(PLAIN).errors == expected.errors
        assert bench.stages.take() == ["write calibration text", "collect imatrix", "probe", "price types"]


def test_a_quick_look_and_a_search_by_fisher_do_not_disturb_each_other(bench: Bench) -> None:
    plain, fisher = bench.gather(PLAIN), bench.gather(FISHER)
    assert plain.errors != fisher.errors
    bench.stages.take()
    _same(plain, bench.gather(PLAIN))
    _same(fisher, bench.gather(FISHER))
    assert bench.stages.take() == []


# Importance matrices of the user


@pytest.mark.parametrize("base", [PLAIN, FISHER], ids=["imatrix", "fisher"])
def test_an_importance_matrix_is_used_by_its_contents(base: EvidenceRequest, bench: Bench, tmp_path: Path) -> None:
    path = _imatrix(bench.header, tmp_path / "mine.gguf")
    request = dataclasses.replace(base, imatrix=path)
    own = bench.gather(base)
    bench.stages.take()
    found = bench.gather(request)
    # Gradients do not depend on it, probes do; nothing has to be collected.
    assert bench.stages.take() == (["price types"] if base is FISHER else ["probe", "price types"])
    assert (found.importance_source, found.notes) == ("mine.gguf", ())
    assert found.errors[Q]["q4_0"] != own.errors[Q]["q4_0"]
    copy = path.rename(tmp_path / "renamed.gguf")
    again = bench.gather(dataclasses.replace(base, imatrix=copy))
    assert again.errors == found.errors
    write_imatrix(
        ImportanceMatrix(
            {n: Activations(np.full((1, len(w)), 2.0, np.float32), np.array([1])) for n, w in found.importance.items()},
            1,
            1,
        ),
        path,
    )
    other = bench.gather(request)
    assert other.errors[Q]["q4_0"] != found.errors[Q]["q4_0"], "the same name, another matrix"


def test_gaps_of_an_importance_matrix_are_filled_and_named(bench: Bench, tmp_path: Path) -> None:
    """llama-imatrix leaves the output matrix out by default."""
    path = _imatrix(bench.header, tmp_path / "mine.gguf", skip=(EMBEDDING,))
    found = bench.gather(dataclasses.replace(PLAIN, imatrix=path))
    assert bench.stages.take() == ["write calibration text", "collect imatrix", "probe", "price types"]
    assert len(found.notes) == 1
    assert "mine.gguf has no entry for 1 of 4 matrices (token_embd.weight is the first)" in found.notes[0]
    assert np.array_equal(found.importance[EMBEDDING], bench.gather(PLAIN).importance[EMBEDDING])


@pytest.mark.parametrize("base", [PLAIN, FISHER], ids=["imatrix", "fisher"])
@pytest.mark.parametrize("what", ["names", "lengths", "layers"])
def test_an_importance_matrix_of_another_model_is_refused_at_once(
    what: str, base: EvidenceRequest, bench: Bench, tmp_path: Path
) -> None:
    header, path = bench.header, tmp_path / "other.gguf"
    if what == "names":
        moved = {name.replace("blk", "layer"): tensor for name, tensor in header.tensors.items()}
        _imatrix(dataclasses.replace(header, tensors=moved), path)
    elif what == "lengths":
        _imatrix(header, path, blk_1_ffn_down_weight=96)
    else:
        _imatrix(header, path, skip=tuple(name for name in header.tensors if name.startswith("blk.1")))
    with pytest.raises(UsageError, match="importance matrix is of another model") as error:
        bench.gather(dataclasses.replace(base, imatrix=path))
    assert "\n" not in str(error.value)
    assert bench.stages.take() == []


# Which estimator


def test_without_a_folder_the_plan_says_why(bench: Bench) -> None:
    found = bench.gather(FISHER, hf=False)
    assert found.curvatures.estimator == "imatrix"
    assert found.notes == ("estimator imatrix, because the model is no Hugging Face folder, which torch could load",)
    assert bench.gather(PLAIN, hf=False).notes == ()


def test_fisher_on_a_gguf_is_refused_at_once(bench: Bench) -> None:
    with pytest.raises(UsageError, match=r"no Hugging Face folder.*Use --estimator imatrix"):
        bench.gather(dataclasses.replace(FISHER, estimator="fisher"), hf=False)
    assert bench.stages.take() == []


def test_without_torch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    assert bench.gather(FISHER).notes == ("estimator imatrix, because torch is not installed",)
    bench.stages.take()
    with pytest.raises(MissingPackageError, match=r"edgeq\[fisher\]"):
        bench.gather(dataclasses.replace(FISHER, estimator="fisher"))
    assert bench.stages.take() == []


def test_too_little_memory_for_gradients(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fisher_memory_bytes", lambda shapes: 10**9 * sum(map(math.prod, shapes)))
    n_params = sum(math.prod(t.shape) for t in bench.header.tensors.values())
    found = bench.gather(FISHER)
    assert found.curvatures.estimator == "imatrix"
    assert f"need about {n_params * 10**9 / 2**30:.1f} GiB" in found.notes[0]
    with pytest.raises(UsageError, match="backward passes need about"):
        bench.gather(dataclasses.replace(FISHER, estimator="fisher"))


def test_without_memory_for_correlations_the_plan_says_so_and_the_next_run_tries_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as little:
        little.setattr(inputs, "correlation_bytes", lambda _lengths: 1 << 62)
        without = bench.gather(PLAIN)
    assert not without.compensated
    assert "rounding errors of 3 of 3 matrices" in without.notes[0]
    bench.stages.take()
    found = bench.gather(PLAIN)
    assert "collect imatrix" in bench.stages.take()
    assert (found.compensated, found.notes) == (True, ())


def test_a_model_that_torch_cannot_take(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise UnsupportedModelError("transformers has other names", "use the other one")

    monkeypatch.setattr(module, "fisher_curvatures", fail)
    assert bench.gather(FISHER).notes == ("estimator imatrix, because transformers has other names",)
    with pytest.raises(UnsupportedModelError, match="other names"):
        bench.gather(dataclasses.replace(FISHER, estimator="fisher"))
    monkeypatch.setattr(module, "fisher_curvatures", lambda *_args, **_kwargs: {})
    assert bench.gather(FISHER).notes == (f"estimator imatrix, because torch has no gradient of {EMBEDDING}",)
