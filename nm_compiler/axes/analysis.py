"""Walk a graph once and give every axis of every tensor in it a term.

A rule per op (`nm_compiler.axes.rules`) unifies the axes of its inputs and names those of its result. An op without a rule
pins everything it touches, so that what is unknown is safe. State is known by the identity of its tensor: tied parameters,
both modes' graphs and subgraphs meet in the same terms.
"""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from nm_compiler.axes.terms import Term, Terms
from nm_compiler.graph import arguments_of, getattr_path, target_name

Dims: TypeAlias = tuple[Term, ...]
Value: TypeAlias = "Dims | tuple[Any, ...] | None"  # of a tensor, of several tensors, of what is no tensor
Rule: TypeAlias = "Callable[[Analysis, Call], Value]"

_LOG = logging.getLogger(__name__)
_COPIES = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.clone.default, torch.ops.aten.detach.default)
_PRIMES = (1000003, 1000033, 1000037, 1000039, 1000081, 1000099, 1000117, 1000121, 1000133, 1000151, 1000159, 1000171)


@dataclass(frozen=True, slots=True)
class Call:
    """One op call: the node, its op's name without the in-place underscore, its arguments by name."""

    node: Node
    name: str
    args: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.args[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The argument ``key``, or ``default`` where the op has none."""
        return self.args.get(key, default)


class Analysis:
    """The terms of a model's state and of its graphs' values.

    spaces: lists of axes that an entry of some value is indexed by: tensors, and the products and reductions behind them.
    A dependence holds if every space that has the dependent axis has what it depends on.
    unknown: ops without a rule, with the number of axes that each pinned.
    """

    def __init__(self, model: nn.Module, rules: dict[str, Rule]) -> None:
        self.terms = Terms()
        self.rules = rules
        self.state: dict[str, Dims] = {}
        self.spaces: list[Dims] = []
        self.unknown: Counter[str] = Counter()
        self._of_tensor: dict[int, Dims] = {}
        self._values: dict[Node, Value] = {}
        self._sizes: dict[Any, int] = {}
        self._symbols: dict[Any, int] = {}
        self._persistent = set(model.state_dict(keep_vars=True))
        self._shared = _overlapping(model)

    # --- the walk -------------------------------------------------------------------------------------------------

    def run(self, gm: GraphModule, inputs: Sequence[Value] | None = None) -> Value:
        """Give every value of ``gm`` its terms. inputs: of a subgraph's placeholders; None pins them. The outputs' terms."""
        given = iter(inputs) if inputs is not None else None
        result: Value = None
        for node in gm.graph.nodes:
            if node.op == "output":
                result = pytree.tree_map_only(Node, self.value, node.args[0])
                continue
            if node.op == "placeholder":
                value = next(given) if given is not None else None
                value = value if value is not None else self.fresh(node.meta.get("val"), pinned=f"input {node.name}")
            elif node.op == "get_attr":
                value = self._read(gm, node)
            else:
                value = self._call(node)
            self._values[node] = value
            self.spaces.extend(_tensors(value))
        return result

    def value(self, node: Any) -> Value:
        """The terms of a node's tensor, or tuple of tensors; None for what is no tensor."""
        return self._values.get(node) if isinstance(node, Node) else None

    def dims(self, node: Any) -> Dims:
        """The terms of a node's tensor; () for a number."""
        value = self.value(node)
        assert value is None or all(isinstance(term, Term) for term in value), f"{node} is no single tensor"
        return value or ()

    def sizes(self, value: Any) -> tuple[int, ...]:
        """The shape of a (fake) tensor as numbers; symbols are given large primes, so that only equal products are equal."""
        return tuple(self.size(size) for size in value.shape)

    def size(self, size: Any) -> int:
        """One size as a number."""
        if isinstance(size, int):
            return size
        expr = size.node.expr if isinstance(size, torch.SymInt) else size
        if expr not in self._sizes:
            for symbol in sorted(expr.free_symbols, key=str):
                self._symbols.setdefault(symbol, _PRIMES[len(self._symbols) % len(_PRIMES)])
            self._sizes[expr] = int(expr.subs(self._symbols))
        return self._sizes[expr]

    def shape(self, node: Node) -> tuple[int, ...]:
        """The shape of a node's tensor as numbers."""
        return self.sizes(node.meta["val"])

    def fresh(self, value: Any, pinned: str | None = None) -> Value:
        """New terms for a (fake) tensor or tuple of tensors."""
        if isinstance(value, Tensor):
            one = self.terms.one
            return tuple(one if size == 1 else self.terms.leaf(size, pinned) for size in self.sizes(value))
        if isinstance(value, (tuple, list)):
            return tuple(self.fresh(item, pinned) for item in value)
        return None

    def constant(self, node: Any) -> Tensor | None:
        """The value of a node that reads a constant of the code; None for state, which may change, and what is computed."""
        while isinstance(node, Node) and node.op == "call_function" and node.target in _COPIES:
            node = node.args[0]
        if not isinstance(node, Node) or node.op != "get_attr":
            return None
        owner = node.graph.owning_module
        found = getattr(owner, "__dict__", {}).get("extras", {}).get(str(node.target))
        return (
            found if isinstance(found, Tensor) and not isinstance(found, FakeTensor) and found.device.type != "meta" else None
        )

    def _read(self, gm: GraphModule, node: Node) -> Value:
        tensor = getattr_path(gm, node.target)
        if not isinstance(tensor, Tensor):
            return None
        name = str(node.target)
        if id(tensor) not in self._of_tensor:
            why = self._fixed(name, tensor)
            self._of_tensor[id(tensor)] = tuple(self.terms.leaf(size, why) for size in tensor.shape)
            if name in self._persistent:
                self.state[name] = self._of_tensor[id(tensor)]
        return self._of_tensor[id(tensor)]

    def _fixed(self, name: str, tensor: Tensor) -> str | None:
        if name not in self._persistent:
            return f"{name} is not in the state_dict"
        if name in self._shared:
            return f"{name} shares its memory with {self._shared[name]}"
        if not tensor.is_floating_point():
            return f"{name} is {tensor.dtype}"
        return None

    def _call(self, node: Node) -> Value:
        if node.target is operator.getitem:
            return self._item(node)
        val = node.meta.get("val")
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(val)) and not _may_write(node.target):
            return None  # sizes and checks: no order in them
        name, rule = self._rule(node)
        if rule is None:
            return self.pin_all(node, f"{name} has no rule", unknown=name)
        try:
            value = rule(self, Call(node, name, arguments_of(node)))
        except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            _LOG.debug("the rule of %s did not fit %s", name, node.format_node(), exc_info=error)
            return self.pin_all(node, f"{name} is called in a way its rule does not know", unknown=name)
        if not self._fits(value, val):
            return self.pin_all(node, f"{name} is called in a way its rule does not know", unknown=name)
        return value

    def _rule(self, node: Node) -> tuple[str, Rule | None]:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            name = target_name(target)
            return name, self.rules.get(name)
        name = target._opname
        base = name.rstrip("_") if name.endswith("_") and not name.endswith("__") else name
        rule = self.rules.get(f"{target.namespace}.{base}") if target.namespace != "aten" else self.rules.get(base)
        if rule is None and torch.Tag.pointwise in target.tags:
            rule = self.rules["pointwise"]
        return (base if target.namespace == "aten" else f"{target.namespace}.{base}"), rule

    def _item(self, node: Node) -> Value:
        whole, index = self.value(node.args[0]), node.args[1]
        if whole is None or not isinstance(index, int):
            return None
        item: Value = whole[index]  # type: ignore[assignment]
        return item

    def _fits(self, value: Value, val: Any) -> bool:
        if isinstance(val, Tensor):
            if not isinstance(value, tuple) or not all(isinstance(term, Term) for term in value):
                return False
            return tuple(term.size for term in value) == self.sizes(val)
        if isinstance(val, (tuple, list)) and val:
            return isinstance(value, tuple) and len(value) == len(val) and all(map(self._fits, value, val))
        return True

    # --- what rules say -------------------------------------------------------------------------------------------

    def pin_all(self, node: Node, why: str, unknown: str | None = None) -> Value:
        """Pin every axis of every tensor that ``node`` reads and makes."""
        inputs = [dims for arg in node.all_input_nodes for dims in _tensors(self.value(arg))]
        touched = {id(leaf): leaf for dims in inputs for term in dims for leaf in self.terms.leaves(term)}
        newly = [leaf for leaf in touched.values() if not leaf.pinned and leaf.size > 1]
        if unknown:
            self.unknown[unknown] += len(newly)
        for leaf in touched.values():
            leaf.pinned = leaf.pinned or why
        return self.fresh(node.meta.get("val"), pinned=why)

    def pin(self, terms: Iterable[Term], why: str) -> None:
        """Pin axes whose order matters to an op."""
        for term in terms:
            self.terms.pin(term, why)

    def unify(self, a: Term, b: Term, why: str) -> None:
        """Two axes of which entry i meets entry i. An axis of size 1 meets them all."""
        if a.size != 1 and b.size != 1:
            self.terms.unify(a, b, why)

    def mixed(self, dims: Iterable[Term], axes: Iterable[int]) -> None:
        """An op mixes the entries along ``axes``: what depends on such an axis would be torn apart."""
        dims, axes = tuple(dims), set(axes)
        self.spaces.append(tuple(term for i, term in enumerate(dims) if i not in axes))

    def broadcast(self, many: Sequence[Dims], why: str) -> Dims:
        """Unify shapes aligned at their last axis, as elementwise ops do; the terms of the result."""
        width = max((len(dims) for dims in many), default=0)
        result = []
        columns = [[dims[i - width + len(dims)] for dims in many if i - width + len(dims) >= 0] for i in range(width)]
        for late in (False, True):  # families last: they meet once the axes they are keyed by have met
            for column in columns:
                wide = [term for term in column if term.size != 1]
                if any(self.terms.find(term).kind == "family" for term in wide) == late:
                    for other in wide[1:]:
                        self.terms.unify(wide[0], other, why)
        for column in columns:
            result.append(next((term for term in column if term.size != 1), self.terms.one))
        return tuple(result)

    def regroup(self, dims: Dims, sizes: Sequence[int], why: str) -> Dims:
        """The terms after a reshape to ``sizes``: merged and split factor by factor; pinned where factors do not meet."""
        result: list[Term] = []
        source = [term for term in dims if term.size != 1][::-1]
        wanted = list(sizes)[::-1]
        while source:
            factors, pieces = [source.pop()], [wanted.pop()]
            have, need = factors[0].size, pieces[0]
            while have != need:
                if need < have:
                    pieces.append(wanted.pop())
                    need *= pieces[-1]
                else:
                    factors.append(source.pop())
                    have *= factors[-1].size
            result.extend(self._carve(factors, pieces, why))
        if any(size != 1 for size in wanted):
            raise ValueError("a reshape keeps the number of entries")
        return (*result, *(self.terms.one for _ in wanted))

    def _carve(self, factors: list[Term], sizes: list[int], why: str) -> list[Term]:
        for index, factor in enumerate(factors[1:], 1):  # heads of q in a group of k: the fast may depend on the slow
            self.terms.offer(factor, factors[:index])
        rest = self.terms.product(factors)
        result = []
        for size in sizes:
            pair = self.terms.split_product(rest, size, why)
            if pair is None:
                for factor in factors:
                    self.terms.pin(factor, why)
                return [self.terms.one if size == 1 else self.terms.leaf(size, why) for size in sizes]
            result.append(pair[0])
            rest = pair[1]
        return result


def named(names: str, rule: Rule) -> dict[str, Rule]:
    """``rule`` for every op in ``names``, separated by spaces."""
    return dict.fromkeys(names.split(), rule)


def _tensors(value: Value) -> list[Dims]:
    """The tensors of a value, each as its terms."""
    if value is None:
        return []
    if all(isinstance(term, Term) for term in value):
        return [value]
    return [dims for item in value if not isinstance(item, Term) for dims in _tensors(item)]


def _may_write(target: Any) -> bool:
    """Whether a call that returns no tensor may still matter: it writes into its inputs, or runs a subgraph that does."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    return isinstance(target, torch._ops.HigherOrderOperator)


def _overlapping(model: nn.Module) -> dict[str, str]:
    """State that lies in the memory of another tensor of the model: one order could not serve both."""
    spans = sorted(_spans(model))
    shared: dict[str, str] = {}
    for at, (_, end, name, identity) in enumerate(spans):
        for other_start, _, other, other_identity in spans[at + 1 :]:
            if other_start >= end:
                break
            if identity != other_identity:
                shared.setdefault(name, other)
                shared.setdefault(other, name)
    return shared


def _spans(model: nn.Module) -> Iterator[tuple[int, int, str, int]]:
    """First and last byte, name and identity of every tensor that a module holds, plain attributes included."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        held = {**module._parameters, **module._buffers, **{k: v for k, v in vars(module).items() if isinstance(v, Tensor)}}
        for key, tensor in held.items():
            if not isinstance(tensor, Tensor) or id(tensor) in seen or tensor.device.type == "meta" or not tensor.numel():
                continue
            seen.add(id(tensor))
            start = tensor.data_ptr()
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            if start:
                yield start, start + reach * tensor.element_size(), f"{path}.{key}".lstrip("."), id(tensor)
