"""The polynomials of Newton–Schulz, by name; standard library only."""

from __future__ import annotations

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic with a steep slope at zero. Source: Keller Jordan's Muon, as in torch."""
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""A quintic per step, the last for all further ones. Source: arXiv 2505.16932, Algorithm 1.

From singular values in [1e-3, 1] five steps end in [0.84, 1.13] and six in [0.99, 1.01], headroom
included; Jordan's five in [0.47, 1.21] (`tests/test_muon.py`)."""
POLAR_EXPRESS_HEADROOM = 1.01
"""Room for rounding: a singular value above 1 makes the quintics diverge. Source: as above."""
NS_EPS = 1e-7
"""Lower bound of the norm that a matrix is divided by, as in torch."""


def quintics(ns: str, steps: int) -> list[tuple[float, float, float]]:
    """Return (a, b, c) of each Newton–Schulz step: x ← a·x + b·x³ + c·x⁵ on the singular values.

    Args:
        ns: "jordan", the same quintic at every step, or "polar-express".
        steps: number of steps.

    >>> quintics("jordan", 2)
    [(3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315)]
    """
    if ns == "jordan":
        return [NS_COEFFICIENTS] * steps
    last, room = POLAR_EXPRESS[-1], POLAR_EXPRESS_HEADROOM
    steep = [(a / room, b / room**3, c / room**5) for a, b, c in POLAR_EXPRESS[:-1]]
    return [*steep, *([last] * steps)][:steps]
