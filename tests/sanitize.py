# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Build the CPU kernels with AddressSanitizer and UBSan and run random products and masks: `make sanitize`, not part of pytest.

    python tests/sanitize.py [products]

Every instruction set that the processor has, one and two threads, tampered codes included. A report of either ends it.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g")


def build(folder: Path) -> None:
    """The library as the package builds it, and the sanitizers."""
    (extension,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    sources = [str(ROOT / source) for source in extension["sources"]]
    flags = [flag for flag in extension["extra-compile-args"] if flag not in ("-g0", "-O2")]  # -O2 takes minutes
    words = [compiler(), *flags, "-O1", *SANITIZERS, "-shared", "-fPIC", *sources, "-o", str(folder / "_kernels.so")]
    subprocess.run(words, check=True)


def compiler() -> str:
    return os.environ.get("CC", "gcc")


def runtime(name: str) -> str:
    """Where a library of the compiler's lies."""
    words = [compiler(), f"-print-file-name={name}"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def sweep(folder: str, products: int) -> None:
    import torch
    from packed_products import any_product, libraries
    from sweep_cases import any_case, check_any

    from nm_compiler.errors import NMError
    from nm_compiler.runtime.native import library

    library.__file__ = f"{folder}/library.py"
    pick = random.Random(1)
    found = libraries()
    assert found, library.load()
    for isa, kernels in found.items():
        refused = 0
        for number in range(products):
            torch.set_num_threads(1 + number % 2)
            operands = any_product(pick).operands(number)
            operands.check(kernels)
            operands.packed.codes.random_(-(2**31), 2**31 - 1)
            try:
                operands.result(kernels)
            except NMError:
                refused += 1
        for number in range(products):
            torch.set_num_threads(1 + number % 2)
            check_any(any_case(pick), kernels)
        sys.stdout.write(
            f"{isa}: {products} products, {refused} refused with codes beyond their group, as many masks: clean\n"
        )
        sys.stdout.flush()


def main(products: str = "400") -> None:
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        options = {
            "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}",  # before all others, in this order
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": path, "OMP_NUM_THREADS": "2",
        }  # fmt: skip
        done = subprocess.run([sys.executable, __file__, products, folder], env={**os.environ, **options}, check=False)
        sys.exit(done.returncode)


if __name__ == "__main__":
    sweep(sys.argv[2], int(sys.argv[1])) if len(sys.argv) > 2 else main(*sys.argv[1:])
