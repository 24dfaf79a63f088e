"""Says which losses may be compared: of one ladder with what would be trained now, of two sweeps.

An edited trainer counts as another one, unless only its comments and layout differ or its user has
said that it trains alike. The results keep the fingerprint of the first text, and spec.json lists
every text that counts as the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from telescope.config import ADDED_KEYS
from telescope.errors import RefusedError, ResumeError
from telescope.foreign.program import ProgramText
from telescope.store.folder import Folder
from telescope.sweep.runnable import Runnable

DATA_HASH = "data (hash)"
"""Key of what was measured on; empty or missing where telescope did not see it."""
TEXTS = "trainer_texts"
"""Key of spec.json: file → the texts of it that count as one; the first is the fingerprint's."""


def check_comparable(
    folder: Folder,
    sweep: Runnable,
    *,
    accept_trainer: bool = False,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Refuse a folder whose results were made by other training than the spec's.

    Args:
        folder: the sweep's, which may not have been started.
        sweep: what would be trained.
        accept_trainer: take an edited trainer for the same.
        say: told of each file that is taken so.

    Returns:
        What spec.json is to hold of a foreign trainer; empty without one.

    Raises:
        ResumeError: naming the fields that differ, then and now.
    """
    sources = sweep.program_texts
    record = folder.read_spec() if folder.exists else {}
    kept = record.get("comparable_if_equal", sweep.comparable)
    before, now = ADDED_KEYS | kept, ADDED_KEYS | sweep.comparable
    texts = {key: _texts(record, key, kept.get(key), sources[key]) for key in sources}
    edited = {
        key for key, source in sources.items() if key in kept and not _has(texts[key], source)
    }
    same = sources.keys() & kept.keys() - (set() if accept_trainer else edited)
    differing = sorted(
        key
        for key in before.keys() | now.keys()
        if before.get(key) != now.get(key) and key not in same
    )
    if differing:
        shown = ", ".join(f"{key} was {before.get(key)}, now {now.get(key)}" for key in differing)
        alike = ", or say --accept-trainer if it trains alike" if edited >= set(differing) else ""
        raise ResumeError(
            f"{folder.path}: its results are not comparable with this spec: {shown}; undo the "
            f"change{alike}, or start another sweep with --name"
        )
    for key in sorted(edited):
        texts[key].append(_entry(sources[key], accepted=True))
        say(f"{key} was {kept[key]}, now {now[key]}: accepted as the same (--accept-trainer)")
    if not sources:
        return {}
    fingerprint = record.get("fingerprint", sweep.fingerprint)
    return {TEXTS: texts, "comparable_if_equal": kept, "fingerprint": fingerprint}


def is_data_seen(records: Mapping[str, Mapping[str, Any]]) -> bool:
    """Tell whether telescope saw what all sweeps were measured on; `records` as below."""
    return all(record["comparable_if_equal"].get(DATA_HASH) for record in records.values())


def differences(
    records: Mapping[str, Mapping[str, Any]], *, of_unseen: bool = False
) -> dict[str, dict[str, Any]]:
    """Compare the training of several sweeps, and refuse those whose losses say nothing together.

    Losses on other data, or per another tokenizer's token, are of other kinds. So are those of
    trainers that telescope does not see, as far as it knows, unless all that it knows of them is
    the same.

    Args:
        records: name of a sweep → its `spec.json`.
        of_unseen: take the losses of trainers that telescope does not see for comparable; whoever
            asks has to say that nobody checked it.

    Returns:
        Key → sweep → value, of all else that differs in what was trained.

    Raises:
        RefusedError: naming the sweeps and what differs.
    """
    fields = {name: ADDED_KEYS | record["comparable_if_equal"] for name, record in records.items()}
    first, *others = fields
    for other in others:
        keys = sorted(fields[first].keys() | fields[other].keys())
        unlike = [key for key in keys if fields[first].get(key) != fields[other].get(key)]
        of_data = [key for key in unlike if key.startswith("data")]
        is_seen = all(fields[name].get(DATA_HASH) for name in (first, other))
        if of_data or (unlike and not is_seen and not of_unseen):
            shown = ", ".join(
                f"{key} is {fields[first].get(key)} and {fields[other].get(key)}"
                for key in of_data or unlike
            )
            unseen = "" if is_seen else "; telescope does not see what another trainer measures on"
            raise RefusedError(
                f"{first} and {other}: their losses cannot be compared: {shown}{unseen}; look "
                "at each by itself"
            )
    keys = sorted({key for table in fields.values() for key in table})
    values = {key: {name: table.get(key) for name, table in fields.items()} for key in keys}
    return {key: of for key, of in values.items() if any(v != of[first] for v in of.values())}


def _texts(
    record: Mapping[str, Any], key: str, first: str | None, now: ProgramText
) -> list[dict[str, Any]]:
    """The texts of a file that count as one; a folder of an older version names the first alone."""
    table = record.get(TEXTS)
    listed = table.get(key) if isinstance(table, dict) else None
    texts = [text for text in listed if isinstance(text, dict)] if isinstance(listed, list) else []
    if texts:
        return texts
    if first in (None, now.text):
        return [_entry(now, accepted=False)]
    return [{"text": first}]  # its code is not known


def _entry(source: ProgramText, *, accepted: bool) -> dict[str, Any]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"text": source.text, "code": source.code, "accepted": accepted, "since": since}


def _has(texts: list[dict[str, Any]], source: ProgramText) -> bool:
    return any(source.text == text.get("text") or source.code == text.get("code") for text in texts)
