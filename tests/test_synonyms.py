"""The names that Muon's scales have elsewhere, as docs/width-rules.md has them, cell by cell."""

from __future__ import annotations

import itertools
import math
import re

import pytest
from conftest import ROOT
from torch.optim import _muon

from telescope.rules.scaling import Role, scaling

D0 = 64
SHAPES = {"1:1": (1, 1), "4:1": (4, 1), "1:4": (1, 4)}
SCALES = {
    "0.2·√max(out,in)": lambda out, in_: 0.2 * math.sqrt(max(out, in_)),
    "√max(out,in)": lambda out, in_: math.sqrt(max(out, in_)),
    "√(out/in)": lambda out, in_: math.sqrt(out / in_),
    "√max(1,out/in)": lambda out, in_: math.sqrt(max(1, out / in_)),
}


def table() -> list[list[str]]:
    """The rows of the table below the sentence about the word."""
    text = (ROOT / "docs" / "width-rules.md").read_text()
    part = text[text.index("| scale elsewhere |") :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()[2:]]


def value_of(cell: str, ratio: str, r: float) -> float:
    """A cell's number for matrices of one ratio: of several, the one that names it."""
    first, *others = cell.split("; ")
    named = dict(other.split(" matrices ") for other in others)
    text = named.get(ratio, first).replace("₀", "0").replace("·", "*").replace("√d0", str(D0**0.5))
    return float(eval(text.replace("√r", str(r**0.5)), {"__builtins__": {}}))


def factor(scale: str, rule: str, ratio: str, r: int) -> float:
    """Our step over theirs, per unit of lr."""
    base = tuple(side * D0 for side in SHAPES[ratio])
    shape = (base[0] * r, base[1] * r)
    ours = scaling(Role.HIDDEN, shape, base, optimizer="muon", rule=rule).lr
    return ours / SCALES[scale](*shape)


ROWS = [pytest.param(row, id=row[0]) for row in table()]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("column", "rule"), [(2, "moonlight"), (3, "mup")])
def test_a_cell_is_our_step_over_theirs(row: list[str], column: int, rule: str) -> None:
    scale, cell = row[0], row[column]
    cases = list(itertools.product(SHAPES, (1, 2, 8)))
    if cell == "by shape":
        assert len({round(factor(scale, rule, ratio, 8), 9) for ratio in SHAPES}) > 1
        return
    for ratio, r in cases:
        assert value_of(cell, ratio, r) == pytest.approx(factor(scale, rule, ratio, r), rel=1e-9)


def test_the_table_has_every_scale_once() -> None:
    assert [row[0] for row in table()] == list(SCALES)


@pytest.mark.parametrize("row", ROWS)
def test_the_names_of_torch_are_the_scales_beside_them(row: list[str]) -> None:
    """`torch.optim.Muon`'s own function, where this version of torch has the name."""
    for name in re.findall(r"torch's `(\w+)`(?! \(2\.14\))", row[1]):
        for out, in_ in ((64, 64), (256, 64), (64, 256)):
            theirs = _muon._adjust_lr(1.0, name, (out, in_))  # type: ignore[arg-type]
            assert theirs == pytest.approx(SCALES[row[0]](out, in_))


def test_the_scale_without_the_factor_is_five_times_ours() -> None:
    """Megatron's `spectral`, of which moonlight is a fifth."""
    (row,) = (row for row in table() if "`spectral`" in row[1])
    assert row[0] == "√max(out,in)"
    assert 1 / factor(row[0], "moonlight", "1:4", 2) == pytest.approx(5)


def test_the_unit_rms_norm_is_mup_but_for_a_constant_of_each_base_shape() -> None:
    """However the sides grow; the constants of the base shapes are not alike."""
    constants = {}
    for base in ((64, 64), (256, 64), (64, 256)):
        found = [
            scaling(Role.HIDDEN, shape, base, optimizer="muon", rule="mup").lr
            / math.sqrt(shape[0] / shape[1])
            for grown in ((1, 1), (2, 2), (8, 8), (2, 8), (8, 3))
            for shape in [(base[0] * grown[0], base[1] * grown[1])]
        ]
        assert found == pytest.approx([found[0]] * len(found))
        constants[base] = found[0]
    assert constants[64, 256] == pytest.approx(4 * constants[64, 64])
    assert constants[256, 64] == pytest.approx(constants[64, 64])
