"""Builds the C++ extension by driving CMakeLists.txt; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def is_foreign(cache: Path, source: Path) -> bool:
    """Tell whether CMake would refuse its cache: of another tree, as in a copy, or of tools that
    are gone."""
    values = dict(line.partition("=")[::2] for line in cache.read_text().splitlines())
    folders = {
        "CMAKE_HOME_DIRECTORY:INTERNAL": source,
        "CMAKE_CACHEFILE_DIR:INTERNAL": cache.parent,
    }
    tools = ("CMAKE_MAKE_PROGRAM:FILEPATH", "CMAKE_CXX_COMPILER:FILEPATH")
    return any(
        values.get(name) != folder.as_posix() for name, folder in folders.items()
    ) or not all(Path(values.get(tool, "")).exists() for tool in tools)


class CMakeBuild(build_ext):
    """Configure, build and install one CMake project into setuptools' build folder."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
            import torch
        except ImportError as error:
            raise SystemExit(
                f"building cropr_kernels needs {error.name}: install torch (2.10 or newer), "
                "pybind11, cmake and "
                "ninja, then run 'pip install --no-build-isolation .'"
            ) from error

        source = Path(__file__).parent.resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        cache = build / "CMakeCache.txt"
        if cache.exists() and is_foreign(cache, source):
            shutil.rmtree(build)
        build.mkdir(parents=True, exist_ok=True)
        # cmake and ninja from this environment come first, also where it is not activated.
        environment = {
            **os.environ,
            "PATH": sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", ""),
        }
        subprocess.run(
            [
                "cmake",
                "-G",
                "Ninja",
                "-S",
                str(source),
                "-B",
                str(build),
                f"-DTORCH_DIR={Path(torch.__file__).parent}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DCMAKE_INSTALL_PREFIX={target.parent}",
            ],
            check=True,
            env=environment,
        )
        subprocess.run(["cmake", "--build", str(build)], check=True, env=environment)
        subprocess.run(["cmake", "--install", str(build)], check=True, env=environment)

    def copy_extensions_to_source(self) -> None:
        """For builds in place: the library for C++ programs goes where the module goes."""
        super().copy_extensions_to_source()
        for library in (Path(self.build_lib) / "cropr_kernels").glob("libcropr_ops.*"):
            shutil.copy2(library, Path(__file__).parent / "cropr_kernels")


setup(ext_modules=[Extension("cropr_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
