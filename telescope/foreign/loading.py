"""Import a user's function from the user's directory, even if other modules have the same names.

A training repository has packages called `models`, `data` or `utils`. So may another repository
that the process has used, or the folder from which this program runs. Therefore the user's
directories come first on the path while the function is imported and while it runs, and modules
that hide one of theirs are put aside for that time.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from telescope.errors import SpecError

_MODULES: dict[tuple[str, ...], dict[str, ModuleType]] = {}
"""Directories → the modules imported from them, kept while they are not in `sys.modules`."""


def forget(directories: tuple[str, ...]) -> None:
    """Forget the modules of these directories, because their files may have changed."""
    _MODULES.pop(directories, None)


def load_function(name: str, directories: tuple[str, ...]) -> Callable[..., Any]:
    """Import ``package.module:function``, looked for in the directories first.

    Raises:
        SpecError: there is no such module or function, or importing the module fails.
    """
    module_name, _, function_name = name.partition(":")
    where = " and ".join(dict.fromkeys(directories))
    if module_name.split(".")[0] == "telescope" and module_file(name, directories):
        raise SpecError(
            f"trainer.function: got {name!r}: a package called telescope hides behind this "
            "program; rename it"
        )
    with seen_from(directories):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and f"{module_name}.".startswith(f"{error.name}."):
                raise SpecError(
                    f"trainer.function: got {name!r}: no module {error.name} in {where}; give "
                    "package.module:function relative to trainer.folder"
                ) from error
            raise _import_error(name, error) from error
        except Exception as error:
            raise _import_error(name, error) from error
        function = getattr(module, function_name, None)
    if not callable(function):
        problem = f"has no {function_name}" if function is None else "is no function"
        subject = module_name if function is None else name
        raise SpecError(
            f"trainer.function: got {name!r}: {subject} {problem} ({module.__file__}); name a "
            "function of the module"
        )
    return function  # type: ignore[no-any-return]


def _import_error(name: str, error: Exception) -> SpecError:
    message = " ".join(str(error).split()) or "no message"
    return SpecError(
        f"trainer.function: got {name!r}: importing it raises {type(error).__name__}: {message}"
    )


def module_file(name: str, directories: tuple[str, ...]) -> Path | None:
    """Find the file of ``package.module:function`` in the directories without importing it."""
    parts = name.partition(":")[0].split(".")
    for directory in directories:
        stem = Path(directory, *parts)
        for path in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")):
            if path.is_file():
                return path
    return None


@contextmanager
def seen_from(directories: tuple[str, ...]) -> Iterator[None]:
    """Let the code inside import modules as a script in the first directory would."""
    names = _importable(directories)
    aside = {
        name: module
        for name, module in sys.modules.items()
        if (top := name.partition(".")[0]) in names
        and not _is_from(module, top, directories)
        and _would_hide(module, top, directories)
    }
    for name in aside:
        del sys.modules[name]
    sys.modules.update(_MODULES.get(directories, {}))
    sys.path[:0] = directories
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for directory in directories:
            if directory in sys.path:
                sys.path.remove(directory)
        own = {
            name: module
            for name, module in sys.modules.items()
            if (top := name.partition(".")[0]) in names and _is_from(module, top, directories)
        }
        _MODULES[directories] = own
        for name in own:
            del sys.modules[name]
        sys.modules.update(aside)


def _importable(directories: tuple[str, ...]) -> set[str]:
    """Return the names of modules and packages in the directories, except this program's."""
    found = set()
    for directory in directories:
        for path in Path(directory).iterdir() if Path(directory).is_dir() else ():
            is_module = path.suffix == ".py" or path.is_dir()
            if is_module and path.stem.isidentifier():
                found.add(path.stem)
    return found - {"telescope", "__main__"} - set(sys.stdlib_module_names)


def _is_from(module: ModuleType, top: str, directories: tuple[str, ...]) -> bool:
    """Tell whether a module lies in one of the directories, under its top-level name."""
    file = getattr(module, "__file__", None)
    places = [Path(place) for place in ([file] if file else getattr(module, "__path__", ()))]
    return any(
        place == Path(directory, f"{top}.py") or place.is_relative_to(Path(directory, top))
        for place in places
        for directory in directories
    )


def _would_hide(module: ModuleType, top: str, directories: tuple[str, ...]) -> bool:
    """Tell whether a script in the directories would import their module instead of this one.

    A plain folder, for example called torch, does not hide an installed package.
    """
    is_folder = getattr(module, "__file__", None) is None
    return is_folder or any(
        Path(directory, f"{top}.py").is_file() or Path(directory, top, "__init__.py").is_file()
        for directory in directories
    )
