"""More than a hundred malformed inputs: one line, exit code 2, and nothing written.

Those written down here are what people get wrong; hypothesis adds what nobody thinks of.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from commands import Done, telescope
from conftest import as_toml, one_line
from faults import run_fast, spec_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from telescope import Spec
from telescope.answer.finished import open_result
from telescope.errors import SpecError, TelescopeError


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


def refused(done: Done) -> None:
    """A line per fault on stderr, exit code 2, no traceback, and it is no confession of a bug."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr
    assert all(line.startswith("telescope: ") for line in done.stderr.splitlines()), done.stderr
    assert "Traceback" not in done.stderr
    assert "a bug in telescope" not in done.stderr, done.stderr


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "good.toml").write_text(as_toml(spec_of(tmp_path)))
    return tmp_path


BAD_TOML: dict[str, bytes] = {
    "empty": b"",
    "no toml": b"{]",
    "half a line": b"name = ",
    "a key twice": b'name = "a"\nname = "b"\n',
    "binary": bytes(range(256)),
    "utf-16": "name = 'a'".encode("utf-16"),
    "zeros": bytes(100),
    "json": b'{"name": "a"}',
    "yaml": b"name: a\nladder:\n  widths: [1]\n",
    "a table twice": b"[ladder]\n[ladder]\n",
    "deep": b"a = " + b"[" * 5000 + b"]" * 5000,
    "a date for a name": b"name = 2024-01-01\n",
}

OVERRIDES = [
    *("name=''", "name='../up'", "name='/etc'", "name='a/b'", "name='.'", "name='..'", "name=3"),
    *("name='a b'", "name='-x'", "name='x\u0000'", "name='é'", f"name='{'x' * 101}'", "name=[]"),
    *(
        "ladder=3",
        "ladder.widths=[]",
        "ladder.widths=16",
        "ladder.widths=[0]",
        "ladder.widths=[-8]",
    ),
    *("ladder.widths=[16,16]", "ladder.widths=[16,64]", "ladder.widths=[32,16]"),
    *("ladder.widths=[16.5]", "ladder.widths=['a']", "ladder.widths=[true]"),
    *("ladder.widths=[12]", "ladder.policy='none'", "ladder.seeds=[]", "ladder.seeds=[0,0]"),
    *("ladder.seeds=[-1]", "ladder.seeds='0'", "ladder.width=[16]"),
    *("target.width=16", "target.width=0", "target.width='64'", "target.width=36", "target=1"),
    *("target.steps=0", "target.batch_size=-1", "target.depth=3"),
    *(
        "axes={}",
        "axes.lr=0.1",
        "axes.lr.low=0",
        "axes.lr.low=-1",
        "axes.lr.low=1",
        "axes.lr.low=nan",
    ),
    *("axes.lr.high=inf", "axes.lr.high=0.001", "axes.lr.points=1", "axes.lr.points=0"),
    *("axes.lr.points=2.5", "axes.lr.points=100000", "axes.lr.value=0.1", "axes.lr={value=0}"),
    *("axes.lr={value=-1}", "axes.lr={}", "axes.weight_decay={value=-0.1}", "axes.bogus={value=1}"),
    *("axes.lr.step=2", "axes.lr.high=0.0100001"),
    *("model=3", "model.file='none.py'", "model.file='.'", "model.file=3", "model.depth='1'"),
    *("model.head_dim=5", "model.head_dim=0", "model.bogus=1", "model.depth=nan"),
    *("model.vocab_size=255", "model.vocab_size='x'", "model.vocab_size=1.5"),
    *("optimizer.name='sgd'", "optimizer.rule='x'", "optimizer.ns='x'", "optimizer.ns_steps=0"),
    *(
        "optimizer.momentum=1",
        "optimizer.momentum=-0.1",
        "optimizer.betas=[0.9]",
        "optimizer.eps=0",
    ),
    *("optimizer.betas=[1.0,0.9]", "optimizer.ns_dtype='fp8'", "optimizer.adamw_lr_ratio=0"),
    *("optimizer.nesterov=1", "optimizer.lr=0.1", "optimizer=[]"),
    *(
        "train.steps=0",
        "train.steps=-4",
        "train.steps=2.5",
        "train.steps='4'",
        "train.batch_size=0",
    ),
    *("train.sequence_length=0", "train.schedule='step'", "train.warmup=2", "train.warmup=-1"),
    *("train.final_lr=1.5", "train.decay=2", "train.evals=0", "train.evals=99", "train.bogus=1"),
    *("train.checkpoint_every=-1", "train.checkpoint_every=1.5", "train.checkpoint_every='2'"),
    *("train.timeout=-1", "train.timeout=inf", "train.timeout=nan", "train.timeout='1 h'"),
    *("train.sequence_length=100000000", "train.batch_size=100000000"),
    *("data.source='none.txt'", "data.source=[]", "data.source=3", "data.source=['a',3]"),
    *("data.held_out=0", "data.held_out=1", "data.eval_tokens=0", "data.eval_tokens=99999999"),
    *("data.source=''", "data.source='*.nothing'", "data.source='\u0000'"),
    *("compute.workers=0", "compute.workers='many'", "compute.cpus=0", "compute.gpus=-1"),
    *("compute.device='tpuu'", "compute.device=''", "compute.flop_rate=0", "compute.bogus=1"),
    *("budget.max_over_target=0", "budget.max_over_target=-1", "budget.max_over_target=nan"),
    *("nokey", "=1", "a.=1", "bogus=1", "name.x=1"),
]


@pytest.mark.parametrize("kind", BAD_TOML)
def test_a_file_that_is_no_spec(kind: str, place: Path) -> None:
    (place / "bad.toml").write_bytes(BAD_TOML[kind])
    before = files(place)
    refused(telescope("run", "bad.toml", "--dispatcher", "inline", cwd=place))
    assert files(place) == before


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_key_that_is_wrong(override: str, place: Path) -> None:
    before = files(place)
    command = ("run", "good.toml", "--dispatcher", "inline", "--no-check", "--set", override)
    refused(telescope(*command, cwd=place))
    assert files(place) == before


PLAIN_MODEL = "import mup, torch\ndef build(width, *, vocab_size):\n    "
BAD_MODELS = {
    "empty": "",
    "no python": "def build(:",
    "null": "a = '\0'",
    "tabs": "def build(width):\n\tif 1:\n        pass\n",
    "no build": "x = 1",
    "build is a number": "build = 3",
    "raises": "raise RuntimeError('two\\nlines')",
    "exits": "raise SystemExit(0)",
    "exits hard": "import sys; sys.exit('bye')",
    "imports nothing": "import no_such_package",
    "imports itself": "from telescope_model import x",
    "build raises": PLAIN_MODEL + "raise ValueError",
    "build exits": PLAIN_MODEL + "raise SystemExit(1)",
    "build gives None": PLAIN_MODEL + "return None",
    "build gives a string": PLAIN_MODEL + "return 'model'",
    "build takes nothing": "def build(): return None",
    "build takes no width": "def build(*, vocab_size): return None",
    "no parameters": PLAIN_MODEL + "return torch.nn.Identity()",
    "no readout": PLAIN_MODEL + "return torch.nn.Embedding(vocab_size, width)",
    "not wider": PLAIN_MODEL + "return torch.nn.Linear(3, 3)",
    "recursion": "def build(width, *, vocab_size): return build(width, vocab_size=vocab_size)",
    "wrong logits": PLAIN_MODEL
    + "return torch.nn.Sequential(torch.nn.Embedding(vocab_size, width), "
    "mup.MuReadout(width, 7, bias=False))",
    "forward raises": PLAIN_MODEL
    + "return torch.nn.Sequential(torch.nn.Embedding(vocab_size, width), "
    "torch.nn.Linear(7, 7), mup.MuReadout(width, vocab_size))",
    "looks at values": PLAIN_MODEL
    + "\n    class M(torch.nn.Sequential):\n        def forward(self, x):\n"
    "            x.max().item()\n            return super().forward(x)\n"
    "    return M(torch.nn.Embedding(vocab_size, width), mup.MuReadout(width, vocab_size))",
    "lazy": PLAIN_MODEL + "return torch.nn.LazyLinear(width)",
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_a_model_file_that_is_wrong(kind: str, place: Path) -> None:
    (place / "bad.py").write_text(BAD_MODELS[kind])
    before = files(place)
    override = "model={file='bad.py'}"
    command = ("run", "good.toml", "--dispatcher", "inline", "--no-check", "--set", override)
    refused(telescope(*command, cwd=place))
    assert files(place) == before


BAD_CORPORA: dict[str, bytes] = {"empty": b"", "one byte": b"x", "short": b"too short" * 9}


@pytest.mark.parametrize("kind", [*BAD_CORPORA, "a folder", "gone", "a loop"])
def test_a_corpus_that_is_wrong(kind: str, place: Path) -> None:
    path = place / "bad.txt"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a loop":
        path.symlink_to(path)
    elif kind in BAD_CORPORA:
        path.write_bytes(BAD_CORPORA[kind])
    command = ("run", "good.toml", "--dispatcher", "inline", "--no-check")
    refused(telescope(*command, "--set", "data.source='bad.txt'", cwd=place))
    assert not (place / "results").exists()


# -- results folders ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("finished")
    run_fast(place, {})
    return place


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A finished sweep to be damaged, as `results/tiny`."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def without(key: str) -> Any:
    def change(record: dict[str, Any]) -> None:
        del record[key]

    return change


def with_value(path: str, value: Any) -> Any:
    def change(record: dict[str, Any]) -> None:
        *tables, key = path.split(".")
        for table in tables:
            record = record[table]
        record[key] = value

    return change


BAD_RECORDS = {
    "no spec": without("spec"),
    "no fingerprint": without("fingerprint"),
    "no storage": without("storage"),
    "no target_flops": without("target_flops"),
    "spec is text": with_value("spec", "x"),
    "spec is null": with_value("spec", None),
    "a bad name": with_value("spec.name", "../../etc"),
    "no widths": with_value("spec.ladder.widths", []),
    "an unknown key": with_value("spec.bogus", 1),
    "no axes": with_value("spec.axes", {}),
    "model is a list": with_value("spec.model", []),
    "storage is a number": with_value("storage", 3),
    "storage is no URL": with_value("storage", "nowhere"),
    "storage of no database": with_value("storage", "foo://bar"),
    "a storage that is gone": with_value("storage", "sqlite:////nowhere/trials.db"),
    "flops are text": with_value("target_flops", "many"),
    "a newer format": with_value("format", 99),
    "format is text": with_value("format", "x"),
}


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_a_results_folder_with_a_wrong_record(kind: str, copied: Path) -> None:
    path = copied / "results" / "tiny" / "spec.json"
    record = json.loads(path.read_text())
    BAD_RECORDS[kind](record)
    path.write_text(json.dumps(record))
    before = files(copied)
    refused(telescope("show", "tiny", cwd=copied))
    assert files(copied) == before


BAD_FILES = {
    "spec.json is empty": ("spec.json", b""),
    "spec.json is a list": ("spec.json", b"[]"),
    "spec.json is binary": ("spec.json", bytes(range(256))),
    "spec.json is a number": ("spec.json", b"3"),
    "trials.db is empty": ("trials.db", b""),
    "trials.db is text": ("trials.db", b"not a database, and long enough to have a header " * 9),
    "trials.db is another's": ("trials.db", b"SQLite format 3\0" + bytes(4080)),
    "model.py is binary": ("model.py", b"\xff\xfe"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_results_folder_with_a_wrong_file(kind: str, copied: Path) -> None:
    name, content = BAD_FILES[kind]
    (copied / "results" / "tiny" / name).write_bytes(content)
    for verb in ("show", "transfer"):
        refused(telescope(verb, "tiny", cwd=copied))


@pytest.mark.parametrize("name", ["spec.json", "trials.db", "model.py"])
def test_a_results_folder_without_a_file(name: str, copied: Path) -> None:
    (copied / "results" / "tiny" / name).unlink()
    refused(telescope("show", "tiny", cwd=copied))
    assert not (copied / "results" / "tiny" / name).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"state": 3}', '{"state": "running"}'])
def test_a_heartbeat_that_is_wrong_is_no_news(text: str, copied: Path) -> None:
    (copied / "results" / "tiny" / "status.json").write_text(text)
    for command in (["status", "tiny"], ["ls"]):
        done = telescope(*command, cwd=copied)
        assert (done.returncode, done.stderr) == (0, "")
    assert telescope("show", "tiny", cwd=copied).returncode == 0


@pytest.mark.parametrize("sweep", ["nothing", "", "..", "/", "a\nb", "x" * 5000, "results"])
def test_a_sweep_that_is_not_there(sweep: str, place: Path) -> None:
    before = files(place)
    for verb in ("show", "status", "transfer"):
        refused(telescope(verb, sweep, cwd=place))
    assert files(place) == before


# -- fuzzed -------------------------------------------------------------------------------------

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
LISTS = st.lists(PLAIN, max_size=3)
ANYTHING = PLAIN | LISTS | st.dictionaries(st.text(max_size=8), PLAIN | LISTS, max_size=3)


def paths_of(table: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in table.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += paths_of(value, (*prefix, key))
    return found


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzzed_specs_are_specs_or_one_line(data: st.DataObject, corpus_file: Path) -> None:
    from conftest import tiny_spec

    spec = deepcopy(tiny_spec(corpus_file))
    for _ in range(data.draw(st.integers(1, 3))):
        *tables, key = data.draw(st.sampled_from(paths_of(spec)))
        table: Any = spec
        for name in tables:
            table = table.get(name) if isinstance(table, dict) else None
        if isinstance(table, dict):
            table[key] = data.draw(ANYTHING)
    try:
        loaded = Spec.from_dict(spec)
    except SpecError as error:
        one_line(error)
    else:
        assert "/" not in loaded.name


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(raw=st.binary(max_size=300))
def test_fuzzed_files_are_one_line(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "fuzz.toml").write_bytes(raw)
    refused(telescope("plan", "fuzz.toml", cwd=tmp_path))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), name=st.sampled_from(["spec.json", "trials.db", "status.json"]))
def test_fuzzed_results_are_read_right_or_refused(
    seed: int, name: str, finished: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bytes overwritten anywhere: the program's own errors, or an answer; nothing else escapes."""
    folder = tmp_path_factory.mktemp("fuzz") / "results" / "tiny"
    shutil.copytree(finished / "results" / "tiny", folder)
    chance = random.Random(seed)
    raw = bytearray((folder / name).read_bytes())
    for _ in range(chance.randint(1, 8)):
        raw[chance.randrange(len(raw))] = chance.randrange(256)
    (folder / name).write_bytes(raw)
    try:
        open_result(folder, folder.parent)
    except TelescopeError as error:
        one_line(error)
    shutil.rmtree(folder)


def test_there_are_more_than_a_hundred() -> None:
    kinds = (BAD_TOML, OVERRIDES, BAD_MODELS, BAD_CORPORA, BAD_RECORDS, BAD_FILES)
    assert len(set(OVERRIDES)) == len(OVERRIDES)
    assert sum(map(len, kinds)) > 100
    assert os.environ.get("COLUMNS") != "200", "telescope() leaves the environment as it was"
