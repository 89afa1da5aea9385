"""The decode-cost table: its rule between entries, its measurement and its cache."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.disk_cache import DiskCache
from edgeq.errors import UsageError
from edgeq.ggml_types import TYPES, tensor_bytes
from edgeq.llama import Context, Model
from edgeq.profiles.kernels import cost_measure, decode_costs
from edgeq.profiles.kernels.cost_measure import legal_matrices, measure_matrices
from edgeq.profiles.kernels.cost_table import CostEntry, DecodeCosts, decoded_matrices
from edgeq.profiles.kernels.decode_costs import costs_for
from edgeq.types import from_json, to_json

SMALL = 1 << 20


def entry(name: str = "q8_0", columns: int = 576, rows: int = 576, ns: float = 1000.0) -> CostEntry:
    return CostEntry(type=name, columns=columns, rows=rows, ns=ns, spread=0.01, n=3, buffer="CPU")


def table(*entries: CostEntry) -> DecodeCosts:
    return DecodeCosts(measured=True, machine="cpu", arch="x86_64", threads=1, llama_cpp="1", entries=entries)


entries_of_one_type = st.lists(
    st.builds(
        entry,
        columns=st.integers(1, 64).map(lambda n: 32 * n),
        rows=st.integers(1, 10**6),
        ns=st.floats(1.0, 1e9),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda e: (e.columns, e.rows),
)


@given(entries_of_one_type)
def test_measured_shapes_are_given_back(entries: list[CostEntry]) -> None:
    costs = table(*entries)
    for e in entries:
        assert costs.has("q8_0", (e.columns, e.rows))
        assert costs.ns("Q8_0", (e.columns, e.rows)) == pytest.approx(e.ns)


@given(entries_of_one_type, st.integers(1, 64).map(lambda n: 32 * n), st.integers(1, 10**7))
def test_other_shapes_lie_between_the_nearest_columns_entries(
    entries: list[CostEntry], columns: int, rows: int
) -> None:
    a_weight = table(*entries).ns("q8_0", (columns, rows)) / (columns * rows)
    distance = min(abs(math.log(e.columns / columns)) for e in entries)
    near = [e for e in entries if abs(math.log(e.columns / columns)) <= distance + 1e-12]
    assert min(e.ns_per_weight for e in near) * 0.999999 <= a_weight <= max(e.ns_per_weight for e in near) * 1.000001


@given(entries_of_one_type, st.integers(1, 64).map(lambda n: 32 * n), st.integers(1, 10**6))
def test_the_order_of_entries_means_nothing(entries: list[CostEntry], columns: int, rows: int) -> None:
    shape = (columns, rows)
    assert table(*entries).ns("q8_0", shape) == table(*reversed(entries)).ns("q8_0", shape)


def test_rows_between_two_entries_are_interpolated_and_beyond_them_the_nearest_counts() -> None:
    costs = table(entry(rows=100, ns=576 * 100 * 2.0), entry(rows=10_000, ns=576 * 10_000 * 1.0))
    assert costs.ns("q8_0", (576, 1000)) == pytest.approx(576 * 1000 * 1.5)
    assert costs.ns("q8_0", (576, 10)) == pytest.approx(576 * 10 * 2.0)
    assert costs.ns("q8_0", (576, 10**6)) == pytest.approx(576 * 10**6)
    assert costs.ns("q8_0", (1152, 1000)) == pytest.approx(1152 * 1000 * 1.5)


def test_the_nearest_columns_are_a_ratio_and_the_longer_of_two_as_near() -> None:
    costs = table(entry(columns=256, ns=256 * 576.0), entry(columns=1024, ns=1024 * 576 * 3.0))
    assert costs.ns("q8_0", (512, 576)) == pytest.approx(512 * 576 * 3.0)
    assert costs.ns("q8_0", (480, 576)) == pytest.approx(480 * 576)


def test_what_has_no_cost_is_refused() -> None:
    costs = table(entry())
    with pytest.raises(UsageError, match="was not measured"):
        costs.ns("q4_0", (576, 576))
    with pytest.raises(UsageError, match="multiple of 256"):
        costs.ns("q6_k", (576, 576))
    with pytest.raises(UsageError, match="not a tensor type"):
        costs.ns("q9", (576, 576))


@given(entries_of_one_type)
def test_json_round_trip(entries: list[CostEntry]) -> None:
    assert from_json(to_json(table(*entries)), DecodeCosts) == table(*entries)


@pytest.mark.parametrize(
    "change",
    [
        {"ns": 0.0},
        {"ns": -1.0},
        {"ns": math.inf},
        {"rows": 0},
        {"n": 0},
        {"colour": "red"},
    ],
)
def test_damaged_tables_are_refused(change: dict[str, object]) -> None:
    plain = msgspec.to_builtins(table(entry()))
    plain["entries"] = [plain["entries"][0] | change]
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(plain, DecodeCosts)


def test_two_entries_for_one_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match="two entries"):
        table(entry(ns=1), entry(ns=2))


def test_decoded_matrices_of_tied_and_untied_models() -> None:
    shapes = {"token_embd.weight": (64, 1000), "blk.0.ffn_up.weight": (64, 128), "blk.1.ffn_up.weight": (64, 128)}
    shapes |= {"output_norm.weight": (64,), "blk.0.ffn_up_exps.weight": (64, 128, 4)}  # type: ignore[dict-item]
    types = dict.fromkeys(shapes, "q8_0")
    tied = decoded_matrices(types, shapes)
    assert tied == {("q8_0", (64, 1000)): 1, ("q8_0", (64, 128)): 6}
    shapes["output.weight"] = (64, 1000)
    untied = decoded_matrices(types | {"output.weight": "f16"}, shapes)
    assert untied == {("f16", (64, 1000)): 1, ("q8_0", (64, 128)): 6}


def test_token_time_is_the_sum() -> None:
    costs = table(entry(ns=10), entry("q4_0", ns=7))
    assert costs.token_ns({("q8_0", (576, 576)): 2, ("q4_0", (576, 576)): 3}) == pytest.approx(41)


def test_every_legal_matrix_once() -> None:
    assert legal_matrices([(576, 8), (512, 8), (576, 8)], ["Q4_0", "q4_k", "q4_0"]) == [
        ("q4_0", (576, 8)),
        ("q4_0", (512, 8)),
        ("q4_k", (512, 8)),
    ]


def test_measuring_gives_every_type_a_time() -> None:
    told: list[tuple[int, int, str]] = []
    shapes = [(256, 64), (512, 4096)]
    costs = measure_matrices(
        legal_matrices(shapes, list(TYPES)),
        threads=1,
        working_set_bytes=SMALL,
        budget_s=0.1,
        progress=lambda *report: told.append(report),
    )
    assert {(e.type, e.columns, e.rows) for e in costs.entries} == {
        (name, *shape) for name, shape in itertools.product(TYPES, shapes)
    }
    assert all(e.ns > 0 and e.spread >= 0 and e.n >= 3 and e.buffer for e in costs.entries)
    assert costs.measured
    assert costs.threads == 1
    assert costs.machine
    assert costs.busy_cpus is not None
    assert from_json(to_json(costs), DecodeCosts) == costs
    # Thirty-two times the weights at half the bytes each: whatever the machine does, that takes longer.
    assert costs.ns("q8_0", (512, 4096)) > costs.ns("q8_0", (256, 64))
    dones = [done for done, _, _ in told]
    assert dones == sorted(dones)
    assert told[-1][:2] == (44, 44)


def test_a_matrix_larger_than_its_share_is_cut_and_scaled() -> None:
    sized = cost_measure._size(TYPES["q4_0"], (576, 49152), 4 * SMALL)
    assert (sized.copies, sized.rows % 64) == (1, 0)
    assert 0.9 * 4 * SMALL < sized.total_bytes <= 4 * SMALL
    small = cost_measure._size(TYPES["q4_0"], (576, 192), 4 * SMALL)
    assert small.rows == 192
    assert 4 * SMALL <= small.total_bytes < 4 * SMALL + tensor_bytes("q4_0", (576, 192))
    assert cost_measure._size(TYPES["f32"], (10**6, 8), SMALL).rows == 8


def test_types_take_turns_in_groups_that_fit() -> None:
    shapes = {name: [(576, 1536)] for name in ("q4_0", "q8_0", "f16")}
    assert cost_measure._groups(shapes, 4 * SMALL, 100 * SMALL) == [["q4_0", "q8_0", "f16"]]
    assert cost_measure._groups(shapes, 4 * SMALL, 10 * SMALL) == [["q4_0", "q8_0"], ["f16"]]
    assert cost_measure._groups(shapes, 4 * SMALL, 1) == [["q4_0"], ["q8_0"], ["f16"]]


@given(st.lists(st.floats(1.0, 1e9), min_size=1, max_size=20))
def test_undisturbed_time_is_a_lower_quartile(times: list[float]) -> None:
    low, spread = cost_measure.undisturbed(times)
    assert min(times) * (1 - 1e-12) <= low <= statistics.median(times) * (1 + 1e-12)
    assert spread >= 0


def test_disturbed_times_do_not_count() -> None:
    assert cost_measure.undisturbed([10, 10, 10, 500, 900])[0] == 10


def fake_measuring(monkeypatch: pytest.MonkeyPatch, *, busy: float = 0.0) -> list[list[tuple[str, tuple[int, int]]]]:
    """Replace the measurement by one that counts its calls: a time of (calls so far)."""
    calls: list[list[tuple[str, tuple[int, int]]]] = []

    def fake(matrices: list[tuple[str, tuple[int, int]]], **_: object) -> DecodeCosts:
        calls.append(list(matrices))
        made = table(*(entry(name, *shape, ns=float(len(calls))) for name, shape in matrices))
        return msgspec.structs.replace(made, busy_cpus=busy)

    monkeypatch.setattr(decode_costs, "measure_matrices", fake)
    monkeypatch.setattr(decode_costs, "other_busy_cpus", lambda _seconds: 0.0)
    return calls


def test_the_cache_is_extended_by_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = fake_measuring(monkeypatch)
    cache = DiskCache(tmp_path)
    first = costs_for([(576, 8)], ["q4_0"], threads=1, cache=cache)
    assert costs_for([(576, 8)], ["q4_0", "q4_k"], threads=1, cache=cache) == first
    more = costs_for([(576, 8), (512, 8)], ["q4_0", "q8_0"], threads=1, cache=cache)
    assert calls == [[("q4_0", (576, 8))], [("q4_0", (512, 8)), ("q8_0", (576, 8)), ("q8_0", (512, 8))]]
    assert more.entries[0] == first.entries[0]
    assert len(more.entries) == 4


def test_tables_of_other_threads_and_working_sets_are_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = fake_measuring(monkeypatch)
    cache = DiskCache(tmp_path)
    for threads, working_set in ((1, 9 * SMALL), (2, 9 * SMALL), (1, SMALL), (1, 10 * SMALL)):
        costs_for([(576, 8)], ["q4_0"], threads=threads, working_set_bytes=working_set, cache=cache)
    assert len(calls) == 3  # 9 MiB and 10 MiB are both rounded up to 16 MiB


def test_a_corrupted_cache_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = fake_measuring(monkeypatch)
    cache = DiskCache(tmp_path)
    costs_for([(576, 8)], ["q4_0"], threads=1, cache=cache)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-1], b"", whole[:40] + b"\x00" + whole[41:]):
        file.write_bytes(damaged)
        costs_for([(576, 8)], ["q4_0"], threads=1, cache=cache)
    assert len(calls) == 4
    costs_for([(576, 8)], ["q4_0"], threads=1, cache=cache)
    assert len(calls) == 4


def test_a_table_of_a_busy_machine_is_replaced_once_it_is_quiet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = fake_measuring(monkeypatch, busy=1.5)
    cache = DiskCache(tmp_path)
    costs_for([(576, 8)], ["q4_0"], threads=1, cache=cache)
    monkeypatch.setattr(decode_costs, "other_busy_cpus", lambda _seconds: 1.0)
    assert costs_for([(576, 8)], ["q4_0"], threads=1, cache=cache).entries[0].ns == 1.0
    monkeypatch.setattr(decode_costs, "other_busy_cpus", lambda _seconds: 0.1)
    assert costs_for([(576, 8)], ["q4_0"], threads=1, cache=cache).entries[0].ns == 2.0
    assert len(calls) == 2


def test_the_default_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = fake_measuring(monkeypatch)
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path))
    costs_for([(576, 8)], ["q4_0"], threads=1)
    costs_for([(576, 8)], ["q4_0"], threads=1)
    assert len(calls) == 1
    assert len(list((tmp_path / "costs").iterdir())) == 1


def test_the_real_measurement_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decode_costs, "other_busy_cpus", lambda _seconds: 9.0)
    cache = DiskCache(tmp_path)
    arguments = ([(256, 64)], ["q4_0", "q8_0"])
    first = costs_for(*arguments, threads=1, working_set_bytes=SMALL, budget_s=0.1, cache=cache)
    assert costs_for(*arguments, threads=1, working_set_bytes=SMALL, budget_s=0.1, cache=cache) == first


def test_decoding_is_timed_token_by_token(smollm2_gguf: Path) -> None:
    with Model.load(smollm2_gguf) as model, Context(model, context_tokens=8, batch_tokens=32, threads=1) as context:
        times = cost_measure.decode_times(context, 3)
        assert len(times) == 3
        assert min(times) > 0
