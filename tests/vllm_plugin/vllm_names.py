"""Which of the names that the wall to vLLM imports a vLLM defines, read from its sources without importing it.

    python tests/vllm_plugin/vllm_names.py vllm-0.34.0-cp38-abi3-manylinux_2_28_x86_64.whl

looks them up in a wheel (`pip download --no-deps vllm==0.34.0`) and writes its minor version's part of vllm_names.json. A name
that isn't found is told, and isn't written, so that test_compat.py is red until the wall imports it from where it went.
"""

import ast
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

COMPAT = Path(__file__).parents[2] / "llava_mini_fast" / "vllm_plugin" / "compat"
TABLE = Path(__file__).with_name("vllm_names.json")

Alternatives = tuple[str, ...]
"""Names of which one must be there: "module:name", or "module:Class.member"."""


def needed(folder: Path = COMPAT) -> list[Alternatives]:
    """What the wall imports and uses of vLLM. Where a module tries one place and then another, either will do."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        origin = {}
        for module, name in _imports(tree):
            origin[name] = module
            found.setdefault((path.name, name), []).append(f"{module}:{name}")
        for member in _members(tree):
            owner = member.partition(".")[0]
            found[(path.name, member)] = [f"{origin[owner]}:{member}"]
    return sorted(tuple(places) for places in found.values())


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            yield from ((node.module, alias.name) for alias in node.names)


def _members(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "MEMBERS":
            return list(ast.literal_eval(node.value))
    return []


class Sources:
    """The modules of a vLLM. `read` gives a file's text by its path ("vllm/config/__init__.py"), or None."""

    def __init__(self, read: Callable[[str], str | None]):
        self.read = read

    @cache  # noqa: B019
    def module(self, name: str) -> ast.Module | None:
        path = name.replace(".", "/")
        for file in (f"{path}.py", f"{path}/__init__.py"):
            text = self.read(file)
            if text is not None:
                return ast.parse(text)
        return None

    def has(self, place: str) -> bool:
        """Whether "module:name" or "module:Class.member" is defined, inherited members included."""
        module, _, name = place.partition(":")
        owner, _, member = name.partition(".")
        if member:
            return self._has_member(module, owner, member)
        # `from vllm import envs` names a module
        return self._defined(module, owner) is not None or self.module(f"{module}.{owner}") is not None

    def _defined(self, module: str, name: str) -> ast.AST | None:
        tree = self.module(module)
        return None if tree is None else next((node for node in _statements(tree.body) if name in _names(node)), None)

    def _has_member(self, module: str, owner: str, member: str) -> bool:
        node = self._defined(module, owner)
        if isinstance(node, ast.ImportFrom):
            alias = next(a for a in node.names if (a.asname or a.name) == owner)
            return self._has_member(_absolute(node, module, self), alias.name, member)
        if not isinstance(node, ast.ClassDef):
            return False
        if any(member in _names(statement) for statement in _statements(node.body)):
            return True
        bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
        return any(self._has_member(module, base.id, member) for base in bases if isinstance(base, ast.Name))


def _absolute(node: ast.ImportFrom, module: str, sources: Sources) -> str:
    if not node.level:
        return node.module or ""
    package = sources.read(f"{module.replace('.', '/')}/__init__.py") is not None
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + package]
    return ".".join([*parts, *filter(None, [node.module])])


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, those behind `if` and `try` too."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try):
                yield from _statements(getattr(node, inner, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)


def _names(node: ast.stmt) -> set[str]:
    """The names that one statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    if isinstance(node, ast.AnnAssign):
        return {getattr(node.target, "id", "")}
    if isinstance(node, ast.Assign):
        return {getattr(target, "id", "") for target in node.targets}
    return set()


def wheel(path: Path) -> tuple[str, Sources]:
    """A wheel's version and sources."""
    archive = zipfile.ZipFile(path)
    names = set(archive.namelist())
    version = re.match(r"vllm(?:_cpu)?-(\d+\.\d+[^-]*)-", path.name)
    if version is None:
        raise SystemExit(f"{path.name} is no wheel of vLLM.")
    return version[1], Sources(lambda file: archive.read(file).decode() if file in names else None)


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    version, sources = wheel(Path(sys.argv[1]))
    minor = ".".join(version.split(".")[:2])
    places = sorted({place for places in needed() for place in places})
    here = [place for place in places if sources.has(place)]
    table = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    TABLE.write_text(json.dumps(table | {minor: {"version": version, "names": here}}, indent=1, sort_keys=True) + "\n")
    missing = [" or ".join(choice) for choice in needed() if not set(choice) & set(here)]
    print(f"vLLM {version}: {len(here)} names; missing: {', '.join(missing) or 'none'}")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
