"""The parameters of a model of yours: each one's role, shape and shape at base width.

From these three follow a parameter's settings, at any width, also for a trainer that knows nothing
of this program. `Shapes.of` finds them in a torch model; `write_shapes` and `Shapes.load` keep them
in a file for ``[trainer] shapes``.

Only `Shapes.of` imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from telescope.config import OptimizerConfig
from telescope.errors import ModelError, SpecError
from telescope.files import write_atomic
from telescope.records import Point
from telescope.rules.groups import parameter_groups
from telescope.rules.scaling import Role, Start, Tag, check_growth, owners_of, transposed
from telescope.transfer.settings import group_settings

if TYPE_CHECKING:
    from torch import nn

KEYS = ("role", "shape", "base_shape")
"""Keys of a parameter's entry in the file."""
MORE_KEYS = ("init", "transposed")
"""Optional keys: a vector's initialisation, and whether a matrix is stored as (…, in, out)."""
RESIDUAL_ENDS = ("o_proj", "down_proj", "c_proj")
"""The matrices of Hugging Face transformers' language models that end a residual branch."""
NORM_AFTER = "post_feedforward_layernorm"
"""A block with this child has norms behind its branches, as in Gemma 2 and 3 and OLMo 2. A branch
then has the norm's size from the first step on, so its last matrix is not initialised at zero."""
GROWING = {
    # role: True for each side that grows with the width; of a stack of matrices the last two
    Role.HIDDEN: (True, True),
    Role.RESIDUAL: (True, True),
    Role.LATENT: (False, False),  # or one of the two
    Role.EMBEDDING: (False, True),
    Role.TIED: (False, True),
    Role.READOUT: (False, True),
    Role.INPUT: (True, False),
    Role.VECTOR: (True,),
    Role.FINITE: (False,),
}
LAYOUT = {
    Role.HIDDEN: "(…, out, in), the last two growing with the width and no others",
    Role.RESIDUAL: "(…, out, in), the last two growing with the width and no others",
    Role.LATENT: "(…, out, in), of which neither or one of the last two grows with the width",
    Role.EMBEDDING: "(vocabulary, width), the last alone growing with the width",
    Role.TIED: "(vocabulary, width), the last alone growing with the width",
    Role.READOUT: "(outputs, width), the last alone growing with the width",
    Role.INPUT: "(width, features), the first alone growing with the width",
    Role.VECTOR: "(width,), growing with the width",
    Role.FINITE: "one side, the same at every width",
}


@dataclass(frozen=True, slots=True)
class Shapes:
    """The parameters of one model at one width."""

    width: int
    base_width: int
    tags: Mapping[str, Tag]
    """Name → role, shape and base shape, in the model's order."""

    @classmethod
    def of(
        cls,
        build: Callable[[int], nn.Module],
        *,
        width: int,
        base_width: int,
        roles: Mapping[str, str] | None = None,
    ) -> Shapes:
        """Find the parameters of a torch model and the role of each in the width rules.

        A table that an `nn.Embedding` holds is an embedding, or tied if a Linear holds it too. The
        one `nn.Linear` that grows only in its input is the readout; one that grows only in its
        output is an input. Matrices that grow on both sides are hidden, and others whose module
        says ``latent = True`` are latent. The last matrix of a residual branch is recognised in the
        models of Hugging Face transformers, and elsewhere by the attribute ``residual_output =
        True`` of its module. `roles` names the others.

        Args:
            build: builds the model at a width; called on the meta device at `width`, `base_width`
                and twice that, so nothing is allocated.
            width: the width to describe.
            base_width: the sweep's first width, in whose units its points are given.
            roles: pattern of names → role, such as ``{"*.o_proj.weight": "residual"}``; the first
                that matches counts.

        Raises:
            ModelError: a parameter has no clear role, a side grows by another factor than the
                width, or a pattern matches nothing.
        """
        from telescope.transfer.fills import watched

        widths = (width, base_width, 2 * base_width)
        models, starts = zip(*(watched(build, each) for each in widths), strict=True)
        turned = _transposed_weights(models[0])
        shapes = [
            {
                n: transposed(tuple(p.shape)) if n in turned else tuple(p.shape)
                for n, p in model.named_parameters()
                if p.requires_grad
            }
            for model in models
        ]
        if not shapes[0].keys() == shapes[1].keys() == shapes[2].keys():
            common = shapes[0].keys() & shapes[1].keys() & shapes[2].keys()
            odd = sorted({name for by_name in shapes for name in by_name} - common)
            raise ModelError(f"{odd[0]}: exists at one width only; all widths need the same layers")
        for name in shapes[0]:
            check_growth(name, [by_name[name] for by_name in shapes], widths)
        grows = {
            name: tuple(a != b for a, b in zip(shapes[1][name], shapes[2][name], strict=True))
            for name in shapes[0]
        }
        found = _roles(models[0], grows, roles or {})
        tags = {
            n: Tag(
                n,
                found[n],
                shapes[0][n],
                shapes[1][n],
                start=starts[0].get(n),
                is_transposed=n in turned,
            )
            for n in shapes[0]
        }
        for name, tag in tags.items():
            _check_role(tag, grows[name], ModelError)
        return cls(width, base_width, tags)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        width: int,
        base_width: int,
        only_width: int | None = None,
        roles: Mapping[str, str] | None = None,
    ) -> Shapes:
        """Read a file of ``{name: {"role", "shape", "base_shape"}}``, or of such tables by width.

        By width an entry may be its shape alone, ``{name: [out, in]}``: the table of `base_width`
        then has the base shape. A role may be left out where `roles` names it or the growing sides
        leave no choice: both sides of a matrix hidden, one side of one vector, none of one finite.

        Args:
            path: the JSON file.
            width: the width to read.
            base_width: the width of every ``base_shape``.
            only_width: the width of a file that states none; by default `width`.
            roles: pattern of names → role, before those in the file; the first that matches counts.

        Raises:
            SpecError: the file or the width in it is missing, or an entry is wrong; the message
                names the entry, its value and what is allowed.
        """
        data, where = _read(Path(path)), f"{Path(path).name}"
        base = None
        if data and all(key.isdigit() for key in data):
            if str(width) not in data:
                there = ", ".join(sorted(data, key=int))
                raise SpecError(
                    f"{where}: has no shapes of width {width}, only of {there}; add them with "
                    "telescope.Shapes, or ask for one of these"
                )
            base = data.get(str(base_width))
            data, where = data[str(width)], f"{where}: width {width}"
        elif only_width not in (None, width):
            raise SpecError(
                f"{where}: has the shapes of one width, the target's ({only_width}), got width "
                f'{width}; give them by width: {{"{only_width}": {{...}}, "{width}": {{...}}}}'
            )
        if not isinstance(data, dict) or not data:
            raise SpecError(f"{where}: must be a table of parameters, each with {', '.join(KEYS)}")
        base = base if isinstance(base, dict) else {}
        data = _completed(where, data, base, roles or {}, width, base_width)
        tags = {name: _tag(f"{where}: {name}", name, entry) for name, entry in data.items()}
        for tag in tags.values():
            _check_tag(where, tag, width, base_width)
        return cls(width, base_width, tags)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return the content of a file: name → role, shape and base shape."""
        return {name: _entry(tag) for name, tag in self.tags.items()}

    def groups(
        self,
        point: Mapping[str, float] | None = None,
        /,
        *,
        fold_readout: bool = False,
        optimizer: Mapping[str, Any] | None = None,
        **axes: float,
    ) -> tuple[dict[str, Any], ...]:
        """Return each parameter's settings at this width, with the keys of `telescope transfer`.

        A trainer that uses them in every trial implements the width rule: a sweep's point, which is
        in base-width units, then means the same at every width.

        Args:
            point: lr and weight_decay in base-width units (a trial's point) and, if swept,
                init_scale and adamw_lr_ratio; other axes are ignored.
            fold_readout: for code without a multiplier on its logits; see `fold_readout`.
            optimizer: keys of the spec's table [optimizer], such as ``{"rule": "paper"}``.
            axes: the values of `point` as keyword arguments.

        Raises:
            SpecError: lr or weight_decay is missing, or an optimizer key is not allowed.
            RefusedError: `fold_readout` of a tied readout.

        >>> tag = Tag("w", Role.HIDDEN, (64, 64), (16, 16))
        >>> group, = Shapes(64, 16, {"w": tag}).groups(lr=0.02, weight_decay=0.1)
        >>> group["optimizer"], group["names"], group["lr"], group["weight_decay"]
        ('Muon', ['w'], 0.01, 0.2)
        """
        values = Point.of(point, **axes)
        for axis in ("lr", "weight_decay"):
            if axis not in values:
                raise SpecError(f"groups: {axis} is missing; got {', '.join(values) or 'nothing'}")
        config = optimizer_config(optimizer or {})
        groups = parameter_groups(self.tags, values, config)
        return tuple(group_settings(groups, config, fold=fold_readout))


def optimizer_config(table: Mapping[str, Any]) -> OptimizerConfig:
    """Build the table [optimizer] from a plain mapping.

    Raises:
        SpecError: an unknown key, or a value that is not allowed.
    """
    known = [item.name for item in fields(OptimizerConfig)]
    for key in table:
        if key not in known:
            raise SpecError(f"optimizer.{key}: unknown key; allowed: {', '.join(known)}")
    return OptimizerConfig(**table)


def write_shapes(path: str | Path, shapes: Sequence[Shapes]) -> None:
    """Write the shapes of several widths to a file for ``[trainer] shapes``.

    Args:
        path: the JSON file.
        shapes: one per width, all with the same base width.

    Raises:
        OSError: the file cannot be written.
    """
    widths = {str(each.width): each.as_dict() for each in shapes}
    tables = (
        f"{json.dumps(width)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(tag)}" for name, tag in table.items())
        + "\n}"
        for width, table in widths.items()
    )
    write_atomic(Path(path), "{" + ", ".join(tables) + "}\n")


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON file's table; refuse a name that occurs twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise SpecError(f"{path.name}: {twice} occurs twice; remove one of the two")
        return table

    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except OSError as error:
        raise SpecError(
            f"shapes: {path}: cannot be read: {error.strerror}; write it with "
            "telescope.Shapes, or leave it out to get no groups"
        ) from error
    except SpecError:
        raise
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path.name}: is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise SpecError(f"{path.name}: must be a table of parameters, each with {', '.join(KEYS)}")
    return data


def _entry(tag: Tag) -> dict[str, Any]:
    """Return a parameter's entry in the file."""
    base = transposed(tag.base_shape) if tag.is_transposed else tag.base_shape
    entry = {"role": str(tag.role), "shape": list(tag.stored_shape), "base_shape": list(base)}
    if tag.start:
        entry["init"] = str(tag.start)
    return entry | ({"transposed": True} if tag.is_transposed else {})


def _completed(
    where: str,
    data: Mapping[str, Any],
    base: Mapping[str, Any],
    roles: Mapping[str, str],
    width: int,
    base_width: int,
) -> dict[str, Any]:
    """Return the file's entries with the base shapes and the roles that they leave out.

    Raises:
        SpecError: patterns that are wrong, or parameters whose role nothing says.
    """
    faults = _pattern_faults(roles, data)
    if alone := [n for n, given in data.items() if isinstance(given, list) and n not in base]:
        faults.append(
            f"{', '.join(alone)}: has a shape and no base shape; give the shapes by width, the "
            f'sweep\'s first included: {{"{base_width}": {{...}}, "{width}": {{...}}}}'
        )
    if faults:
        raise SpecError(*(f"{where}: {fault}" for fault in faults))
    entries, unclear = {}, []
    for name, given in data.items():
        entry = {"shape": given} if isinstance(given, list) else given
        if isinstance(entry, dict):
            entry = {**_base_shape(base.get(name)), **entry}
            role = _named(name, roles) or entry.get("role")
            if role := role or (_role_by_growth(entry) if width != base_width else None):
                entry["role"] = role
            elif {"shape", "base_shape"} <= entry.keys():
                unclear.append(name)
        entries[name] = entry
    if unclear:
        raise SpecError(
            f"{where}: no role for {', '.join(unclear)}: the sides do not tell it; give it in the "
            f"file or by a pattern, as --roles '{unclear[0]}=ROLE'; ROLE is {', '.join(Role)}"
        )
    return entries


def _base_shape(entry: object) -> dict[str, Any]:
    """Return what an entry at base width says of the parameter at another one."""
    shape = entry.get("shape") if isinstance(entry, dict) else entry
    return {} if shape is None else {"base_shape": shape}


def _role_by_growth(entry: Mapping[str, Any]) -> Role | None:
    """Derive a role where the growing sides leave no choice; None where they do."""
    here, base = entry.get("shape"), entry.get("base_shape")
    if not isinstance(here, list) or not isinstance(base, list):
        return None
    grows = tuple(a != b for a, b in zip(here, base, strict=False))
    if len(grows) < 2 and not any(grows):
        return Role.FINITE
    stack = (False,) * (len(grows) - 2)
    # A matrix that grows on one side is an input or a table, or a readout kept as (in, out).
    return {(True,): Role.VECTOR, (*stack, True, True): Role.HIDDEN}.get(grows)


def _named(name: str, roles: Mapping[str, str]) -> str | None:
    """Return the role of the first pattern that matches a name."""
    return next((role for pattern, role in roles.items() if fnmatchcase(name, pattern)), None)


def _pattern_faults(roles: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """List what is wrong with patterns of names: a role that is none, or no such name."""
    names = list(names)
    return [
        f"roles: {pattern!r} matches no parameter"
        for pattern in roles
        if not any(fnmatchcase(name, pattern) for name in names)
    ] + [
        f"roles: got {role!r}, must be one of {', '.join(Role)}"
        for role in dict.fromkeys(roles.values())
        if role not in list(Role)
    ]


def _tag(where: str, name: str, entry: object) -> Tag:
    """Parse and check one entry of the file."""
    if not isinstance(entry, dict) or entry.keys() - set(MORE_KEYS) != set(KEYS):
        got = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
        raise SpecError(f"{where}: got {got or 'nothing'}, must be a table of {', '.join(KEYS)}")
    if entry["role"] not in list(Role):
        raise SpecError(f"{where}: role: got {entry['role']!r}, must be one of {', '.join(Role)}")
    sides = {}
    for key in ("shape", "base_shape"):
        shape = entry[key]
        whole = isinstance(shape, list) and all(type(side) is int and side > 0 for side in shape)
        if not whole:
            raise SpecError(f"{where}: {key}: got {shape!r}, must be a list of positive integers")
        sides[key] = tuple(shape)
    if len(sides["shape"]) != len(sides["base_shape"]):
        raise SpecError(
            f"{where}: shape {entry['shape']} and base_shape {entry['base_shape']} must have the "
            "same number of sides"
        )
    role, start, turned = Role(entry["role"]), entry.get("init"), entry.get("transposed", False)
    starts = [str(each) for each in Start if each is not Start.NORMAL]
    if start is not None and not (role.is_vector and start in starts):
        raise SpecError(
            f"{where}: init: got {start!r}, must be one of {', '.join(starts)}, of a vector or "
            "finite alone; a matrix starts by its role"
        )
    if turned is not False and not (turned is True and role.is_hidden and len(sides["shape"]) > 1):
        raise SpecError(
            f"{where}: transposed: got {turned!r}, must be true or false, and true of a hidden or "
            "residual matrix alone, or of a latent one"
        )
    if turned:
        sides = {key: transposed(shape) for key, shape in sides.items()}
    return Tag(
        name,
        role,
        sides["shape"],
        sides["base_shape"],
        start=Start(start) if start else None,
        is_transposed=turned,
    )


def _check_tag(where: str, tag: Tag, width: int, base_width: int) -> None:
    """Check that an entry's sides grow with the width as its role requires."""
    if width == base_width:
        if tag.shape != tag.base_shape:
            raise SpecError(
                f"{where}: {tag.name}: shape {list(tag.shape)} must be base_shape "
                f"{list(tag.base_shape)} at base width {base_width}"
            )
        grows = None
    else:
        try:
            check_growth(tag.name, (tag.shape, tag.base_shape), (width, base_width))
        except ModelError as error:
            raise SpecError(f"{where}: {error}") from None
        grows = tuple(a != b for a, b in zip(tag.shape, tag.base_shape, strict=True))
    _check_role(tag, grows, SpecError, where)


def _check_role(
    tag: Tag, grows: tuple[bool, ...] | None, error: type[Exception], where: str = ""
) -> None:
    """Check a parameter's sides against its role; `grows` is None where growth cannot be seen."""
    wanted, sides = GROWING[tag.role], len(tag.shape)
    stack = max(0, sides - 2) if tag.role.is_hidden else 0
    fits = sides - stack == len(wanted) or (tag.role is Role.FINITE and sides == 0)
    if fits and grows is not None:
        fits = grows == (False,) * stack + wanted[: sides - stack]
        if tag.role is Role.LATENT:
            fits = not any(grows[:stack]) and not all(grows[stack:])
    if not fits:
        shown = f"{list(tag.shape)} (base {list(tag.base_shape)})"
        raise error(
            f"{where + ': ' if where else ''}{tag.name}: role {tag.role} must have shape "
            f"{LAYOUT[tag.role]}; got {shown}"
        )


def _roles(
    model: nn.Module, grows: Mapping[str, tuple[bool, ...]], given: Mapping[str, str]
) -> dict[str, Role]:
    """Map each name to its role: as given, else from its growing sides and its module."""
    owners, ends = owners_of(model), _residual_ends(model)
    if faults := _pattern_faults(given, grows):
        raise ModelError("; ".join(faults))
    roles, derived = {}, []
    trained = {n: p for n, p in model.named_parameters() if n in grows}
    for name, parameter in trained.items():
        if named := _named(name, given):
            roles[name] = Role(named)
        else:
            roles[name] = _role(name, grows[name], owners[id(parameter)], ends)
            derived.append(name)
    outputs = [name for name in derived if roles[name] is Role.READOUT]
    if len(outputs) > 1:
        raise ModelError(
            f"{', '.join(outputs[:3])}: {len(outputs)} matrices grow in their input alone; a model "
            "has one readout: name those that are with roles={name: 'readout'}; all others must "
            "grow on both sides (key-value heads as a ratio, not a number)"
        )
    return roles


def _residual_ends(model: nn.Module) -> set[int]:
    """Return the ids of the modules that end a residual branch of a transformers model."""
    blocks = [m for m in model.modules() if _is_of_transformers(m)]
    normed = {
        id(part) for b in blocks if hasattr(b, NORM_AFTER) for part in b.modules() if part is not b
    }
    return {
        id(child)
        for block in blocks
        if id(block) not in normed
        for name, child in block.named_children()
        if name in RESIDUAL_ENDS
    }


def _is_of_transformers(module: nn.Module) -> bool:
    """Tell whether a module's class is from, or derives from, transformers' models."""
    return any(kind.__module__.startswith("transformers.models.") for kind in type(module).__mro__)


def _is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is transformers' `Conv1D`, a Linear whose weight is (in, out)."""
    sides = (getattr(module, "nx", None), getattr(module, "nf", None))
    weight = getattr(module, "weight", None)
    is_named = any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
    return is_named and weight is not None and tuple(weight.shape) == sides


def _transposed_weights(model: nn.Module) -> set[str]:
    """Return the names of the matrices that the model stores as (in, out)."""
    turned = {id(module.weight) for module in model.modules() if _is_conv1d(module)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in turned}


def _role(
    name: str, grows: tuple[bool, ...], owners: list[nn.Module], residual_ends: set[int]
) -> Role:
    """Derive a parameter's role from its growing sides and its modules."""
    from torch import nn

    if len(grows) <= 1:
        return Role.VECTOR if any(grows) else Role.FINITE
    embeddings = sum(isinstance(owner, nn.Embedding) for owner in owners)
    if all(getattr(owner, "latent", False) is True for owner in owners) and not all(grows[-2:]):
        return Role.LATENT
    linears = sum(isinstance(owner, nn.Linear) or _is_conv1d(owner) for owner in owners)
    if embeddings:
        return Role.TIED if linears else Role.EMBEDDING
    if linears == len(owners):
        match grows:
            case (True, True):
                ends = any(
                    getattr(owner, "residual_output", False) or id(owner) in residual_ends
                    for owner in owners
                )
                return Role.RESIDUAL if ends else Role.HIDDEN
            case (False, True):
                return Role.READOUT
            case (True, False):
                return Role.INPUT
    kind = type(owners[0]).__name__
    raise ModelError(
        f"{name}: of a {kind}, has no clear role; say what it is with roles={{{name!r}: ...}}, one "
        f"of {', '.join(Role)}; a hidden matrix is (…, out, in)"
    )
