"""Order, lifetimes and arena, against a brute-force reading of the same graph and of the same allocations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.profiles.onnx.memory import (
    ALIASES,
    GraphNode,
    GraphValue,
    execution_order,
    live_peak_bytes,
    played_arena_bytes,
)

Graph = tuple[list[GraphNode], dict[str, GraphValue], tuple[str, ...]]


def value(n_bytes: int, axis: int | str | None = None) -> GraphValue:
    return GraphValue(n_bytes, 4, (n_bytes // 4 if axis is None else axis,))


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """A chain of nodes, each reading one or two earlier values; the last is an output, and perhaps some others."""
    count = draw(st.integers(1, 12))
    nodes: list[GraphNode] = []
    values: dict[str, GraphValue] = {}
    for index in range(count):
        name = f"v{index}"
        earlier = ["input", *values]
        inputs = tuple(draw(st.lists(st.sampled_from(earlier), min_size=1, max_size=2)))
        op_type = draw(st.sampled_from(["Add", "Relu", "Reshape", "MatMul"]))
        first = values.get(inputs[0])
        size = 4 * draw(st.integers(1, 2000))
        if op_type in ("Relu", "Reshape") and first is not None:
            size = first.n_bytes
        scratch = tuple(draw(st.lists(st.integers(1, 4000), max_size=1)))
        late = tuple(draw(st.lists(st.integers(1, 4000), max_size=1)))
        nodes.append(GraphNode(op_type, inputs, (name,), scratch=scratch, late_scratch=late))
        values[name] = value(size)
    outputs = {f"v{count - 1}", *draw(st.lists(st.sampled_from(list(values)), max_size=2))}
    return nodes, values, tuple(sorted(outputs))


def brute_force_peak(graph: Graph) -> int:
    """Follow every value to its owner, and ask at each node which owners anybody still needs."""
    nodes, values, outputs = graph
    reads = [list(node.inputs) for node in nodes]

    def needed(names: set[str], after: int) -> bool:
        return bool(names & set(outputs)) or any(names & set(reads[later]) for later in range(after, len(nodes)))

    groups: list[set[str]] = []  # values that share memory, in the order of their first
    peak = 0
    for index, node in enumerate(nodes):
        source = next((g for g in groups if node.inputs[0] in g), None)
        name = node.outputs[0]
        inplace = node.op_type == "Relu" and source is not None and reads[index].count(node.inputs[0]) == 1
        if inplace and source is not None:
            alone = not needed(source, index + 1) and sum(n in source for n in node.inputs) == 1
            inplace = alone and values[node.inputs[0]] == values[name]
        if source is not None and (node.op_type in ALIASES or inplace):
            source.add(name)
        else:
            groups.append({name})
        size = sum(max(values[n].n_bytes for n in g if n in values) for g in groups)
        peak = max(peak, size + sum(node.scratch) + sum(node.late_scratch))
        groups = [g for g in groups if needed(g, index + 1)]
    return peak


@given(graphs())
def test_live_peak_is_that_of_a_brute_force_interpreter(graph: Graph) -> None:
    assert live_peak_bytes(*graph) == brute_force_peak(graph)


@given(graphs())
def test_the_arena_holds_the_live_peak_and_not_more_than_everything(graph: Graph) -> None:
    nodes, values, outputs = graph
    arena = played_arena_bytes(nodes, values, outputs)
    assert arena >= live_peak_bytes(nodes, values, outputs)
    everything = sum(256 * -(-v.n_bytes // 256) for v in values.values())
    scratch = sum(256 * -(-size // 256) for node in nodes for size in (*node.scratch, *node.late_scratch))
    returned = sum(256 * -(-values[name].n_bytes // 256) for name in outputs)
    assert arena <= 2 * (everything + scratch) + returned


@given(graphs())
def test_the_order_is_one_in_which_the_nodes_can_run(graph: Graph) -> None:
    nodes, values, outputs = graph
    made: set[str] = {"input"}
    order = execution_order(nodes, outputs)
    for node in order:
        assert set(node.inputs) <= made
        made.update(node.outputs)
    wanted, needed = list(outputs), set()
    while wanted:
        name = wanted.pop()
        if name in values and name not in needed:
            needed.add(name)
            wanted.extend(nodes[int(name[1:])].inputs)
    assert made - {"input"} == needed
    assert len(order) == len(needed)


def test_of_two_inputs_the_one_that_is_last_in_the_file_is_made_first() -> None:
    nodes = [
        GraphNode("Relu", ("x",), ("a",)),
        GraphNode("Neg", ("x",), ("b",)),
        GraphNode("Add", ("a", "b"), ("y",)),
    ]
    assert [node.outputs[0] for node in execution_order(nodes, ("y",))] == ["b", "a", "y"]


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [((("n",), ("n",)), 4096), ((("n",), ("m",)), 8192), (((None,), (None,)), 8192), ((None, None), 8192)],
)
def test_in_place_only_where_sizes_are_known_to_be_the_same(
    shapes: tuple[tuple[str | None, ...] | None, ...], expected: int
) -> None:
    nodes = [
        GraphNode("MatMul", ("x", "w"), ("a",)),
        GraphNode("Relu", ("a",), ("b",)),
        GraphNode("Cos", ("b",), ("y",)),
    ]
    values = {"a": GraphValue(4096, 4, shapes[0]), "b": GraphValue(4096, 4, shapes[1]), "y": GraphValue(0, 4, ("n",))}
    assert live_peak_bytes(nodes, values, ("y",)) == expected


def test_chunks_are_split_and_merged() -> None:
    # a (4 KiB) is freed, b (1 KiB) and c (1 KiB) are cut from it; d (4 KiB) needs a region of its own while they live.
    nodes = [
        GraphNode("MatMul", ("x",), ("a",)),
        GraphNode("MatMul", ("a",), ("s",)),
        GraphNode("MatMul", ("s",), ("b",)),
        GraphNode("MatMul", ("s",), ("c",)),
        GraphNode("MatMul", ("b", "c"), ("d",)),
        GraphNode("MatMul", ("d",), ("e",)),
    ]
    sizes = {"a": 4096, "s": 256, "b": 1024, "c": 1024, "d": 4096, "e": 4096}
    values = {name: value(size) for name, size in sizes.items()}
    # a + s, then d; e finds the four kilobytes of a in one piece again.
    assert played_arena_bytes(nodes, values, ()) == 4096 + 256 + 4096


def test_what_a_call_returned_lies_in_the_way_of_the_next() -> None:
    nodes = [GraphNode("MatMul", ("x",), ("y",))]
    values = {"y": value(4096)}
    assert live_peak_bytes(nodes, values, ("y",)) == 4096
    assert played_arena_bytes(nodes, values, ("y",)) == 2 * 4096


def test_a_buffer_that_is_taken_after_the_output_does_not_find_its_old_place_free() -> None:
    values = {"y": value(4096)}
    late = [GraphNode("LSTM", ("x",), ("y",), late_scratch=(16384,))]
    # The second call cuts its output from what the buffer of the first one left, and the buffer is too large for it.
    assert played_arena_bytes(late, values, ("y",)) == 4096 + 16384 + 16384
    early = [GraphNode("Where", ("x",), ("y",), scratch=(16384,))]
    assert played_arena_bytes(early, values, ("y",)) == 4096 + 16384 + 4096


def test_a_convolution_adds_in_the_place_of_what_it_adds() -> None:
    nodes = [GraphNode("Conv", ("x", "w"), ("a",)), GraphNode("Conv", ("x", "w", "", "a"), ("y",))]
    values = {"a": value(4096), "y": value(4096)}
    assert live_peak_bytes(nodes, values, ("y",)) == 4096
