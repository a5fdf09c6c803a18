"""Messages between the process that runs an answer and the process that runs its test.

Only plain values cross, written as JSON: numbers, texts, and the standard containers, all rebuilt on the other side.
The test therefore never calls a method of the answer, such as ``__eq__`` or ``__repr__``. Functions, iterators and
other objects stay where they are and are called through a number.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
import json
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

MESSAGE_BYTES = 32 << 20

_SEQUENCES: dict[str, type[Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_MUTABLE = (list, dict, set, bytearray)

# What a test may ask of an object of the answer. The first group yields and sets values; the second one lets the object
# decide a comparison, which only a task that asks for a class permits.
_YIELDING: dict[str, Callable[..., Any]] = {
    "call": lambda target, *args, **kwargs: target(*args, **kwargs),
    "getattr": getattr,
    "iter": iter,
    "next": next,
    "len": len,
    "getitem": operator.getitem,
    "setattr": setattr,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
}
_DECIDING: dict[str, Callable[..., Any]] = {
    "contains": operator.contains,
    "bool": bool,
    "repr": repr,
    "str": str,
    "hash": hash,
    "abs": abs,
    "int": int,
    "float": float,
    "enter": lambda target: target.__enter__(),
    "exit": lambda target, *args: target.__exit__(*args),
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv")},
    **{name: getattr(operator, name) for name in ("floordiv", "mod", "pow", "neg", "and_", "or_", "xor")},
}


class EndedError(Exception):
    """The other process has ended, or has sent something that is no message."""


class Peer:
    """One end of the connection. Both ends may call objects of the other one, also while they answer a call.

    trusts: whether the other end's objects may decide comparisons, see above
    serves: whether this end answers every request; otherwise it only lets the other end call what it was given
    """

    def __init__(self, reader: BinaryIO, writer: BinaryIO, serves: bool, trusts: bool) -> None:
        self._reader, self._writer = reader, writer
        self._serves, self._trusts = serves, trusts
        self._kept: list[Any] = []
        self._numbers: dict[int, int] = {}
        self.errors: dict[str, type[BaseException]] = {}
        self.objects: dict[str, Any] = {}

    def send(self, message: Any) -> None:
        try:
            self._writer.write(json.dumps(message).encode() + b"\n")
            self._writer.flush()
        except (OSError, ValueError, RecursionError) as error:
            raise EndedError(str(error)) from None

    def receive(self) -> Any:
        try:
            line = self._reader.readline(MESSAGE_BYTES)
            return json.loads(line)
        except (OSError, ValueError, RecursionError) as error:
            raise EndedError(str(error)) from None

    def ask(self, operation: str, target: int | str, *args: Any, **kwargs: Any) -> Any:
        """Let the other end apply an operation to one of its objects, and return the result or raise its exception.

        Lists, dictionaries and sets that the other end changed in place are changed here too.
        """
        named = {key: self.encode(value) for key, value in kwargs.items()}
        self.send({"ask": operation, "target": target, "args": [self.encode(value) for value in args], "named": named})
        while True:
            message = self.receive()
            if not isinstance(message, dict):
                raise EndedError("no message")
            if "ask" in message:
                self.answer(message)
            elif "error" in message:
                raise self._exception(message["error"])
            else:
                for value, changed in zip(args, message["args"], strict=False):
                    if type(value) in _MUTABLE:
                        _replace(value, self.decode(changed))
                return self.decode(message["value"])

    def answer(self, message: Any) -> None:
        """Apply the operation of a request and send its result."""
        try:
            operation, target = message["ask"], message["target"]
            subject = self.objects[target] if isinstance(target, str) else self._kept[target]
            table = {**_YIELDING, **_DECIDING} if self._serves else {"call": _YIELDING["call"]}
            args = [self.decode(value) for value in message["args"]]
            named = {key: self.decode(value) for key, value in message["named"].items()}
            value = self.encode(table[operation](subject, *args, **named))
            after = [self.encode(value) if type(value) in _MUTABLE else None for value in args]
        except EndedError:
            raise
        except BaseException as error:
            self.send({"error": self._described(error)})
        else:
            self.send({"value": value, "args": after})

    def encode(self, value: Any) -> Any:
        """Return the JSON form of a plain value, or the number under which another object is kept."""
        if value is None or isinstance(value, bool):
            return value
        for kind, write in _SCALARS.items():
            if isinstance(value, kind):
                return [kind.__name__, write(value)]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return ["named", type(value).__name__, list(map(str, value._fields)), [*map(self.encode, tuple(value))]]
        for name, sequence in _SEQUENCES.items():
            if isinstance(value, sequence):
                return [name, [self.encode(item) for item in sequence(value)]]
        if isinstance(value, collections.deque):
            return ["deque", value.maxlen, [self.encode(item) for item in value]]
        if isinstance(value, dict):
            items = [[self.encode(key), self.encode(item)] for key, item in dict.items(value)]
            kinds = (collections.Counter, collections.OrderedDict, collections.defaultdict)
            name = next((kind.__name__ for kind in kinds if isinstance(value, kind)), "dict")
            factory = getattr(getattr(value, "default_factory", None), "__name__", "")
            return [name, items, factory]
        if isinstance(value, range):
            return ["range", value.start, value.stop, value.step]
        if type(value).__module__ == "numpy" and hasattr(value, "item") and not hasattr(value, "__len__"):
            return self.encode(value.item())
        if isinstance(value, Remote):
            return ["yours", object.__getattribute__(value, "_target")]
        if not self._serves and isinstance(value, Iterator):
            return ["iterator", [self.encode(item) for item in value]]
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._kept)
            self._kept.append(value)
        return ["mine", self._numbers[id(value)]]

    def decode(self, form: Any) -> Any:
        if form is None or isinstance(form, bool):
            return form
        name, content, *rest = form
        if name in _READERS:
            return _READERS[name](content)
        if name in _SEQUENCES:
            return _SEQUENCES[name]([self.decode(item) for item in content])
        if name in ("dict", "Counter", "OrderedDict", "defaultdict"):
            plain = {self.decode(key): self.decode(item) for key, item in content}
            if name == "dict":
                return plain
            if name == "defaultdict":
                factories = {"int": int, "list": list, "dict": dict, "set": set, "float": float, "str": str}
                return collections.defaultdict(factories.get(rest[0]), plain)
            return collections.Counter(plain) if name == "Counter" else collections.OrderedDict(plain)
        if name == "named":
            kind = collections.namedtuple(content, rest[0])  # type: ignore[misc]
            return kind(*map(self.decode, rest[1]))
        if name == "deque":
            return collections.deque(map(self.decode, rest[0]), content)
        if name == "range":
            return range(content, *rest)
        if name == "iterator":
            return iter([self.decode(item) for item in content])
        if name == "yours":
            return self.objects[content] if isinstance(content, str) else self._kept[content]
        if name == "mine":
            return self.remote(content)
        raise EndedError(f"unknown form {name!r}")

    def remote(self, target: int | str) -> Remote:
        return (Trusted if self._trusts else Remote)(self, target)

    def error_class(self, name: str, bases: list[str]) -> type[BaseException]:
        """Return the built-in exception of this name, or a class of this name below the first built-in base."""
        if name in self.errors:
            return self.errors[name]
        found = [getattr(builtins, base, None) for base in [name, *bases]]
        known = [kind for kind in found if isinstance(kind, type) and issubclass(kind, BaseException)]
        if known and known[0].__name__ == name:
            return known[0]
        base = known[0] if known and issubclass(known[0], Exception) else Exception
        self.errors[name] = type(name, (base,), {"__module__": "__main__"})
        return self.errors[name]

    def _described(self, error: BaseException) -> Any:
        try:
            args = [self.encode(value) for value in error.args]
        except BaseException:
            args = []
        return [type(error).__name__, [base.__name__ for base in type(error).__mro__[1:-1]], args]

    def _exception(self, form: Any) -> BaseException:
        name, bases, args = form
        kind = self.error_class(str(name), list(map(str, bases)))
        try:
            made = kind(*(self.decode(value) for value in args))
        except TypeError:  # such as UnicodeDecodeError, which needs certain arguments
            made = Exception(name)
        # The answer may not end the test: SystemExit and KeyboardInterrupt are failures like others.
        return made if isinstance(made, Exception) else RuntimeError(f"the answer raised {name}")


class Remote:
    """An object that stays in the other process: a function, an iterator, or an object of a class of the answer."""

    def __init__(self, peer: Peer, target: int | str) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_target", target)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _ask(self, "call", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _ask(self, "getattr", name)

    def __iter__(self) -> Any:
        return _ask(self, "iter")

    def __next__(self) -> Any:
        return _ask(self, "next")

    def __len__(self) -> int:
        return int(_ask(self, "len"))

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: Any) -> Any:
        return _ask(self, "getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _ask(self, "setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        _ask(self, "delitem", key)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "setattr", name, value)

    def __eq__(self, other: object) -> bool:
        """Whether both are one object, whatever its class says."""
        targets = [object.__getattribute__(one, "_target") for one in (self, other) if isinstance(one, Remote)]
        return len(targets) == 2 and targets[0] == targets[1]

    def __hash__(self) -> int:
        return hash(object.__getattribute__(self, "_target"))


class Trusted(Remote):
    """An object of a class that the task asked for, so that the class decides what equals what."""


def _ask(remote: Remote, operation: str, *args: Any, **kwargs: Any) -> Any:
    peer: Peer = object.__getattribute__(remote, "_peer")
    return peer.ask(operation, object.__getattribute__(remote, "_target"), *args, **kwargs)


def _method(operation: str) -> Callable[..., Any]:
    return lambda self, *args: _ask(self, operation, *args)


for _name in _DECIDING:
    setattr(Trusted, f"__{_name.strip('_')}__", _method(_name))


def _replace(value: Any, changed: Any) -> None:
    """Give a mutable argument the content that it has in the other process."""
    if isinstance(value, list | bytearray):
        value[:] = changed
    else:
        value.clear()
        value.update(changed)


_SCALARS: dict[type, Callable[[Any], Any]] = {
    int: lambda value: hex(int(value)),
    float: lambda value: float(value).hex(),
    complex: lambda value: [value.real.hex(), value.imag.hex()],
    str: lambda value: str.__str__(value),
    bytes: lambda value: bytes(value).hex(),
    bytearray: lambda value: bytes(value).hex(),
    decimal.Decimal: str,
    fractions.Fraction: str,
    datetime.datetime: lambda value: value.isoformat(),
    datetime.date: lambda value: value.isoformat(),
    datetime.time: lambda value: value.isoformat(),
    datetime.timedelta: lambda value: [value.days, value.seconds, value.microseconds],
    types.EllipsisType: lambda value: "",
}
_READERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "complex": lambda parts: complex(*map(float.fromhex, parts)),
    "str": str,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "Decimal": decimal.Decimal,
    "Fraction": fractions.Fraction,
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": lambda parts: datetime.timedelta(*parts),
    "ellipsis": lambda text: ...,
}
