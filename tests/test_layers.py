"""The order of dependencies (CONTRIBUTING.md): every import inside the package points downwards."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
PACKAGE = CHECKOUT / "scd_robot"
MAPPED = ("datasets", "policies", "sim_eval")

BASE = {"errors", "types", "usable", "dotted", "seeding", "config", "output", "latest"}
NUMERICS = BASE | {"normalization", "resizing", "rotations", "transform_config", "transforms"}
NETWORK = NUMERICS | {"nn", "diffusion", "model"}
TRAINED = NETWORK | {"checkpoint"}
EVERYTHING = TRAINED | {
    "policies",
    "datasets",
    "control",
    "sim_eval",
    "training",
    "recording",
    "export",
    "analysis",
    "serve",
    "hub",
}

# What each part may import besides itself.
ALLOWED = {
    "errors": set(),
    "types": {"errors"},
    "usable": {"types"},
    "dotted": {"errors"},
    "seeding": {"errors"},
    "config": {"errors"},
    "output": {"errors"},
    "latest": set(),
    "normalization": BASE,
    "resizing": BASE,
    "rotations": BASE,
    "transform_config": BASE | {"rotations"},
    "transforms": BASE | {"normalization", "resizing", "rotations", "transform_config"},
    "checkpoint": BASE | {"normalization"},
    "hub": BASE | {"checkpoint"},
    "nn": NUMERICS,
    "diffusion": NUMERICS,
    "model": NUMERICS | {"nn", "diffusion"},
    "policies": TRAINED,
    "datasets": BASE,
    "control": BASE,
    "sim_eval": BASE | {"control"},
    "training": TRAINED | {"datasets", "policies"},
    "recording": BASE | {"datasets", "sim_eval", "control"},
    "export": TRAINED | {"policies"},
    "serve": TRAINED | {"policies", "control"},
    "analysis": TRAINED | {"datasets", "policies", "sim_eval", "control", "training"},
    "presets": EVERYTHING,
    "cli": EVERYTHING | {"presets"},
    "__init__": {"policies"},
}

HEAVY = {"torch", "lightning", "pytorch_lightning", "zarr", "h5py", "mujoco", "metaworld", "gymnasium"}
SIMULATORS = {"mujoco", "metaworld", "gym_pusht", "gymnasium", "pymunk", "robosuite"}
STORES = {"zarr", "h5py", "pyarrow"}
LIGHTNING = {"lightning", "pytorch_lightning"}
NETWORKS_NEED_NOT = SIMULATORS | STORES | LIGHTNING | {"tyro"}

# Packages of others that a part must do without.
FORBIDDEN = {
    **dict.fromkeys(BASE, HEAVY | {"tyro"}),
    **dict.fromkeys(
        (
            *("normalization", "resizing", "rotations", "transform_config", "transforms"),
            *("checkpoint", "hub", "nn", "diffusion", "model", "policies"),
        ),
        NETWORKS_NEED_NOT,
    ),
    "control": HEAVY | {"tyro"},
    "datasets": SIMULATORS | LIGHTNING | {"tyro"},
    "sim_eval": STORES | LIGHTNING | {"tyro"},
    "recording": LIGHTNING | {"tyro"},
    "training": SIMULATORS | {"tyro"},
    "export": LIGHTNING | {"tyro"},
    "serve": NETWORKS_NEED_NOT,
    "analysis": LIGHTNING | {"tyro"},
    "presets": LIGHTNING,
    "cli": LIGHTNING,
    "__init__": HEAVY | {"tyro"},
}


def source_files() -> list[Path]:
    """All files of the package, wherever they lie in the checkout."""
    return sorted(path for folder in (PACKAGE, *(CHECKOUT / name for name in MAPPED)) for path in folder.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part of the package a file belongs to: its folder or module directly below scd_robot."""
    relative = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else CHECKOUT)
    return relative.parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every import, also inside functions; those for type checkers only are left out."""
    pending: list[ast.AST] = [ast.parse(path.read_text(), filename=str(path))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        pending.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "scd_robot" else []
            yield from ((node.lineno, name) for name in names or [node.module or ""])


def own_part(module: str) -> str | None:
    """The part of ours that `module` belongs to; None for other packages and for plain facts about the package."""
    if module in ("scd_robot", "scd_robot.__version__") or not module.startswith("scd_robot."):
        return None
    part = module.split(".")[1]
    return "policies" if part == "load_policy" else part


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, (
        f"{part!r} is new: give it a place in the order of dependencies, here and in CONTRIBUTING.md"
    )
    for line, module in imported_modules(path):
        target = own_part(module)
        assert target in (None, part) or target in ALLOWED[part], f"{path}:{line}: {part} must not import {target}"


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_parts_do_without_the_packages_they_must_not_need(path: Path) -> None:
    part = part_of(path)
    for line, module in imported_modules(path):
        assert module.split(".")[0] not in FORBIDDEN[part], f"{path}:{line}: {part} must not import {module}"


def test_the_policy_for_lerobot_needs_no_training_stack_of_ours() -> None:
    files = sorted((CHECKOUT / "lerobot_policy_scd").rglob("*.py"))
    assert files
    allowed = TRAINED | {"policies"}
    for path in files:
        for line, module in imported_modules(path):
            assert own_part(module) in {None, *allowed}, f"{path}:{line}: the plugin must not import {module}"
            assert module.split(".")[0] not in NETWORKS_NEED_NOT, f"{path}:{line}: the plugin must not import {module}"


def private_methods(path: Path) -> set[str]:
    """Names of methods that begin with one underscore."""
    classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    functions = [node.name for one in classes for node in one.body if isinstance(node, ast.FunctionDef)]
    return {name for name in functions if name.startswith("_") and not name.startswith("__")}


def test_nobody_calls_private_methods_of_models_and_policies() -> None:
    defined = {path: private_methods(path) for path in source_files()}
    private = set().union(*(defined[path] for path in defined if part_of(path) in ("nn", "model", "policies")))
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute) or node.attr not in private - defined[path]:
                continue
            inherited = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            assert inherited, f"{path}:{node.lineno}: {ast.unparse(node)} is private; give its class a public method"


def test_order_of_dependencies_has_no_cycle() -> None:
    remaining = dict(ALLOWED)
    while remaining:
        free = [part for part, needs in remaining.items() if not needs & remaining.keys()]
        assert free, f"a cycle among {sorted(remaining)}"
        for part in free:
            del remaining[part]


def test_type_checking_imports_are_exempt_and_nested_ones_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "def f():\n    from scd_robot import __version__, load_policy\n    import zarr.core\n"
    )
    assert {name for _, name in imported_modules(path)} == {
        "typing",
        "scd_robot.__version__",
        "scd_robot.load_policy",
        "zarr.core",
    }
