"""Coefficients of the polynomials of exp, log, sin and cos that every backend evaluates.

``exp(r) = 1 + r + r² q(r)`` on ``|r| ≤ ln 2 / 2`` and ``log(1 + f) = 2 s + s z p(z)`` with ``s = f / (2 + f)``,
``z = s²`` on ``√½ ≤ 1 + f ≤ √2`` (the range reduction of fdlibm's ``e_log.c``). For angles in quarter turns,
``sin(πr/2) = r s(z)`` and ``cos(πr/2) = 1 + z c(z)`` with ``z = r²`` on ``|r| ≤ ½``. ``q``, ``p``, ``s`` and ``c`` are
Chebyshev interpolants; ``tests/kernels/test_polynomials.py`` fits them again with mpmath and compares, and holds the C
header of the Cython backend to these numbers. ``LN2_HIGH`` has so many trailing zero bits that ``n · LN2_HIGH`` is
exact for every exponent ``n``.

Where registers hold a table of ``2^(j/S)``, j < S (AVX-512), ``exp`` is reduced to ``|r| ≤ ln 2 / (2 S)`` and its ``q``
is shorter: `EXP_STEPS` is S, `EXP_TABLE` the table, `EXP_OF_A_STEP` that q.

Highest degree first, one tuple per arithmetic dtype.
"""

from __future__ import annotations

from typing import Final

EXP: Final[dict[str, tuple[float, ...]]] = {
    "float64": tuple(
        map(
            float.fromhex,
            (
                "0x1.af389ecfc4b9cp-26",
                "0x1.28917c89a43a7p-22",
                "0x1.71de0db2f6b19p-19",
                "0x1.a019b9149a41cp-16",
                "0x1.a01a01a7c2efep-13",
                "0x1.6c16c17889ef1p-10",
                "0x1.11111111109b5p-7",
                "0x1.5555555553d68p-5",
                "0x1.5555555555556p-3",
                "0x1.0000000000001p-1",
            ),
        )
    ),
    "float32": tuple(
        map(
            float.fromhex,
            ("0x1.6d10fcp-10", "0x1.120b62p-7", "0x1.55551ap-5", "0x1.5554dep-3", "0x1.000000p-1"),
        )
    ),
}

EXP_STEPS: Final = {"float64": 16, "float32": 32}
EXP_OF_A_STEP: Final[dict[str, tuple[float, ...]]] = {
    "float64": tuple(
        map(
            float.fromhex,
            (
                "0x1.6c17bb51f236dp-10",
                "0x1.11120af701debp-7",
                "0x1.55555555194d2p-5",
                "0x1.55555554dd44dp-3",
                "0x1.0000000000000p-1",
            ),
        )
    ),
    "float32": tuple(map(float.fromhex, ("0x1.555596p-3", "0x1.000052p-1"))),
}
EXP_TABLE: Final[dict[str, tuple[float, ...]]] = {
    "float64": tuple(
        map(
            float.fromhex,
            (
                "0x1.0000000000000p+0",
                "0x1.0b5586cf9890fp+0",
                "0x1.172b83c7d517bp+0",
                "0x1.2387a6e756238p+0",
                "0x1.306fe0a31b715p+0",
                "0x1.3dea64c123422p+0",
                "0x1.4bfdad5362a27p+0",
                "0x1.5ab07dd485429p+0",
                "0x1.6a09e667f3bcdp+0",
                "0x1.7a11473eb0187p+0",
                "0x1.8ace5422aa0dbp+0",
                "0x1.9c49182a3f090p+0",
                "0x1.ae89f995ad3adp+0",
                "0x1.c199bdd85529cp+0",
                "0x1.d5818dcfba487p+0",
                "0x1.ea4afa2a490dap+0",
            ),
        )
    ),
    "float32": tuple(
        map(
            float.fromhex,
            (
                "0x1.000000p+0",
                "0x1.059b0ep+0",
                "0x1.0b5586p+0",
                "0x1.11301ep+0",
                "0x1.172b84p+0",
                "0x1.1d4874p+0",
                "0x1.2387a6p+0",
                "0x1.29e9e0p+0",
                "0x1.306fe0p+0",
                "0x1.371a74p+0",
                "0x1.3dea64p+0",
                "0x1.44e086p+0",
                "0x1.4bfdaep+0",
                "0x1.5342b6p+0",
                "0x1.5ab07ep+0",
                "0x1.6247ecp+0",
                "0x1.6a09e6p+0",
                "0x1.71f75ep+0",
                "0x1.7a1148p+0",
                "0x1.82589ap+0",
                "0x1.8ace54p+0",
                "0x1.93737cp+0",
                "0x1.9c4918p+0",
                "0x1.a5503cp+0",
                "0x1.ae89fap+0",
                "0x1.b7f770p+0",
                "0x1.c199bep+0",
                "0x1.cb720ep+0",
                "0x1.d5818ep+0",
                "0x1.dfc974p+0",
                "0x1.ea4afap+0",
                "0x1.f50766p+0",
            ),
        )
    ),
}

LOG: Final[dict[str, tuple[float, ...]]] = {
    "float64": tuple(
        map(
            float.fromhex,
            (
                "0x1.2b584aae78a57p-3",
                "0x1.39fe606542ddep-3",
                "0x1.7462b4ab2ef6bp-3",
                "0x1.c71c62e5800a1p-3",
                "0x1.2492492df148dp-2",
                "0x1.99999999952e2p-2",
                "0x1.5555555555558p-1",
            ),
        )
    ),
    "float32": tuple(map(float.fromhex, ("0x1.2ee610p-2", "0x1.997c30p-2", "0x1.55555cp-1"))),
}

SIN: Final[dict[str, tuple[float, ...]]] = {
    "float64": tuple(
        map(
            float.fromhex,
            (
                "0x1.e3f38399551bfp-25",
                "-0x1.e30071afc3e59p-19",
                "0x1.50782fda12d96p-13",
                "-0x1.32d2cce2e5b19p-8",
                "0x1.466bc677587f8p-4",
                "-0x1.4abbce625be41p-1",
                "0x1.921fb54442d18p+0",
            ),
        )
    ),
    "float32": tuple(map(float.fromhex, ("-0x1.2d9b40p-8", "0x1.465ec4p-4", "-0x1.4abbbap-1", "0x1.921fb6p+0"))),
}

COS: Final[dict[str, tuple[float, ...]]] = {
    "float64": tuple(
        map(
            float.fromhex,
            (
                "-0x1.b2f3eb054afcdp-28",
                "0x1.f9ce245cada0bp-22",
                "-0x1.a6d1eef479be1p-16",
                "0x1.e1f5068688d5bp-11",
                "-0x1.55d3c7e3cb241p-6",
                "0x1.03c1f081b5ac0p-2",
                "-0x1.3bd3cc9be45dep+0",
            ),
        )
    ),
    "float32": tuple(map(float.fromhex, ("0x1.db6492p-11", "-0x1.55cb98p-6", "0x1.03c1eap-2", "-0x1.3bd3ccp+0"))),
}

LOG2_E: Final = {"float64": float.fromhex("0x1.71547652b82fep+0"), "float32": float.fromhex("0x1.715476p+0")}
LN2_HIGH: Final = {"float64": float.fromhex("0x1.62e42fee00000p-1"), "float32": float.fromhex("0x1.62e000p-1")}
LN2_LOW: Final = {"float64": float.fromhex("0x1.a39ef35793c76p-33"), "float32": float.fromhex("0x1.0bfbe8p-15")}

# Below this argument exp returns 0: the smallest normal number, so that no subnormal is ever produced.
EXP_UNDERFLOW: Final = {"float64": -708.0, "float32": -87.0}
