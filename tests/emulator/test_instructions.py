"""Each instruction, in PTX of its own, against what the PTX ISA says of it."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
import torch

from tests.emulator.machine import Array, Fault, load
from tests.emulator.translation import RULES, UnknownInstruction, translate

MOST, LEAST = 2**63 - 1, -(2**63)
NAN, INF = math.nan, math.inf

REGISTERS = {"f32": "f", "f64": "fd", "pred": "p", "16": "rs", "32": "r", "64": "rd"}
FORMATS = {"f32": "f", "f64": "d", "s16": "h", "u16": "H", "s32": "i", "u32": "I", "s64": "q", "u64": "Q"}

# instruction, types of target and operands, operands, result
CASES: list[tuple[str, str, tuple[Any, ...], Any]] = [
    ("add.s32", "s32 s32 s32", (2**31 - 1, 1), -(2**31)),
    ("add.s64", "s64 s64 s64", (MOST, 1), LEAST),
    ("add.f32", "f32 f32 f32", (2.0**24, 1.0), 2.0**24),
    ("add.rn.f64", "f64 f64 f64", (0.1, 0.2), 0.1 + 0.2),
    ("sub.s64", "s64 s64 s64", (LEAST, 1), MOST),
    ("sub.f64", "f64 f64 f64", (0.3, 0.1), 0.3 - 0.1),
    ("mul.f32", "f32 f32 f32", (4.0, 1e38), INF),
    ("mul.rn.f64", "f64 f64 f64", (0.1, 0.1), 0.1 * 0.1),
    ("mul.lo.s32", "s32 s32 s32", (2**16, 2**15 + 1), -(2**31) + 2**16),
    ("mul.lo.s64", "s64 s64 s64", (2**40, 2**40), 0),
    ("mul.wide.s32", "s64 s32 s32", (-3, 2**30), -3 * 2**30),
    ("mul.wide.u32", "u64 u32 u32", (2**32 - 1, 2**32 - 1), (2**32 - 1) ** 2),
    ("mul.hi.s64", "s64 s64 s64", (-(2**40), 2**40), -(2**16)),
    ("mul.hi.u64", "u64 u64 u64", (2**64 - 1, 2**64 - 1), 2**64 - 2),
    ("mad.lo.s32", "s32 s32 s32 s32", (-3, 5, 7), -8),
    ("fma.rn.f32", "f32 f32 f32 f32", (1 + 2.0**-12, 1 - 2.0**-12, -1.0), -(2.0**-24)),
    ("fma.rn.f64", "f64 f64 f64 f64", (1 + 2.0**-30, 1 - 2.0**-30, -1.0), -(2.0**-60)),
    ("fma.rm.f32", "f32 f32 f32 f32", (1.0, 2.0**-30, 1.0), 1.0),
    ("fma.rm.f32", "f32 f32 f32 f32", (1.0, -(2.0**-30), 1.0), 1 - 2.0**-24),
    ("div.rn.f32", "f32 f32 f32", (1.0, 3.0), np.float32(1) / np.float32(3)),
    ("div.rn.f64", "f64 f64 f64", (1.0, 0.0), INF),
    ("div.s64", "s64 s64 s64", (-7, 2), -3),
    ("div.u32", "u32 u32 u32", (2**32 - 1, 2), 2**31 - 1),
    ("rem.s64", "s64 s64 s64", (-7, 2), -1),
    ("rem.u32", "u32 u32 u32", (7, 4), 3),
    ("rem.u64", "u64 u64 u64", (2**64 - 1, 10), 5),
    ("rcp.rn.f32", "f32 f32", (3.0,), np.float32(1) / np.float32(3)),
    ("rcp.rn.f64", "f64 f64", (3.0,), 1 / 3),
    ("rcp.approx.ftz.f64", "f64 f64", (4.0,), 0.25),
    ("rcp.approx.ftz.f64", "f64 f64", (1e-310,), INF),
    ("sqrt.rn.f32", "f32 f32", (2.0,), np.sqrt(np.float32(2))),
    ("sqrt.rn.f64", "f64 f64", (-1.0,), NAN),
    ("ex2.approx.ftz.f32", "f32 f32", (-3.0,), 0.125),
    ("ex2.approx.ftz.f32", "f32 f32", (-130.0,), 0.0),
    ("abs.f32", "f32 f32", (-1.5,), 1.5),
    ("abs.f64", "f64 f64", (-1.5,), 1.5),
    ("abs.s32", "s32 s32", (-5,), 5),
    ("neg.f32", "f32 f32", (1.5,), -1.5),
    ("neg.f64", "f64 f64", (1.5,), -1.5),
    ("neg.s32", "s32 s32", (-(2**31),), -(2**31)),
    ("neg.s64", "s64 s64", (5,), -5),
    ("min.f32", "f32 f32 f32", (NAN, 1.0), 1.0),
    ("max.f32", "f32 f32 f32", (1.0, NAN), 1.0),
    ("min.f64", "f64 f64 f64", (-1.0, NAN), -1.0),
    ("max.f64", "f64 f64 f64", (-1.0, 2.0), 2.0),
    ("min.f32", "f32 f32 f32", (0.0, -0.0), -0.0),
    ("max.f32", "f32 f32 f32", (0.0, -0.0), 0.0),
    ("min.f64", "f64 f64 f64", (-0.0, 0.0), -0.0),
    ("max.f64", "f64 f64 f64", (-0.0, 0.0), 0.0),
    ("min.s64", "s64 s64 s64", (-1, 1), -1),
    ("min.s32", "s32 s32 s32", (-1, 1), -1),
    ("max.s64", "s64 s64 s64", (-1, 1), 1),
    ("max.s32", "s32 s32 s32", (-1, 1), 1),
    ("and.b16", "u16 u16 u16", (12, 10), 8),
    ("and.b32", "u32 u32 u32", (12, 10), 8),
    ("or.b64", "u64 u64 u64", (12, 10), 14),
    ("xor.b32", "u32 u32 u32", (12, 10), 6),
    ("not.b64", "u64 u64", (0,), 2**64 - 1),
    ("not.b32", "u32 u32", (1,), 2**32 - 2),
    ("shl.b32", "u32 u32 u32", (3, 31), 2**31),
    ("shl.b32", "u32 u32 u32", (3, 32), 0),
    ("shl.b64", "u64 u64 u32", (3, 63), 2**63),
    ("shr.u32", "u32 u32 u32", (2**31, 31), 1),
    ("shr.u64", "u64 u64 u32", (2**63, 64), 0),
    ("shr.s32", "s32 s32 u32", (-8, 1), -4),
    ("shr.s64", "s64 s64 u32", (-8, 100), -1),
    ("bfi.b64", "u64 u64 u64 u32 u32", (0b1111, 0, 2, 3), 0b11100),
    ("bfi.b64", "u64 u64 u64 u32 u32", (5, 2**64 - 1, 32, 32), (5 << 32) + 2**32 - 1),
    ("cvt.u32.u64", "u32 u64", (2**40 + 7,), 7),
    ("cvt.u64.u32", "u64 u32", (2**32 - 1,), 2**32 - 1),
    ("cvt.s64.s32", "s64 s32", (-7,), -7),
    ("cvt.u16.u64", "u16 u64", (65537,), 1),
    ("cvt.u64.u16", "u64 u16", (65535,), 65535),
    ("cvt.rn.f32.s32", "f32 s32", (2**24 + 1,), 2.0**24),
    ("cvt.rn.f32.s64", "f32 s64", (-3,), -3.0),
    ("cvt.rn.f32.f64", "f32 f64", (0.1,), np.float32(0.1)),
    ("cvt.rn.f64.s64", "f64 s64", (MOST,), 2.0**63),
    ("cvt.f64.f32", "f64 f32", (0.5,), 0.5),
    ("cvt.rzi.s64.f64", "s64 f64", (-2.9,), -2),
    ("cvt.rzi.s64.f64", "s64 f64", (1e30,), MOST),
    ("cvt.rzi.s64.f64", "s64 f64", (-INF,), LEAST),
    ("cvt.rzi.s64.f64", "s64 f64", (NAN,), LEAST),
    ("cvt.sat.f32.f32", "f32 f32", (1.5,), 1.0),
    ("cvt.sat.f32.f32", "f32 f32", (0.5,), 0.5),
    ("cvt.sat.f32.f32", "f32 f32", (NAN,), 0.0),
    ("cvta.to.global.u64", "u64 u64", (12345,), 12345),
    ("mov.b32", "u32 f32", (1.0,), 0x3F800000),
    ("mov.b32", "f32 u32", (0x3F800000,), 1.0),
    ("mov.b64", "u64 f64", (1.0,), 0x3FF << 52),
    ("mov.b64", "f64 u64", (0x3FF << 52,), 1.0),
    ("mov.f64", "f64 f64", (0.1,), 0.1),
    ("mov.u32", "u32 u32", (7,), 7),
]  # fmt: skip


def register(kind: str, number: int) -> str:
    """Of a PTX type: by its size, as NVVM names them."""
    return f"%{REGISTERS.get(kind) or REGISTERS[kind[1:]]}{number}"


def declared() -> str:
    kinds = {"p": "pred", "rs": "b16", "r": "b32", "rd": "b64", "f": "f32", "fd": "f64"}
    return "\n".join(f".reg .{kind} %{name}<20>;" for name, kind in kinds.items())


def module(body: str, parameters: list[str]) -> str:
    """A kernel that loads its parameters to registers 1, 2, ... of their types; the address `out` to %rd15."""
    names = [f"\t.param .{kind} p_{i}" for i, kind in enumerate([*parameters, "u64"])]
    loads = [f"ld.param.{kind} {register(kind, i + 1)}, [p_{i}];" for i, kind in enumerate(parameters)]
    head = ",\n".join(names)
    lines = "\n".join([*loads, f"ld.param.u64 %rd15, [p_{len(parameters)}];", body, "ret;"])
    return f".visible .entry test(\n{head}\n)\n{{\n{declared()}\n{lines}\n}}"


def run(body: str, kinds: list[str], operands: tuple[Any, ...], out: torch.Tensor) -> None:
    parameters = [struct.pack(FORMATS[kind], value) for kind, value in zip(kinds, operands, strict=True)]
    array = Array(out.data_ptr(), out.numel() * out.element_size(), out.element_size())
    pointer = struct.pack("Q", out.data_ptr())
    load(module(body, kinds), "test").launch(1, 1, [*parameters, pointer], [array])


def result_of(instruction: str, target: str, kinds: list[str], operands: tuple[Any, ...]) -> Any:
    """What the instruction leaves in a register of type `target`."""
    out = torch.full((1,), 99, dtype=torch.int64)
    names = ", ".join(register(kind, i + 1) for i, kind in enumerate(kinds))
    end = register(target, 10)
    store = f"st.global.{'u' + target[1:] if target[0] != 'f' else target} [%rd15], {end};"
    run(f"{instruction} {end}, {names};\n{store}", kinds, operands, out)
    return struct.unpack_from(FORMATS[target], out.numpy().tobytes())[0]


@pytest.mark.parametrize(("instruction", "kinds", "operands", "expected"), CASES)
def test_instruction(instruction: str, kinds: str, operands: tuple[Any, ...], expected: Any) -> None:
    target, *of_operands = kinds.split()
    found = result_of(instruction, target, of_operands, operands)
    np.testing.assert_array_equal(found, expected)
    assert math.isnan(expected) or np.signbit(found) == np.signbit(expected)


ORDER = {"lt": {-1}, "le": {-1, 0}, "gt": {1}, "ge": {0, 1}, "eq": {0}, "ne": {-1, 1}}


@pytest.mark.parametrize("name", [*ORDER, *(f"{name}u" for name in ORDER)])
@pytest.mark.parametrize("kind", ["f32", "f64", "s32", "u64"])
def test_comparison(kind: str, name: str) -> None:
    """With a NaN only the unordered ones hold; a sign is not a large number."""
    if kind[0] != "f" and name.endswith("u"):
        with pytest.raises(UnknownInstruction, match=f"setp.{name}.{kind}"):
            translate(module(f"setp.{name}.{kind} %p1, {register(kind, 1)}, {register(kind, 2)};", [kind, kind]))
        return
    pairs: list[tuple[Any, Any]] = [(1, 2), (2, 2), (2, 1)]
    expected = [order in ORDER[name.removesuffix("u")] for order in (-1, 0, 1)]
    if kind[0] == "f":
        pairs, expected = [*pairs, (NAN, 1.0), (NAN, NAN)], [*expected, name.endswith("u"), name.endswith("u")]
    if kind == "s32":
        pairs, expected = [*pairs, (-1, 1)], [*expected, expected[0]]
    for pair, holds in zip(pairs, expected, strict=True):
        out = torch.zeros(1, dtype=torch.int64)
        body = (
            f"setp.{name}.{kind} %p1, {register(kind, 1)}, {register(kind, 2)};\n"
            "selp.u64 %rd10, 5, 3, %p1;\nst.global.u64 [%rd15], %rd10;"
        )
        run(body, [kind, kind], pair, out)
        assert out.item() == (5 if holds else 3), pair


def test_predicates() -> None:
    """and, or, xor, not of them, and instructions that wait for one."""
    out = torch.zeros(4, dtype=torch.int64)
    body = """setp.eq.s64 %p1, %rd1, 1;
    setp.eq.s64 %p2, %rd1, 2;
    or.pred %p3, %p1, %p2;
    and.pred %p4, %p1, %p2;
    xor.pred %p5, %p3, %p4;
    not.pred %p6, %p5;
    mov.pred %p7, %p6;
    @%p3 st.global.u64 [%rd15], %rd1;
    @%p4 st.global.u64 [%rd15+8], %rd1;
    @!%p4 st.global.u64 [%rd15+16], %rd1;
    @%p7 bra $end;
    st.global.u64 [%rd15+24], %rd1;
    $end:"""
    run(body, ["s64"], (1,), out)
    assert out.tolist() == [1, 0, 1, 1]


def test_halves() -> None:
    """Of a float64, and back with another sign."""
    out = torch.zeros(1, dtype=torch.float64)
    body = """mov.b64 {%r1, %r2}, %fd1;
    {
    .reg .b32 %temp;
    mov.b64 {%temp, %r3}, %fd1;
    }
    xor.b32 %r4, %r3, -2147483648;
    mov.b64 %fd2, {%r1, %r4};
    st.global.f64 [%rd15], %fd2;"""
    run(body, ["f64"], (math.pi,), out)
    assert out.item() == -math.pi


def test_numbers_in_the_text() -> None:
    out = torch.zeros(3, dtype=torch.float64)
    body = """mov.f32 %f2, 0f3FC00000;
    cvt.f64.f32 %fd2, %f2;
    mov.f64 %fd3, 0dFFF0000000000000;
    mov.u64 %rd2, -9223372036854775808;
    cvt.rn.f64.s64 %fd4, %rd2;
    st.global.f64 [%rd15], %fd2;
    st.global.f64 [%rd15+8], %fd3;
    st.global.f64 [%rd15+16], %fd4;"""
    run(body, [], (), out)
    assert out.tolist() == [1.5, -INF, -(2.0**63)]


def test_vectors_in_shared_memory() -> None:
    out = torch.zeros(2, dtype=torch.float64)
    body = """st.shared.v2.f64 [numbers], {%fd1, %fd2};
    ld.shared.v2.f64 {%fd4, %fd3}, [numbers];
    st.global.f64 [%rd15], %fd3;
    st.global.f64 [%rd15+8], %fd4;"""
    text = ".visible .shared .align 16 .b8 numbers[16];\n" + module(body, ["f64", "f64"])
    array = Array(out.data_ptr(), 16, 8)
    words = [struct.pack("d", 1.0), struct.pack("d", 2.0), struct.pack("Q", out.data_ptr())]
    load(text, "test").launch(1, 1, words, [array])
    assert out.tolist() == [2, 1]


def test_vectors_are_aligned() -> None:
    text = ".visible .shared .align 16 .b8 numbers[32];\n" + module(
        "st.shared.v2.f64 [numbers+8], {%fd1, %fd1};", ["f64"]
    )
    with pytest.raises(
        Fault, match=r"test: thread 0 of block 0 writes at an address that is not aligned, byte 8 of sh"
    ):
        load(text, "test").launch(1, 1, [bytes(8), bytes(8)], [])


def test_every_rule_has_a_case() -> None:
    """Comparisons and predicates have tests of their own."""
    names = [instruction for instruction, *_ in CASES]
    without = [rule.pattern for rule, _ in RULES if not any(rule.fullmatch(name) for name in names)]
    assert [pattern for pattern in without if not pattern.startswith(("setp", "selp", r"not\.(pred)"))] == []


@pytest.mark.parametrize(
    "line",
    [
        "shfl.sync.bfly.b32 %r1, %r2, %r3, 31, -1;", "add.bf16 %r1, %r2, %r3;", "bar.sync 1;", "mov.u32 %r1, %clock;",
        "trap;", "membar.gl;", "mul.f32 %f1, %f2, %f3, %f4;", "mul.f32 %f1, %f2;",
    ],
)  # fmt: skip
def test_what_is_not_known_is_an_error(line: str) -> None:
    with pytest.raises(UnknownInstruction, match=r"line \d+: .*tests/emulator/translation.py has no rule"):
        translate(module(line, []))
