"""What importing the packages pulls in, and that imports run one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Which of the project's own modules each part may import, from the lowest part to the highest.
LAYERS = {
    "fused_na": ["fused_na"],
    "nat_models.settings": [],
    "nat_models.data": ["nat_models.data", "nat_models.settings"],
    "nat_models.scan": ["nat_models.data"],
    "nat_models.claim": [],
    "nat_models.shards": ["nat_models.claim", "nat_models.data"],
    "nat_models._timm": [],
    "nat_models.layers": ["fused_na", "nat_models._timm", "nat_models.settings"],
    "nat_models.engine": ["nat_models"],
    "nat_models.predict": ["nat_models"],  # a command, as train and eval
    "nat_models.stream": ["nat_models"],  # likewise
    "nat_models.export": ["nat_models"],
    "nat_models.soup": ["nat_models"],
    "nat_models": ["fused_na", "nat_models"],  # the model families; see MODELS_FORBID
    "train": ["nat_models"],
    "eval": ["nat_models"],
}
MODELS_FORBID = ["nat_models.data", "nat_models.engine", "lightning", "hydra", "omegaconf", "torchmetrics"]
KERNELS_ALLOW = sys.stdlib_module_names | {"torch", "triton", "fused_na"}


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("fused_na", ["nat_models", "timm", "torchvision", "lightning", "pytorch_lightning", "hydra", "omegaconf"]),
        ("nat_models", ["lightning", "pytorch_lightning", "hydra", "omegaconf", "torchmetrics", "matplotlib"]),
    ],
)
def test_importing_a_package_is_light(package: str, forbidden: list[str]) -> None:
    loaded = run(f"import sys, {package}; print('\\n'.join(sys.modules))").split()
    assert package in loaded
    assert not set(forbidden) & set(loaded)


def test_everything_imports_without_triton() -> None:
    output = run(
        "import sys\n"
        "sys.modules['triton'] = None  # makes `import triton` fail as where it is not installed\n"
        "import fused_na, nat_models, torch\n"
        "x = torch.ones(1, 5, 2, 8)\n"
        "print(fused_na.na1d(x, x, x, kernel_size=3).eq(1).all().item())\n"
        "try:\n"
        "    fused_na.na1d(x, x, x, kernel_size=3, backend='triton')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    answer, message = output.splitlines()
    assert answer == "True"
    assert "triton" in message and "not installed" in message


def source_files() -> dict[str, Path]:
    """Every module of the project by its import name."""
    packages = {"fused_na": ROOT / "kernels", "nat_models": ROOT}
    files = {
        ".".join(path.relative_to(parent).with_suffix("").parts).removesuffix(".__init__"): path
        for package, parent in packages.items()
        for path in (parent / package).rglob("*.py")
    }
    return files | {"train": ROOT / "train.py", "eval": ROOT / "eval.py"}


def imports(module: str, path: Path) -> set[str]:
    """Absolute names of everything that a file imports, wherever in the file, `from` names included."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


MODULES = source_files()


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    layer = next(layer for layer in LAYERS if is_within(module, layer))
    for name in imports(module, MODULES[module]):
        if name.partition(".")[0] in ("fused_na", "nat_models", "train", "eval"):
            assert any(is_within(name, allowed) for allowed in LAYERS[layer]), f"{module} imports {name}"
        if layer == "fused_na":
            assert name.partition(".")[0] in KERNELS_ALLOW, f"{module} imports {name}"
        if layer in ("nat_models", "nat_models.layers", "nat_models._timm"):
            assert not any(is_within(name, other) for other in MODELS_FORBID), f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_private_timm_names_are_imported_in_one_place(module: str) -> None:
    private = {
        name
        for name in imports(module, MODULES[module])
        if is_within(name, "timm") and any(part.startswith("_") for part in name.split("."))
    }
    assert not private or module == "nat_models._timm", f"{module} imports {sorted(private)}"


def test_kernels_is_no_package() -> None:
    """A package called `kernels` would shadow the one of that name on the package index."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
