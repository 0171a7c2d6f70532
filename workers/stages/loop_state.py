"""The variables that a pipeline's denoising loop carries from one step to the next, found in its own code.

A checkpoint that holds them and the scheduler's holds all that the next step depends on: latents in nearly all
pipelines, the sound's latents or a solver's last prediction in some.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

from diffusers import SchedulerMixin

CALLBACKS = ("callback_on_step_end", "callback")


@dataclass(frozen=True, slots=True)
class Carried:
    """Names of a call's variables: those that its loop carries along, and those of schedulers of its own among them."""

    values: frozenset[str]
    schedulers: frozenset[str]


@functools.cache
def carried_in(code: CodeType) -> Carried | None:
    """Return what the loop that calls back at its steps carries from one to the next.

    None where there is no such loop, or where it can't be told: it makes schedulers as it goes, writes into what it
    doesn't make, or has guiders.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except SyntaxError:  # a lambda's lines, which hold no loop
        return None
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For | ast.While) and calls_back(node)]
    innermost = [loop for loop in loops if not any(calls_back(node) for node in ast.walk(loop) if is_inner(node, loop))]
    if len(innermost) != 1:
        return None
    (inner,) = innermost
    flow = Flow()
    flow.block(inner.body, set(stored(inner.target) if isinstance(inner, ast.For) else ()))
    assigned = {name for node in inner.body for name in stored(node)}
    schedulers: set[str] = set()
    for node in ast.walk(inner):
        match node:
            case ast.Call(func=ast.Attribute(attr="step", value=ast.Name(id=name))) if name not in assigned:
                schedulers.add(name)
            case ast.Call(func=ast.Attribute(attr="step", value=ast.Attribute(value=ast.Name(id="self")))):
                pass
            case ast.Call(func=ast.Attribute(attr="step")):
                return None
            case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store()) if name not in assigned:
                return None  # kept in a list or a dict, which is not seen
            case ast.Attribute(attr=name) if "guider" in name:
                return None  # guiders may keep averages of their own
    return Carried(frozenset(flow.read_first & assigned), frozenset(schedulers))


def is_inner(node: ast.AST, loop: ast.AST) -> bool:
    return node is not loop and isinstance(node, ast.For | ast.While)


def calls_back(loop: ast.AST) -> bool:
    names = (node.func.id for node in ast.walk(loop) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    return any(name in CALLBACKS for name in names)


def stored(node: ast.AST) -> Iterable[str]:
    """Yield the names that a piece of code assigns, to themselves as a callback gives them back left out."""
    given_back = {id(target) for part in ast.walk(node) for target in targets_given_back(part)}
    for part in ast.walk(node):
        if id(part) not in given_back and isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            yield part.id


def targets_given_back(node: ast.AST) -> Iterable[ast.AST]:
    """Yield the target of `x = outputs.pop("x", x)`, by which callbacks may change what ours leaves as it is."""
    match node:
        case ast.Assign(
            targets=[ast.Name(id=name) as target],
            value=ast.Call(func=ast.Attribute(attr="pop"), args=[_, ast.Name(id=default)]),
        ) if name == default:
            yield target


@dataclass(slots=True)
class Flow:
    """The names that code may read before it has assigned them."""

    read_first: set[str] = field(default_factory=set)

    def block(self, body: Sequence[ast.stmt], known: set[str]) -> set[str]:
        """Walk statements in order; return the names that are surely assigned after them, `known` ones included."""
        for statement in body:
            known = self.statement(statement, known)
        return known

    def statement(self, node: ast.stmt, known: set[str]) -> set[str]:
        match node:
            case ast.If(test=test, body=body, orelse=orelse):
                self.reads(test, known)
                return self.block(body, set(known)) & self.block(orelse, set(known))
            case ast.For(target=target, iter=over, body=body, orelse=orelse):
                self.reads(over, known)
                self.block(body, known | set(stored(target)))
                return self.block(orelse, set(known))
            case ast.While(test=test, body=body):
                self.reads(test, known)
                self.block(body, set(known))
                return known
            case ast.With(items=items, body=body):
                for item in items:
                    self.reads(item.context_expr, known)
                    known = known | (set(stored(item.optional_vars)) if item.optional_vars else set())
                return self.block(body, known)
            case ast.Try(body=body, handlers=handlers, finalbody=finalbody):
                self.block(body, set(known))
                for handler in handlers:
                    self.block(handler.body, set(known))
                return self.block(finalbody, set(known))
            case ast.AugAssign(target=ast.Name(id=name), value=value):
                self.reads(value, known)
                self.read_first |= {name} - known
                return known | {name}
            case ast.FunctionDef(name=name):
                return known | {name}
        self.reads(node, known)
        return known | set(stored(node))

    def reads(self, node: ast.AST, known: set[str]) -> None:
        inner = {name for part in ast.walk(node) if isinstance(part, ast.comprehension) for name in stored(part.target)}
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load) and part.id not in known | inner:
                self.read_first.add(part.id)


@dataclass(frozen=True, slots=True)
class LoopState:
    """The values of a loop's variables at the end of a step, and the schedulers of its own, by name."""

    values: Mapping[str, Any]
    schedulers: Mapping[str, Any]


def loop_state(frame: FrameType) -> LoopState | None:
    """Return what the loop in a call's frame carries along now; None where that can't be told."""
    found = carried_in(frame.f_code)
    if found is None:
        return None
    now = frame.f_locals
    schedulers = {name: now[name] for name in found.schedulers if name in now}
    if not all(isinstance(one, SchedulerMixin) for one in schedulers.values()):
        return None
    return LoopState({name: now[name] for name in sorted(found.values) if name in now}, schedulers)
