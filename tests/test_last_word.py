"""The result of a trial in what real programs print: the last word, or none at all.

A table of outputs, each with what a careful reader would say it means.
"""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from telescope.foreign.outcome import CurveRows, Prices, as_result
from telescope.foreign.output import LONGEST_LINE, NoResult, read_output, tail
from telescope.losses import as_number, in_text, judged
from telescope.records import Point, Status, Trial

EARLIER = '{"step": 50, "loss": 1.9}\n'
RESULT = '{"step": 100, "loss": 1.7}'


def read(folder: Path, text: str | bytes) -> dict[str, Any]:
    """The verdict of an output."""
    out = folder / "x.out"
    out.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_output(out, None)[0]


def ended(said: dict[str, Any]) -> tuple[Status, float | None, str]:
    trial, notes = Trial(32, Point.of(lr=0.1), 0), list[str]()
    result = as_result(trial, said, Prices(), seconds=1, curve=CurveRows(), note=notes.append)
    return result.status, result.loss, result.reason


NOT_FINITE = [
    *("nan", "NaN", "NAN", "-nan", "+NaN", "nan(0x1)", "-nan(ind)", "1.#QNAN", "-1.#IND0"),
    *("inf", "-inf", "+inf", "Inf", "INF", "Infinity", "-Infinity", "+infinity", "INFINITY"),
    *("1.#INF", "null", "NULL", "None", "1e999", "-1e999", "9" * 400, "9" * 5000),
]


@pytest.mark.parametrize("quote", ["", '"'])
@pytest.mark.parametrize("word", NOT_FINITE, ids=lambda word: word[:20])
def test_what_is_not_finite_is_a_divergence_in_any_spelling(
    word: str, quote: str, tmp_path: Path
) -> None:
    line = f'{{"step": 100, "loss": {quote}{word}{quote}, "note": "nan, inf"}}\n'
    said = read(tmp_path, EARLIER + line)
    assert (said["step"], said["note"]) == (100, "nan, inf")
    status, loss, reason = ended(said)
    assert (status, loss) == (Status.DIVERGED, None)
    assert reason in ("loss nan", "loss inf", "loss -inf", "loss null")


@pytest.mark.parametrize(
    "line",
    [
        RESULT,
        f"{RESULT},",
        f"{RESULT}\r",
        f"\ufeff{RESULT}",
        f"[rank0]:{RESULT}",
        f"[rank0]: {RESULT}",
        f"0: {RESULT}",
        f"[1,0]<stdout>:{RESULT}",
        f"[1,0]<stdout>:[rank0]: 2024-05-01 12:00:00,123 INFO root - {RESULT}",
        f"2024-05-01,INFO,{RESULT}",
        f"(RayTrainWorker pid=3, ip=10.0.0.1) {RESULT}",
        f'{{worker 3}} {RESULT} [took {{"x"}}]',
        f"\x1b[32m{RESULT}\x1b[0m",
        f"\x1b[36m(f pid=1)\x1b[0m {RESULT}\x1b[K",
        '\x1b[1m{"step": 100, "loss": \x1b[32m1.7\x1b[0m}',
        f"  5%|█    | 5/100 [00:01<00:20]\r100%|████| 100/100 [00:20<00:00]\r{RESULT}",
        f"100%|████| 100/100 [00:20<00:00, 5.00it/s]{RESULT}",
        f"{RESULT}\r100%|████|\r",
        f" 5/10 [=>..] - loss: 1.7\b\b\b\b\b\b{RESULT}",
        f"loss=9.0 val_loss=8 {RESULT} (20 s)",
        f'{{"loss": 3}} {RESULT}',
        f'{{"loss": 3}}{RESULT}{{"event": "saved"}}',
        f"{RESULT}  # done",
        '{"step": 100, "loss": 1.7,}',
        '{"step": 100, "loss": 1.7, "best": nan, "ok": True}',
        '{"step": 100, "note": "\x01 \\" \\\\", "loss": 1.7}',
        f'{RESULT}\nTraining done, final loss: 1.9\n"loss" was best\nsee {{config}}',
        f'{RESULT}\n{{"val_loss": 2.0}}\n{{"event": "saved", "path": "loss.png"}}',
        f"{RESULT}\n{{broken\nuse 'loss' or \"loss\"",
        f'{RESULT}\n{{"wandb": {{"run": 3',  # of several lines
        f"{RESULT}\n{'x' * 2_000_000}",
        f"{RESULT}\n{'{' * 100_000}",
    ],
)
def test_what_launchers_and_bars_put_around_a_result(line: str, tmp_path: Path) -> None:
    end = "" if line.startswith("0: ") else "\n"
    assert ended(read(tmp_path, EARLIER + line + end)) == (Status.COMPLETE, 1.7, "")


def test_bytes_that_are_no_utf_8(tmp_path: Path) -> None:
    line = b'caf\xe9 {"name": "caf\xe9", "loss": 1.7}\n'
    assert ended(read(tmp_path, line)) == (Status.COMPLETE, 1.7, "")
    assert ended(read(tmp_path, b"\xef\xbb\xbf" + RESULT.encode())) == (Status.COMPLETE, 1.7, "")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"step": 100, "loss": garbage}\n', 'cut off or garbled: {"step": 100, "loss": garbage}'),
        ('{"step": 100, "loss": \n', "cut off or garbled"),
        ('{"step": 100, "loss": 1.\n', "cut off or garbled"),
        ('{"step": 100, "loss": 1.7', "cut off or garbled"),
        ('{"step": 100, "loss"\n', "cut off or garbled"),
        ('{"step": 100, "lo\n', "cut off or garbled"),
        ('{"step": 100, "lo', "cut off or garbled"),
        ('{"step"', "cut off or garbled"),
        ('{"step": 100, "lo[rank1]: a warning\nss": nan}\n', "begins as a result and is garbled"),
        ('{"a": [1, "loss": 2}\n', "cut off or garbled"),
        ('{"step": 100, "loss": 1.7{"step": 100, "loss": 1.7}}\n', "cut off or garbled"),
        ('{"loss": x, "best": {"loss": 1.7}}\n', "cut off or garbled"),
        ("{'step': 100, 'loss': nan}\n", "double quotes; use json.dumps"),
        ("{'status': 'diverged'}\n", "double quotes; use json.dumps"),
        ('{"status": "diverged", "reason": x}\n', "cut off or garbled"),
        ('{"loss": 1.5} {"loss": \n', "cut off or garbled"),
        ('"loss": 1.7\n', "no whole JSON object with it on one line"),
        ('"loss": 1.7, "more": {\n', "no whole JSON object with it on one line"),
        ('{\n  "step": 100,\n  "loss": 1.7\n}\n', "no whole JSON object with it on one line"),
        ('{\\"step\\": 100, \\"loss\\": 1.7}\n', "no whole JSON object with it"),
        ('[{"loss": 2.0}, {"loss": 1.7}]\n', "part of something larger; print it alone"),
        ('"best": {"loss": 1.7}, "step": 100}\n', "part of something larger"),
        ('{"eval": {"loss": 1.7}}\n', "inside another key; print it at the top"),
        ('{"history": [{"loss": 2.0}, {"loss": 1.7}]}\n', "inside another key"),
        (f'{{"x": "{"y" * LONGEST_LINE}", "loss": 1.7}}\n', "bytes, at most 1048576 are read"),
        (f'{"." * 10_000_000}{{"loss": 1.7}}\n', "bytes, at most 1048576 are read"),
        (f'{{"loss": 1.7, "x": "{"y" * 10_000_000}"}}', "bytes, at most 1048576 are read"),
    ],
    ids=lambda text: text[:40],
)
def test_a_last_word_that_cannot_be_read_is_none_and_no_earlier_one(
    line: str, why: str, tmp_path: Path
) -> None:
    for before in ("", EARLIER):
        if "begins as" in why and not before:
            continue
        with pytest.raises(NoResult) as caught:
            read(tmp_path, before + line)
        text = str(caught.value)
        assert text.startswith("no result: the last line of stdout on a loss cannot be read: ")
        assert why in text
        assert "\n" not in text
        assert len(text) < 500
    # A later line that can be read is the last word again.
    if line.endswith("\n"):
        assert ended(read(tmp_path, EARLIER + line + RESULT)) == (Status.COMPLETE, 1.7, "")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_refused_in_words(encoding: str, tmp_path: Path) -> None:
    with pytest.raises(NoResult, match=r"UTF-16 text has; print UTF-8: .*loss"):
        read(tmp_path, f"starting\r\n{RESULT}\r\n".encode(encoding))
    with pytest.raises(NoResult, match="UTF-16 text has"):
        read(tmp_path, EARLIER.encode() + f"{RESULT}\r\n".encode(encoding))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", r'stdout has no JSON line; expected \{"loss": 2\.31\}, or \{"status": "diverged"\}$'),
        ("one\n two\x1b[0m \n\n", "no JSON line; expected .*; it ends with 'two'"),
        ("a\rb\rc\r\n", "no JSON line; expected .*; it ends with 'c'"),
        ('{"val_loss": 2.0}\n', r"no line such as .*; the last has val_loss: call the result loss"),
        ('{"acc": 1}\nbye\n', "has JSON, but no line such as .*; it ends with 'bye'"),
    ],
)
def test_no_word_at_all_shows_the_end_of_the_output(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(NoResult, match=f"^no result: .*{reason}"):
        read(tmp_path, text)


@pytest.mark.parametrize("loss", ["true", "[1.9]", '"low"', '"1_0"', '""', '{"x": 1}', '"0x10"'])
def test_a_loss_that_is_no_number_is_never_an_earlier_one(loss: str, tmp_path: Path) -> None:
    said = read(tmp_path, f'{EARLIER}{{"loss": {loss}}}\n')
    with pytest.raises(ValueError, match=r"has loss .*, must be a number"):
        ended(said)


def test_a_number_in_quotes_is_taken_with_a_note(tmp_path: Path) -> None:
    trial, notes = Trial(32, Point.of(lr=0.1), 0), list[str]()
    said = read(tmp_path, '{"loss": "1.9"}')
    result = as_result(trial, said, Prices(), seconds=1, curve=CurveRows(), note=notes.append)
    assert result.loss == 1.9
    assert "the quotes of loss '1.9': taken as the number that they hold" in notes[0]


def test_a_result_file_is_read_alike(tmp_path: Path) -> None:
    out, file = tmp_path / "x.out", tmp_path / "r.json"
    out.write_text(EARLIER)
    for text, loss in (
        ('{\n "loss":\n nan\n}\n', None),
        (f"{EARLIER}{RESULT}\n", 1.7),
        (json.dumps({"loss": 1.7, "curve": list(range(400_000))}, indent=1), 1.7),
    ):
        file.write_text(text)
        assert ended(read_output(out, file)[0])[1] == loss
    for text, why in (
        (f'{EARLIER}{{"step": 100, "lo', "of .*r.json on a loss cannot be read: it is cut off"),
        ('{"loss": 1.9}\n{"step": 100, "lo', "cannot be read: it is cut off"),
        ("", "r.json has no JSON line"),
    ):
        file.write_text(text)
        with pytest.raises(NoResult, match=why):
            read_output(out, file)


def test_a_word_across_two_reads_and_a_long_line_take_no_memory(tmp_path: Path) -> None:
    out = tmp_path / "x.out"
    with out.open("wb") as file:
        for _ in range(60):
            file.write(b"x" * 999_983)
        file.write(b'"lo')
        file.write(b'ss": 3\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(NoResult, match=r"it has 59998989 bytes, at most"):
        read_output(out, None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # kB


def test_the_tail_is_what_a_terminal_shows(tmp_path: Path) -> None:
    out = tmp_path / "x.err"
    out.write_text("\x1b[31mred\x1b[0m\n\n 1%\r 50%\r100%\r\nlast")
    assert tail(out) == ["red", "100%", "last"]
    assert tail(tmp_path / "none") == []


@given(some.floats(), some.sampled_from([repr, str.upper, str.title, "{:+}".format]))
def test_every_float_is_read_back(value: float, spell: Any) -> None:
    text = spell(value) if spell in (repr, "{:+}".format) else spell(repr(value))
    number = in_text(text)
    assert number is not None
    assert number == value or (math.isnan(number) and math.isnan(value))
    status, loss, _ = judged(text)
    assert (status is Status.COMPLETE) == math.isfinite(value) == (loss is not None)


@given(some.text())
def test_a_text_is_a_number_only_if_python_says_so(text: str) -> None:
    if as_number(text) is None and in_text(text) is not None:
        lowered = text.strip().lower()
        assert "nan" in lowered or "inf" in lowered or float(text) == in_text(text)
