# SPDX-License-Identifier: Apache-2.0
"""Maps kernels/ and patches/ into the package, as sglang_diffxkv.kernels and .patches.

All else is in pyproject.toml, which cannot express "this folder and every package below it, under
another name". Start Python programs here by their console scripts (`sglang serve`), or with
PYTHONSAFEPATH=1: `python -m` puts this folder first on sys.path, where kernels/ would hide the
PyPI package `kernels` that SGLang uses.
"""

from setuptools import find_packages, setup

MAPPED = {"sglang_diffxkv.kernels": "kernels", "sglang_diffxkv.patches": "patches"}

packages = find_packages(include=["sglang_diffxkv", "sglang_diffxkv.*"])
for name, folder in MAPPED.items():
    packages += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]

setup(packages=packages, package_dir=MAPPED)
