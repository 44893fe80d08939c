"""All metadata is in pyproject.toml. This file is for what cannot be declared there: the extension's
`ext_modules`, collected from the sources in csrc/ and the compilers found. While csrc/ has no sources,
vitfast is pure Python.
"""

from setuptools import setup

setup()
