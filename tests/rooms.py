"""The rooms of the house, bottom up, and what each may import."""

from __future__ import annotations

GROUND = ["errors", "files", "streams", "markup", "records", "losses", "config"]
"""The modules that every room may import, bottom up."""
PUBLIC = ["api", "tune", "cli"]
"""The modules that people call, bottom up: above all rooms."""
ROOMS = {
    # room, bottom up: the other rooms that it may import, besides the ground
    "ladder": set[str](),
    "slurm": set[str](),
    "frontier": {"ladder"},
    "scaling": set[str](),
    "rules": set[str](),
    "data": set[str](),
    "spec": {"data"},
    "train": {"rules", "data"},
    "check": {"rules", "train"},
    "transfer": {"rules"},
    "export": {"rules", "data", "transfer"},
    "dispatch": set[str](),
    "packs": {"data", "train", "dispatch"},
    "foreign": {"spec", "dispatch"},
    "store": {"data", "spec", "dispatch"},
    "target": {"rules", "data", "train", "export", "dispatch"},
    "log": {"dispatch", "foreign", "store"},
    "answer": {"ladder", "frontier", "rules", "spec", "train", "transfer", "store", "target"},
    "report": {"ladder", "frontier", "scaling", "spec", "check", "transfer", "store", "target"}
    | {"answer"},
    "sweep": {"ladder", "frontier", "scaling", "rules", "data", "spec", "train", "check"}
    | {"transfer", "dispatch", "packs", "foreign", "store", "target", "answer", "report", "log"}
    | {"slurm"},
}
