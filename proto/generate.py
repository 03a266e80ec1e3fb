"""Generate the Python code of the .proto files, and check that the committed code is fresh.

    python -m proto.generate           rewrite *_pb2.py, *_pb2.pyi and *_pb2_grpc.py
    python -m proto.generate --check   exit 1, naming the files that differ

Needs grpcio-tools of exactly TOOLS_VERSION: another compiler writes other code.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
from pathlib import Path

TOOLS_VERSION = "1.81.1"
ROOT = Path(__file__).resolve().parent.parent

# Package `inference` also comes with tritonclient, and one descriptor pool refuses two definitions of
# one symbol; a pool of its own lets both live in a process. Only wire bytes pass between the two.
SHARED_POOL = "_descriptor_pool.Default().AddSerializedFile("
PRIVATE_POOL = "_descriptor_pool.DescriptorPool().AddSerializedFile("
PRIVATE_POOL_FILES = frozenset({"open_inference_pb2.py"})

# The compiler's stubs for messages do not pass strict checks, and it writes none for services.
TYPE_CHECKS_OFF = "# mypy: ignore-errors\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m proto.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a file is not fresh")
    arguments = parser.parse_args(argv)
    try:
        fresh = generate()
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    stale = [name for name, text in fresh.items() if _read(ROOT / "proto" / name) != text]
    if arguments.check:
        for name in stale:
            sys.stderr.write(f"proto/{name} differs from what its .proto gives: run `make proto`\n")
        return 1 if stale else 0
    for name in stale:
        (ROOT / "proto" / name).write_text(fresh[name], encoding="utf-8")
        sys.stdout.write(f"wrote proto/{name}\n")
    return 0


def generate() -> dict[str, str]:
    """File name in proto/ -> its text, for every .proto there.

    Raises: RuntimeError where the compiler is missing, of another version, or refuses a file.
    """
    try:
        found = importlib.metadata.version("grpcio-tools")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != TOOLS_VERSION:
        raise RuntimeError(f"grpcio-tools {TOOLS_VERSION} is needed to generate code, found {found}")
    with tempfile.TemporaryDirectory() as folder:
        _compile(Path(folder))
        return {
            path.name: _finish(path.name, path.read_text(encoding="utf-8"))
            for path in sorted((Path(folder) / "proto").iterdir())
            if not (path.name.endswith("_grpc.py") and not _has_services(path))
        }


def _compile(target: Path) -> None:
    from grpc_tools import protoc

    # The include path is the root, so that generated files import each other as `from proto import ...`.
    sources = [f"proto/{path.name}" for path in sorted((ROOT / "proto").glob("*.proto"))]
    status = protoc.main(
        [
            "protoc",
            f"-I{ROOT}",
            f"--python_out={target}",
            f"--pyi_out={target}",
            f"--grpc_python_out={target}",
            *sources,
        ]
    )
    if status:
        raise RuntimeError(f"protoc failed with status {status}; its message is above")


def _finish(name: str, text: str) -> str:
    if name.endswith(("_pb2_grpc.py", "_pb2.pyi")):
        return TYPE_CHECKS_OFF + text
    if name not in PRIVATE_POOL_FILES:
        return text
    if text.count(SHARED_POOL) != 1:
        raise RuntimeError(f"{name}: expected one `{SHARED_POOL}`; the compiler's template has changed")
    return text.replace(SHARED_POOL, PRIVATE_POOL)


def _has_services(generated: Path) -> bool:
    """The compiler writes a file of stubs for every .proto, with nothing in it where there is no service."""
    return "\nclass " in generated.read_text(encoding="utf-8")


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
