"""The distribution `atoll`: four packages and one command."""

from setuptools import find_packages, setup

setup(
    name="atoll",
    version="0.1.0",
    description="Trains large models across islands of accelerators",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["trainer*", "parallel*", "offload*", "launch*"]),
    package_data={"": ["*.yaml", "*.json", "*.html", "*.js", "py.typed"]},
    entry_points={"console_scripts": ["atoll = launch.cli:main"]},
    install_requires=[
        "torch>=2.9",  # tensors, autograd, process groups, DeviceMesh, DCP, attention
        "numpy",
        "highspy>=1.10",  # HiGHS: pipeline schedules by integer programming, started from a known one
        "pyyaml",
        "pydantic>=2.11",  # config models, JSON schema for editors
        "tensorboard",
        "typer>=0.15",  # the command line; brings rich for the console
        "rich",
        "tokenizers",  # byte-pair encodings, trained or loaded
        "filelock",  # one builder of a dataset at a time
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.18"],
        "mpi": ["mpi4py>=4"],
        # A GPU needs no package beyond the torch built for it. NVIDIA apex (fused optimizers and norms)
        # cannot be named here: it is installed from its source, https://github.com/NVIDIA/apex, against the
        # torch and CUDA at hand. The project called "apex" on PyPI is another one; do not install it.
        "gpu": [],
        "dev": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
        ],
    },
)
