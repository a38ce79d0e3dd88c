"""Pickles read as data: the instructions are followed, but no class is imported and nothing is called.

A pickle is a small program. `read_pickle` runs it on plain values alone. Where the program names a class or function,
it gets a `Name`; where it calls one, the name is looked up in a table of functions of this package; what is not in the
table becomes a `Stub`, which remembers what it was given and does nothing.
"""

from __future__ import annotations

import pickletools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_PLAIN = (str, int, float, bool, bytes, type(None))
_NUMBERS = {"INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"}
_TEXTS = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_LITERALS = _NUMBERS | _TEXTS | _BYTES
_RECONSTRUCTORS = ("copy_reg._reconstructor", "copyreg._reconstructor", "copyreg.__newobj__")


class Name:
    """The name of a class or function in a pickle."""

    def __init__(self, dotted: str) -> None:
        self.dotted = dotted

    def __repr__(self) -> str:
        return self.dotted


class Stub:
    """What a pickle would have made of a class or function that is not known here.

    Attributes:
        name: of the class or function.
        arguments: what it would have been called with.
        entries: what would have been put into it, as a dictionary or (with numbers for keys) as a list.
        state: what its attributes would have been set from.
    """

    def __init__(self, name: str, arguments: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.arguments = arguments
        self.entries: dict[Any, Any] = {}
        self.state: Any = None

    def __repr__(self) -> str:
        return self.name


Makers = Mapping[str, Callable[..., Any]]


def _pairs(items: Iterable[Any] | Mapping[Any, Any] = ()) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in items.items() if isinstance(items, Mapping) else items:
        found[_key(key)] = value
    return found


# Plain values of the standard library, by the names of Python 2 and 3.
PLAIN_MAKERS: Makers = {
    "collections.OrderedDict": _pairs,
    "collections.Counter": lambda items=(): Counter(_pairs(items)),
    "collections.defaultdict": lambda factory=None, items=(): _pairs(items),
    "builtins.dict": _pairs,
    "builtins.set": lambda items=(): {_key(item) for item in items},
    "__builtin__.set": lambda items=(): {_key(item) for item in items},
}


def read_pickle(file: Any, makers: Makers, persistent: Callable[[Any], Any], limit: int = 1_000_000) -> Any:
    """The value that the pickle at the position of the binary `file` describes; afterwards `file` stands behind it.

    Strings of Python 2 are decoded as Latin-1.

    Args:
        makers: what is made of calls of known functions, by their dotted names.
        persistent: what is made of references to things outside the pickle.
        limit: the number of instructions, since each may cost a hundred bytes of memory.

    Raises:
        ValueError: there are more instructions, or instructions that no pickle of plain data has.
        Exception: any other, when the bytes are damaged.
    """
    return _Machine(makers, persistent, limit).run(file)


class _Machine:
    """The stack, its marks and the memo of one pickle."""

    def __init__(self, makers: Makers, persistent: Callable[[Any], Any], limit: int) -> None:
        self.limit = self.left = limit
        self.makers = {**PLAIN_MAKERS, **makers}
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: Any) -> Any:
        for opcode, argument, _ in pickletools.genops(file):
            self._spend(1)
            if opcode.name == "STOP":
                return self.stack[-1]
            if opcode.name in _LITERALS:
                self.stack.append(argument)
            else:
                self._step(opcode.name, argument)
        raise EOFError

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET" | "EMPTY_TUPLE":
                stack.append({"LIST": list, "DICT": dict, "SET": set, "TUPLE": tuple}[name[6:]]())
            case "MARK":
                self.marks.append(len(stack))
            case "LIST":
                stack.append(self._marked())
            case "TUPLE":
                stack.append(tuple(self._marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop() for _ in range(int(name[-1])))[::-1])
            case "DICT":
                items = self._marked()
                stack.append({})
                self._put(items)
            case "FROZENSET":
                stack.append(frozenset(map(_key, self._marked())))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                self._extend([self._pop()] if name == "APPEND" else self._marked())
            case "SETITEM" | "SETITEMS":
                self._put([self._pop(), self._pop()][::-1] if name == "SETITEM" else self._marked())
            case "POP":
                self._pop()
            case "POP_MARK":
                self._marked()
            case "DUP":
                stack.append(stack[-1])
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[int(argument)])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[int(argument)] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GLOBAL":
                stack.append(Name(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                attribute, module = self._pop(), self._pop()
                stack.append(Name(f"{module}.{attribute}"))
            case "REDUCE" | "NEWOBJ":
                arguments, function = self._pop(), self._pop()
                stack.append(self._call(function, arguments))
            case "NEWOBJ_EX":
                _, arguments, function = self._pop(), self._pop(), self._pop()
                stack.append(self._call(function, arguments))
            case "INST":
                stack.append(self._call(Name(argument.replace(" ", ".")), tuple(self._marked())))
            case "OBJ":
                function, *arguments = self._marked()
                stack.append(self._call(function, tuple(arguments)))
            case "BUILD":
                state = self._pop()
                if isinstance(stack[-1], Stub):
                    stack[-1].state = state  # attributes of a dictionary, say, are left behind
            case "PERSID" | "BINPERSID":
                stack.append(self.persistent(argument if name == "PERSID" else self._pop()))
            case _:
                raise ValueError(f"the instruction {name} is not one of a pickle of plain data")

    def _spend(self, number: int) -> None:
        self.left -= number
        if self.left < 0:
            raise ValueError(f"it describes more than {self.limit} values besides the tensors")

    def _pop(self) -> Any:
        if self.marks and self.marks[-1] >= len(self.stack):
            raise ValueError("an instruction takes more than there is")
        return self.stack.pop()

    def _marked(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _put(self, items: list[Any]) -> None:
        found = self.stack[-1]
        entries = found.entries if isinstance(found, Stub) else found
        if not isinstance(entries, dict):
            raise TypeError("entries are put into something else than a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            entries[_key(key)] = value

    def _extend(self, items: list[Any]) -> None:
        found = self.stack[-1]
        if isinstance(found, Stub):
            found.entries.update(enumerate(items, start=len(found.entries)))
        elif isinstance(found, set):
            found.update(map(_key, items))
        else:
            found.extend(items)

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(arguments, tuple):
            raise TypeError("the arguments of a call are not a tuple")
        # One call may copy a long list that another instruction names again and again.
        self._spend(sum(len(argument) for argument in arguments if isinstance(argument, list | tuple | dict | set)))
        called = function.dotted if isinstance(function, Name) else getattr(function, "name", type(function).__name__)
        if called in self.makers:
            return self.makers[called](*arguments)
        if called in _RECONSTRUCTORS and arguments and isinstance(arguments[0], Name):
            return Stub(arguments[0].dotted, arguments[1:])
        return Stub(called, arguments)


def _key(key: Any) -> Any:
    """`key`, or a stub in its place where it is not plain: the hash of nested tuples may take exponential time."""
    plain = isinstance(key, (*_PLAIN, Stub, Name))
    if plain or (isinstance(key, tuple) and all(isinstance(part, _PLAIN) for part in key)):
        return key
    return Stub(type(key).__name__, (key,))
