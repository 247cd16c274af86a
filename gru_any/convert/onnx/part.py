"""One GRU out of a larger graph: its nodes, and those that compute its weights.

What else a chosen node reads becomes an input of the small graph: x, the lengths and the first
state. The rest of the large graph may hold any operator; it is not read.
"""

from __future__ import annotations  # protobuf's classes are known to a type checker alone

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NoReturn

from .check import library

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, ValueInfoProto

ARGUMENTS = {0: "x", 4: "lengths", 5: "h0"}  # inputs of the operator GRU, by place
REVERSING = ("Slice", "ReverseSequence")
PASSING = ("Cast", "Identity")


def name_of(node: NodeProto) -> str:
    """Return the name of a node, or of its first output where it has none."""
    return str(node.name or next((o for o in node.output if o), ""))


def part(graph: GraphProto, wanted: str) -> GraphProto:
    """Return the graph of the GRU nodes that `wanted` names, and of the nodes between them.

    Raises
    ------
    ValueError
        There are none, or they do not follow one another.
    """
    if not isinstance(wanted, str) or not wanted:
        raise ValueError(f"node is {wanted!r}, expected the name of a node, or a prefix of names")
    nodes = list(graph.node)
    chosen = _chosen(nodes, wanted)
    made_by = {o: i for i, node in enumerate(nodes) for o in node.output if o}
    fixed = _constants(graph)

    def refuse(why: str) -> NoReturn:
        names = ", ".join(repr(name_of(nodes[i])) for i in chosen)
        raise ValueError(
            f"node={wanted!r} selects {names}, which do not stack: {why}; {listed(nodes)}"
        )

    kept = _between(nodes, chosen, refuse) | _reversing(nodes, chosen, made_by)
    kept |= _casts_of_lengths(nodes, chosen, kept, made_by)
    inputs = _inputs(nodes, chosen, kept, fixed, refuse)
    kept |= _above(nodes, kept, made_by, fixed)
    kind = _float_kind(nodes, chosen, made_by, graph)
    layout = _layout(nodes[chosen[0]])
    declared = [_declare(name, role, kind, layout) for name, role in inputs.items()]
    read = {name for i in kept for name in nodes[i].input}
    weights = [t for t in graph.initializer if t.name in read]
    made: GraphProto = library().helper.make_graph(
        [nodes[i] for i in sorted(kept)], graph.name or "part", declared, [], weights
    )
    return made


def _casts_of_lengths(
    nodes: list[NodeProto], chosen: list[int], kept: set[int], made_by: dict[str, int]
) -> set[int]:
    """Return the casts between lengths and their input, so that all nodes find the same input."""
    found: set[int] = set()
    for i in sorted(kept):
        places = [4] if i in chosen else [1] if nodes[i].op_type == "ReverseSequence" else []
        for name in (nodes[i].input[p] for p in places if p < len(nodes[i].input)):
            above = made_by.get(name, -1)
            while above not in kept | found | {-1} and nodes[above].op_type in PASSING:
                found.add(above)
                above = made_by.get(nodes[above].input[0], -1)
    return found


def _inputs(
    nodes: list[NodeProto],
    chosen: list[int],
    kept: set[int],
    fixed: set[str],
    refuse: Callable[[str], NoReturn],
) -> dict[str, str]:
    """Return the inputs of the small graph, and what each is for its nodes."""
    made = {o for i in kept for o in nodes[i].output}
    inputs: dict[str, str] = {}
    for i in sorted(kept):
        for place, name in enumerate(nodes[i].input):
            if not name or name in made or name in fixed:
                continue
            role = _role(nodes[i], place, i in chosen)
            if inputs.setdefault(name, role or "") != role or not role:
                refuse(f"{name!r} is read by {name_of(nodes[i])!r}, and is no output of these")
    entries = [name for name, role in inputs.items() if role == "x"]
    if len(entries) > 1:
        refuse(f"they read {' and '.join(map(repr, entries))}")
    return inputs


def listed(nodes: Iterable[NodeProto]) -> str:
    """Return the GRU nodes of a graph, in words."""
    names = [repr(name_of(node)) for node in nodes if node.op_type == "GRU"]
    return f"the GRU nodes of the graph are {', '.join(names)}" if names else "it has no GRU nodes"


def _chosen(nodes: list[NodeProto], wanted: str) -> list[int]:
    """Return the places of the GRU nodes of this name, else of those whose names begin so."""
    grus = {i: name_of(node).strip("/") for i, node in enumerate(nodes) if node.op_type == "GRU"}
    named = [i for i, name in grus.items() if name == wanted.strip("/")]
    if len(named) > 1:
        raise ValueError(f"{len(named)} GRU nodes are named {wanted!r}; {listed(nodes)}")
    found = named
    for ends in ("/.:", "_"):  # "gru" is the beginning of gru/1 and gru_1, not of gru1
        begin = wanted.strip("/").rstrip(ends)
        found = found or [
            i for i, name in grus.items() if name.startswith(tuple(begin + end for end in ends))
        ]
    if not found:
        raise ValueError(f"no GRU node is named {wanted!r}, or {wanted!r}/...; {listed(nodes)}")
    return found


def _constants(graph: GraphProto) -> set[str]:
    """Return the names of what is known before the model runs."""
    fixed = {t.name for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" or (node.input and all(n in fixed for n in node.input if n)):
            fixed |= {o for o in node.output if o}
    return fixed


def _below(nodes: list[NodeProto], start: int) -> set[int]:
    """Return the nodes that compute with what a node puts out."""
    found: set[int] = set()
    made = {o for o in nodes[start].output if o}
    for i in range(start + 1, len(nodes)):
        if made & set(nodes[i].input):
            found.add(i)
            made |= {o for o in nodes[i].output if o}
    return found


def _between(
    nodes: list[NodeProto], chosen: list[int], refuse: Callable[[str], NoReturn]
) -> set[int]:
    """Return the chosen nodes, those between, and the one that joins two directions at the end."""
    below = {i: _below(nodes, i) for i in chosen}
    ends = [i for i in chosen if not below[i] & set(chosen)]
    targets = set(chosen)
    if len(ends) > 1:
        shared = set.intersection(*(below[i] for i in ends))
        if len(ends) > 2 or not shared:
            refuse("none reads what another puts out, and nothing joins their outputs")
        targets.add(min(shared))
    wanted = {name for i in targets for name in nodes[i].input}
    above = set(targets)
    for i in reversed(range(max(targets))):
        if wanted & set(nodes[i].output):
            above.add(i)
            wanted |= set(nodes[i].input)
    return targets | (above & {j for found in below.values() for j in found})


def _reversing(nodes: list[NodeProto], chosen: list[int], made_by: dict[str, int]) -> set[int]:
    """Return the nodes that reverse what one chosen node reads before another does."""
    read = {nodes[i].input[0] for i in chosen}
    makers = {made_by[name] for name in read if name in made_by}
    return {i for i in makers if nodes[i].op_type in REVERSING and nodes[i].input[0] in read}


def _above(
    nodes: list[NodeProto], kept: set[int], made_by: dict[str, int], fixed: set[str]
) -> set[int]:
    """Return the nodes that compute the constants that others read."""
    found: set[int] = set()
    names = [name for i in kept for name in nodes[i].input if name in fixed]
    while names:
        i = made_by.get(names.pop())
        if i is not None and i not in found:
            found.add(i)
            names.extend(nodes[i].input)
    return found


def _role(node: NodeProto, place: int, chosen: bool) -> str | None:
    """Return the role of an input of the part. W, R and B are refused where they are read."""
    if chosen:
        return ARGUMENTS.get(place, "weights")
    if node.op_type in PASSING or (node.op_type == "ReverseSequence" and place == 1):
        return "lengths"
    return "x" if node.op_type in REVERSING and place == 0 else None


def _float_kind(
    nodes: list[NodeProto], chosen: list[int], made_by: dict[str, int], graph: GraphProto
) -> int:
    """Return the dtype of the weights, which is that of x."""
    onnx = library()
    kinds = {t.name: t.data_type for t in graph.initializer}
    names, seen = [nodes[i].input[1] for i in chosen], set()
    while names:
        name = names.pop()
        i = made_by.get(name)
        attributes = {a.name: a for a in nodes[i].attribute} if i is not None else {}
        kind = kinds.get(name)
        if "to" in attributes:
            kind = attributes["to"].i
        elif "value" in attributes:
            kind = attributes["value"].t.data_type
        if kind in (onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
            return int(kind)
        if i is not None and name not in seen:
            names.extend(nodes[i].input)
        seen.add(name)
    return int(onnx.TensorProto.FLOAT)


def _layout(node: NodeProto) -> int:
    return next((a.i for a in node.attribute if a.name == "layout"), 0)


def _declare(name: str, role: str, kind: int, layout: int) -> ValueInfoProto:
    """Declare an input of the small graph."""
    onnx = library()
    lead = ["B", "T"] if layout else ["T", "B"]
    shape = {"x": [*lead, None], "lengths": ["B"]}.get(role, [None] * 3)
    kind = onnx.TensorProto.INT32 if role == "lengths" else kind
    declared: ValueInfoProto = onnx.helper.make_tensor_value_info(name, kind, shape)
    return declared
