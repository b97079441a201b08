"""From PTX to C, statement by statement: registers are variables, labels are labels, each access to memory is a call.

Only what NVVM writes for the kernels of this library is known; anything else is an error that quotes it. The
instructions are those of the PTX ISA, chapter 9.7 (https://docs.nvidia.com/cuda/parallel-thread-execution/).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

C_TYPES: Final = {
    "pred": "bool", "u8": "uint8_t", "b8": "uint8_t", "f32": "float", "f64": "double",
    **{f"{letter}{bits}": f"uint{bits}_t" for bits in (16, 32, 64) for letter in "ub"},
    **{f"s{bits}": f"int{bits}_t" for bits in (16, 32, 64)},
}  # fmt: skip

REAL: Final = "f32|f64"
INTEGER: Final = "[su](?:16|32|64)"
BITS: Final = "pred|b16|b32|b64"

# What an instruction is in C. The group is the type T of its operands; {a:u32} is one of another type. The first rule
# that fits is taken.
RULES: Final = tuple(
    (re.compile(name), expression)
    for name, expression in (
        (rf"add\.({REAL}|{INTEGER})", "{a} + {b}"),
        (rf"sub\.({REAL}|{INTEGER})", "{a} - {b}"),
        (rf"mul\.({REAL})", "{a} * {b}"),
        (rf"mul\.lo\.({INTEGER})", "{a} * {b}"),
        (r"mul\.wide\.(s32)", "(int64_t){a} * {b}"),
        (r"mul\.wide\.(u32)", "(uint64_t){a} * {b}"),
        (r"mul\.hi\.(s64)", "((__int128){a} * {b}) >> 64"),
        (r"mul\.hi\.(u64)", "((unsigned __int128){a} * {b}) >> 64"),
        (rf"mad\.lo\.({INTEGER})", "{a} * {b} + {c}"),
        (r"add\.rn\.(f64)", "add_by_itself({a}, {b})"),
        (r"mul\.rn\.(f64)", "multiply_by_itself({a}, {b})"),
        (r"fma\.rn\.(f32)", "fmaf({a}, {b}, {c})"),
        (r"fma\.rn\.(f64)", "fma({a}, {b}, {c})"),
        (r"fma\.rm\.(f32)", "fma_downwards({a}, {b}, {c})"),
        (rf"div\.rn\.({REAL})", "{a} / {b}"),
        (rf"div\.({INTEGER})", "DIVIDE({T}, {a}, {b})"),
        (rf"rem\.({INTEGER})", "REMAINDER({T}, {a}, {b})"),
        (rf"rcp\.rn\.({REAL})", "1 / {a}"),
        (r"rcp\.approx\.ftz\.(f64)", "rough_reciprocal({a})"),
        (r"sqrt\.rn\.(f32)", "sqrtf({a})"),
        (r"sqrt\.rn\.(f64)", "sqrt({a})"),
        (r"ex2\.approx\.ftz\.(f32)", "power_of_two({a})"),
        (r"abs\.(f32)", "fabsf({a})"),
        (r"abs\.(f64)", "fabs({a})"),
        (rf"abs\.({INTEGER})", "{a} < 0 ? -{a} : {a}"),
        (rf"neg\.({REAL}|{INTEGER})", "-{a}"),
        (r"min\.(f32)", "least_float({a}, {b})"),
        (r"max\.(f32)", "largest_float({a}, {b})"),
        (r"min\.(f64)", "least_double({a}, {b})"),
        (r"max\.(f64)", "largest_double({a}, {b})"),
        (rf"min\.({INTEGER})", "{a} < {b} ? {a} : {b}"),
        (rf"max\.({INTEGER})", "{a} > {b} ? {a} : {b}"),
        (rf"and\.({BITS})", "{a} & {b}"),
        (rf"or\.({BITS})", "{a} | {b}"),
        (rf"xor\.({BITS})", "{a} ^ {b}"),
        (r"not\.(pred)", "!{a}"),
        (rf"not\.({BITS})", "~{a}"),
        (r"shl\.(b32)", "shift_left({a}, {b:u32}, 32)"),
        (r"shl\.(b64)", "shift_left({a}, {b:u32}, 64)"),
        (r"shr\.(u32)", "shift_right({a}, {b:u32}, 32)"),
        (r"shr\.(u64)", "shift_right({a}, {b:u32}, 64)"),
        (r"shr\.(s32)", "shift_sign({a}, {b:u32}, 32)"),
        (r"shr\.(s64)", "shift_sign({a}, {b:u32}, 64)"),
        (r"bfi\.(b64)", "insert_bits({a}, {b}, {c:u32}, {d:u32})"),
        (rf"selp\.({REAL}|{INTEGER}|{BITS})", "{c:pred} ? {a} : {b}"),
        (rf"setp\.eq\.({REAL}|{INTEGER}|{BITS})", "{a} == {b}"),
        (rf"setp\.ne\.({INTEGER}|{BITS})", "{a} != {b}"),
        (rf"setp\.lt\.({REAL}|{INTEGER})", "{a} < {b}"),
        (rf"setp\.le\.({REAL}|{INTEGER})", "{a} <= {b}"),
        (rf"setp\.gt\.({REAL}|{INTEGER})", "{a} > {b}"),
        (rf"setp\.ge\.({REAL}|{INTEGER})", "{a} >= {b}"),
        (rf"setp\.ne\.({REAL})", "{a} < {b} || {a} > {b}"),
        (rf"setp\.equ\.({REAL})", "!({a} < {b} || {a} > {b})"),
        (rf"setp\.neu\.({REAL})", "!({a} == {b})"),
        (rf"setp\.ltu\.({REAL})", "!({a} >= {b})"),
        (rf"setp\.leu\.({REAL})", "!({a} > {b})"),
        (rf"setp\.gtu\.({REAL})", "!({a} <= {b})"),
        (rf"setp\.geu\.({REAL})", "!({a} < {b})"),
        (rf"cvt\.(?:{INTEGER})\.({INTEGER})", "{a}"),
        (rf"cvt\.rn\.f32\.({INTEGER}|f64)", "(float){a}"),
        (rf"cvt\.rn\.f64\.({INTEGER})", "(double){a}"),
        (r"cvt\.f64\.(f32)", "(double){a}"),
        (r"cvt\.rzi\.s64\.(f64)", "towards_zero({a})"),
        (r"cvt\.sat\.f32\.(f32)", "saturated({a})"),
        (r"cvta\.to\.global\.(u64)", "{a}"),
    )
)

STATEMENT: Final = re.compile(r"(?:@(!?)%(p\d+)\s+)?([a-z][\w.]*)\s*(.*)$")
ACCESS: Final = re.compile(r"(ld|st)\.(global|shared)(?:\.v([24]))?\.(\w+)")
SPECIAL: Final = {
    **{f"%tid.{axis}": f"self->place[{i}]" for i, axis in enumerate("xyz")},
    **{f"%ntid.{axis}": f"launch->block[{i}]" for i, axis in enumerate("xyz")},
    **{f"%ctaid.{axis}": f"block_place[{i}]" for i, axis in enumerate("xyz")},
    **{f"%nctaid.{axis}": f"launch->grid[{i}]" for i, axis in enumerate("xyz")},
    "%dynamic_smem_size": "launch->dynamic_bytes",
}


class UnknownInstruction(Exception):
    """PTX that this translation does not know."""


@dataclass(frozen=True)
class Program:
    """A kernel in C.

    Attributes
    ----------
    source : str
        The function `kernel`, to stand below runtime.h.
    n_parameters : int
        Each in 8 bytes.
    shared_bytes : int
        Static shared memory; what a launch asks for comes behind it.
    shared_item_bytes : int
        Of the smallest number in shared memory.
    lines : tuple of str
        The PTX, to quote from.
    """

    source: str
    n_parameters: int
    shared_bytes: int
    shared_item_bytes: int
    lines: tuple[str, ...]


def translate(ptx: str) -> Program:
    """The only kernel of a module.

    >>> text = '''.visible .entry twice(
    ...     .param .u64 twice_param_0
    ... )
    ... {
    ...     .reg .b64 %rd<2>;
    ...     .reg .f32 %f<3>;
    ...     ld.param.u64 %rd1, [twice_param_0];
    ...     ld.global.f32 %f1, [%rd1+8];
    ...     add.f32 %f2, %f1, %f1;
    ...     st.global.f32 [%rd1], %f2;
    ...     ret;
    ... }'''
    >>> print(translate(text).source.strip())
    static const uint8_t constants[] __attribute__((aligned(16))) = {0};
    static void kernel(const uint64_t *parameters)
    {
    uint64_t rd1;
    float f1, f2;
    rd1 = *(const uint64_t *)&parameters[0];
    { const float *from = touch(rd1 + 8, 4, 0, 0, 8); f1 = from[0]; }
    f2 = f1 + f1;
    { float *to = touch(rd1, 4, 1, 0, 10); to[0] = f2; }
    return;
    }
    """
    return _Translation(tuple(ptx.splitlines())).program()


@dataclass
class _Translation:
    """What is known so far. `line` is that of the statement, counted from 1."""

    lines: tuple[str, ...]
    parameters: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)  # where in shared memory each array begins
    shared_bytes: int = 0
    shared_item_bytes: int = 8
    constants: dict[str, int] = field(default_factory=dict)  # where each begins in the array of all
    constant_bytes: list[int] = field(default_factory=list)
    line: int = 0

    def program(self) -> Program:
        start = next(i for i, line in enumerate(self.lines) if line.startswith("{"))
        self._declarations(self.lines[:start])
        numbers = ", ".join(map(str, self.constant_bytes or [0]))
        constants = f"static const uint8_t constants[] __attribute__((aligned(16))) = {{{numbers}}};"
        body = list(self._body(self.lines[start:], start + 1))
        source = "\n".join([constants, "static void kernel(const uint64_t *parameters)", *body, ""])
        return Program(source, len(self.parameters), self.shared_bytes, self.shared_item_bytes, self.lines)

    def _declarations(self, lines: Sequence[str]) -> None:
        """Parameters, and arrays of the module: static shared ones one after the other, the dynamic one behind all."""
        dynamic = []
        for line in lines:
            if found := re.match(r"\s*\.param \.\w+ (\w+)", line):
                self.parameters[found[1]] = len(self.parameters)
            elif found := re.match(r"\.\w+ \.shared \.align (\d+) \.b8 (\w+)\[(\d*)\]", line):
                if found[3]:
                    self.shared[found[2]] = _rounded_up(self.shared_bytes, int(found[1]))
                    self.shared_bytes = self.shared[found[2]] + int(found[3])
                else:
                    dynamic.append(found[2])
            elif found := re.match(r"\.const \.align (\d+) \.b8 (\w+)\[\d+\] = \{(.*)\};", line):
                before = len(self.constant_bytes)
                self.constants[found[2]] = _rounded_up(before, int(found[1]))
                self.constant_bytes += [0] * (self.constants[found[2]] - before) + [*map(int, found[3].split(","))]
        self.shared_bytes = _rounded_up(self.shared_bytes, 16)
        self.shared |= dict.fromkeys(dynamic, self.shared_bytes)

    def _body(self, lines: Sequence[str], first: int) -> Iterator[str]:
        for self.line, line in enumerate(lines, first):
            text = line.partition("//")[0].strip()
            if text in ("{", "}"):
                yield text
            elif found := re.match(r"\$(\w+):$", text):
                yield f"{found[1]}:;"
            elif found := re.match(r"\.reg \.(\w+)\s+%(\w+?)(?:<(\d+)>)?;", text):
                yield _registers(*found.groups())
            elif text and not text.startswith("."):
                yield self._statement(text.rstrip(";"))

    def _statement(self, text: str) -> str:
        found = STATEMENT.match(text)
        try:
            unless, guard, name, operands = found.groups() if found else ("", "", text, "")
            done = self._instruction(name, _split(operands))
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise UnknownInstruction(f"line {self.line}: {text}: tests/emulator/translation.py has no rule") from error
        return f"if ({'!' if unless else ''}{guard}) {{ {done} }}" if guard else done

    def _instruction(self, name: str, operands: list[str]) -> str:
        family = name.partition(".")[0]
        if found := ACCESS.fullmatch(name):
            return self._access(found, operands)
        if found := re.fullmatch(r"ld\.(param|const)\.(\w+)", name):
            target, place = operands
            return f"{_target(target)} = *(const {C_TYPES[found[2]]} *){self._fixed(*found.groups(), place[1:-1])};"
        if family == "mov":
            return self._move(name.removeprefix("mov."), *operands)
        if family in ("ret", "bra", "bar"):
            return self._control(name, *operands)
        return f"{_target(operands[0])} = {self._expression(name, operands[1:])};"

    def _control(self, name: str, place: str = "") -> str:
        """Where the thread goes on, and when."""
        ways = {
            ("ret", ""): "return;",
            ("bra", place): f"goto {place.removeprefix('$')};",
            ("bra.uni", place): f"goto {place.removeprefix('$')};",
            ("bar.sync", "0"): f"barrier({self.line});",
        }
        return ways[name, place]

    def _fixed(self, space: str, kind: str, place: str) -> str:
        """The address of a parameter or of a constant, which no thread writes."""
        if space == "param":
            return f"&parameters[{self.parameters[place]}]"
        return f"constant({self._address(place)}, constants, sizeof constants, {_bytes_of(kind)}, {self.line})"

    def _expression(self, name: str, operands: list[str]) -> str:
        found, expression = next(
            ((found, expression) for rule, expression in RULES if (found := rule.fullmatch(name))), (None, "")
        )
        if found is None or len(operands) != len(set(re.findall(r"\{([abcd])", expression))):
            raise KeyError(name)
        kind = found[1]

        def operand(place: re.Match[str]) -> str:
            return C_TYPES[kind] if place[1] == "T" else self._value(operands["abcd".index(place[1])], place[2] or kind)

        return re.sub(r"\{([abcdT])(?::(\w+))?\}", operand, expression)

    def _move(self, kind: str, target: str, source: str) -> str:
        """Also the bits of a number as another type, and two halves."""
        if source.startswith("{"):
            low, high = (self._value(half, "b32") for half in _split(source[1:-1]))
            whole = f"(uint64_t){high} << 32 | {low}"
            return f"{_target(target)} = {f'double_of({whole})' if target.startswith('%fd') else whole};"
        if target.startswith("{"):
            low, high = map(_target, _split(target[1:-1]))
            whole = self._bits(source)
            return f"{low} = (uint32_t)({whole}), {high} = (uint32_t)(({whole}) >> 32);"
        if kind.startswith("b") and target.startswith("%f"):
            return f"{_target(target)} = {'double' if target.startswith('%fd') else 'float'}_of({self._bits(source)});"
        return f"{_target(target)} = {self._bits(source) if kind.startswith('b') else self._value(source, kind)};"

    def _bits(self, source: str) -> str:
        """A register, or a number, without a type."""
        if source.startswith("%f"):
            return f"bits_of_{'double' if source.startswith('%fd') else 'float'}({_target(source)})"
        return self._value(source, "b64")

    def _access(self, found: re.Match[str], operands: list[str]) -> str:
        """A load or a store of one number, or of a vector of them."""
        action, space, count, kind = found.groups()
        c_type, n = C_TYPES[kind], int(count or 1)
        place, given = operands if action == "st" else operands[::-1]
        numbers = _split(given[1:-1]) if count else [given]
        if len(numbers) != n:
            raise ValueError(given)
        n_bytes, shared, writes = n * _bytes_of(kind), int(space == "shared"), int(action == "st")
        if shared:
            self.shared_item_bytes = min(self.shared_item_bytes, _bytes_of(kind))
        touched = f"touch({self._address(place[1:-1])}, {n_bytes}, {writes}, {shared}, {self.line})"
        if writes:
            stored = " ".join(f"to[{i}] = {self._value(number, kind)};" for i, number in enumerate(numbers))
            return f"{{ {c_type} *to = {touched}; {stored} }}"
        loaded = " ".join(f"{_target(number)} = from[{i}];" for i, number in enumerate(numbers))
        return f"{{ const {c_type} *from = {touched}; {loaded} }}"

    # ---- operands

    def _value(self, text: str, kind: str) -> str:
        """An operand that is read, as a number of a PTX type."""
        if text in SPECIAL:
            return f"({C_TYPES[kind]}){SPECIAL[text]}"
        if text.startswith("%"):
            return f"({C_TYPES[kind]}){_target(text)}" if kind[0] == "s" else _target(text)
        if found := re.fullmatch(r"0([fd])([0-9A-Fa-f]+)", text):
            return f"{'float' if found[1] == 'f' else 'double'}_of(0x{found[2]}{'u' if found[1] == 'f' else 'ull'})"
        if re.fullmatch(r"-?\d+", text):
            return f"({C_TYPES[kind]})UINT64_C({int(text) % 2**64})"
        return self._address(text)

    def _address(self, text: str) -> str:
        """A register or an array of the module, and bytes from there."""
        base, _, distance = text.partition("+")
        if base.startswith("%"):
            start = _target(base)
        elif base in self.constants:
            start = f"(uint64_t)constants + {self.constants[base]}"
        else:
            start = f"launch->shared.start + {self.shared[base]}"
        return f"{start} + {int(distance)}" if distance else start


def _target(register: str) -> str:
    """The variable of a register."""
    found = re.fullmatch(r"%([a-z]+\d+|temp)", register)
    if found is None:
        raise ValueError(register)
    return found[1]


def _split(operands: str) -> list[str]:
    """At commas that are not within braces."""
    return [each.strip() for each in re.split(r",(?![^{]*\})", operands)] if operands else []


def _registers(kind: str, name: str, count: str | None) -> str:
    """Declares `name`, or name1, name2, ..."""
    names = [f"{name}{i}" for i in range(1, int(count))] if count else [name]
    return f"{C_TYPES[kind]} {', '.join(names)};" if names else ""


def _bytes_of(kind: str) -> int:
    return int(kind[1:]) // 8


def _rounded_up(n_bytes: int, step: int) -> int:
    return -(-n_bytes // step) * step
