"""The rooms: who may import whom, what stays out of which process, and that the README's tree is the real one."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "routing", "replicas", "gateway", "ops")
"""Left may be imported by right, never the other way round."""

LEAF = "ops.metrics"
"""A leaf that anyone may import; itself it imports nothing of ours."""

TORCH_TOOLS = ("ops/convert.py", "ops/checks.py", "ops/bench/", "ops/train_lora.py")
"""Outside the engine: turning a GGUF into safetensors, asking for a GPU, benchmarks beside transformers, PEFT."""

TORCH_FREE_ENGINE_FILES = {"scheduler", "sequence", "block_pool", "core", "loop"}
"""Under replicas/engine/, but shared with the sim engine."""


@dataclass(frozen=True)
class Import:
    """`module` is imported in `path`, at `line`, wherever in the file; under TYPE_CHECKING too."""

    path: str
    line: int
    module: str

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    @property
    def room(self) -> str:
        return self.path.partition("/")[0]


def imports_of(source: str, path: str) -> list[Import]:
    """Every import in a file, relative ones resolved; `from a import b` counts as `a.b` (which may be a module)."""
    found = []
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(path, node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                [*package[: len(package) + 1 - node.level], *filter(None, [node.module])]
                if node.level
                else [node.module]
            )
            found += [Import(path, node.lineno, ".".join([*map(str, base), alias.name])) for alias in node.names]
        elif isinstance(node, ast.Call) and _names_a_module(node):
            argument = node.args[0]
            assert isinstance(argument, ast.Constant)
            found.append(Import(path, node.lineno, str(argument.value)))
    return found


def _names_a_module(node: ast.Call) -> bool:
    """`import_module("torch")` or `__import__("torch")`."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ("import_module", "__import__") and bool(node.args) and isinstance(node.args[0], ast.Constant)


def all_files() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for room in ROOMS for p in (ROOT / room).rglob("*.py"))


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return [found for path in all_files() for found in imports_of((ROOT / path).read_text(), path)]


def breaches_of_order(imports: list[Import]) -> list[Import]:
    return [
        i
        for i in imports
        if i.top in ROOMS
        and ROOMS.index(i.top) > ROOMS.index(i.room)
        and not (i.module == LEAF or i.module.startswith(f"{LEAF}."))
    ]


def gateway_may(i: Import) -> bool:
    parts = i.module.split(".")
    return len(parts) > 1 and parts[1] in ("contract", "channel")


def torch_may(path: str) -> bool:
    if path.startswith("replicas/engine/"):
        return Path(path).stem not in TORCH_FREE_ENGINE_FILES
    return path.startswith(TORCH_TOOLS)


def ray_may(path: str) -> bool:
    return path.startswith("ops/") or path.endswith("deployment.py") or path == "routing/ray_router.py"


def show(breaches: list[Import]) -> str:
    return "\n".join(f"{i.path}:{i.line} imports {i.module}" for i in breaches)


def test_rooms_import_only_from_the_left(imports: list[Import]) -> None:
    assert not (found := breaches_of_order(imports)), show(found)


def test_the_leaf_imports_nothing_of_ours(imports: list[Import]) -> None:
    found = [i for i in imports if i.path == LEAF.replace(".", "/") + ".py" and i.top in ROOMS]
    assert not found, show(found)


def test_gateway_knows_only_the_contract_and_the_channel_of_replicas(imports: list[Import]) -> None:
    found = [i for i in imports if i.room == "gateway" and i.top == "replicas" and not gateway_may(i)]
    assert not found, show(found)


def test_torch_stays_in_the_engine(imports: list[Import]) -> None:
    found = [i for i in imports if i.top in ("torch", "transformers") and not torch_may(i.path)]
    assert not found, show(found)


def test_ray_stays_in_deployments_and_ops(imports: list[Import]) -> None:
    found = [i for i in imports if i.top == "ray" and not ray_may(i.path)]
    assert not found, show(found)


def test_redis_stays_in_the_store(imports: list[Import]) -> None:
    found = [i for i in imports if i.top in ("redis", "valkey") and i.path != "routing/store.py"]
    assert not found, show(found)


def test_vllm_stays_in_its_adapter(imports: list[Import]) -> None:
    allowed = ("replicas/vllm_engine.py", "replicas/vllm/", "ops/bench/")
    found = [i for i in imports if i.top == "vllm" and not i.path.startswith(allowed)]
    assert not found, show(found)


def test_pydantic_stays_at_the_edge(imports: list[Import]) -> None:
    found = [i for i in imports if i.top == "pydantic" and i.room not in ("gateway", "ops")]
    assert not found, show(found)


def test_rules_catch_what_they_forbid() -> None:
    source = (
        "import torch\nfrom gateway import app\nfrom ops.metrics import X\nfrom ops import cli\n"
        "def late():\n    from ray import serve\n    import_module('redis')\n"
    )
    found = imports_of(source, "routing/policy.py")
    assert [i.module for i in breaches_of_order(found)] == ["gateway.app", "ops.cli"]
    assert {i.module: i.line for i in found}["ray.serve"] == 6
    assert "redis" in {i.module for i in found}
    assert (
        not torch_may("routing/policy.py") and not torch_may("ops/cli.py") and not torch_may("replicas/engine/core.py")
    )
    assert torch_may("replicas/engine/model.py")
    assert not gateway_may(Import("gateway/app.py", 1, "replicas.local.stream"))
    assert gateway_may(Import("gateway/app.py", 1, "replicas.channel.ReplicaLink"))
    relative = imports_of("from . import sequence\nfrom ..contract import Engine", "replicas/engine/core.py")
    assert [i.module for i in relative] == ["replicas.engine.sequence", "replicas.contract.Engine"]


@pytest.mark.parametrize(
    "module", ["gateway.app", "gateway.compose", "replicas.sim_engine", "replicas.channel", "ops.cli"]
)
def test_process_without_an_engine_loads_neither_torch_nor_transformers(module: str) -> None:
    program = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# The README's tree


def tree_of(readme: str) -> set[str]:
    """Paths named in the block fenced as ```tree: two spaces a level, folders end in /, a comment after the name."""
    blocks = re.findall(r"^```tree\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, f"{len(blocks)} blocks fenced as ```tree"
    paths: set[str] = set()
    open_folders: list[str] = []
    for line in blocks[0].splitlines():
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        assert indent % 2 == 0 and indent // 2 <= len(open_folders), f"odd indentation: {line!r}"
        open_folders = open_folders[: indent // 2]
        name = line.split()[0]
        path = "".join([*open_folders, name])
        assert path not in paths, f"named twice: {path}"
        paths.add(path)
        if name.endswith("/"):
            open_folders.append(name)
        assert len(line.split()) > 1 or name.endswith("/"), f"not a word about {path}"
    return paths


def test_tree_in_the_readme_names_every_file_of_the_rooms_and_nothing_else() -> None:
    named = tree_of((ROOT / "README.md").read_text())
    absent = sorted(path for path in named if not (ROOT / path).exists())
    assert not absent, f"in the README but not in the tree: {absent}"
    modules = {path for path in all_files() if not path.endswith("__init__.py")}
    forgotten = sorted(modules - named)
    assert not forgotten, f"not in the README's tree: {forgotten}"


def test_tree_parser_reads_levels() -> None:
    readme = "x\n```tree\na/    one\n  b/\n    c.py  two\n  d.py  three\ne.md  four\n```\n"
    assert tree_of(readme) == {"a/", "a/b/", "a/b/c.py", "a/d.py", "e.md"}
    with pytest.raises(AssertionError, match="not a word about a"):
        tree_of("```tree\na.py\n```\n")
    with pytest.raises(AssertionError, match="0 blocks"):
        tree_of("```text\n```\n")


# Ceilings


def test_files_stay_small() -> None:
    """About 300 lines: past a third more than that, a file holds two things."""
    long = {path: n for path in all_files() if (n := len((ROOT / path).read_text().splitlines())) > 400}
    assert not long
