"""Packaging: the folders engine/, kernels/ and benchmarks/ install as ``flashddpm.*``.

Nothing installs a top-level ``kernels`` or ``engine``: Hugging Face publishes a package named
``kernels`` that diffusers and transformers probe for.
"""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = {
    "flashddpm": "engine",
    "flashddpm.kernels": "kernels",
    "flashddpm.benchmarks": "benchmarks",
}

DIFFUSERS = "diffusers>=0.35"
LUCIDRAINS = "denoising-diffusion-pytorch>=2.3"
MATPLOTLIB = "matplotlib>=3.8"
PYTEST_BENCHMARK = "pytest-benchmark>=5"
TORCHVISION = "torchvision>=0.26"
# Distances of features; it brings torchvision. Before 0.4 its keywords had other names.
FIDELITY = "torch-fidelity>=0.4"
TEST = [
    DIFFUSERS,
    FIDELITY,
    MATPLOTLIB,
    # Called directly, as what the converted network must equal; it imports torchvision.
    LUCIDRAINS,
    TORCHVISION,
    PYTEST_BENCHMARK,
    "scipy>=1.11",
    "hypothesis>=6.100",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    # tests/packaging builds and installs the package.
    "pip>=23",
    "setuptools>=77",
]
BENCH = [
    DIFFUSERS,
    FIDELITY,
    LUCIDRAINS,
    MATPLOTLIB,
    PYTEST_BENCHMARK,
    TORCHVISION,
    "nvidia-ml-py>=12",
]
LINT = ["build>=1.2", "import-linter>=2.9", "mypy>=1.11", "pre-commit>=3.8", "ruff>=0.6"]

setup(
    name="flashddpm",
    version="0.1.0",
    description="A performance engine for denoising diffusion probabilistic models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir=FOLDERS,
    packages=[
        f"{package}.{inner}" if inner else package
        for package, folder in FOLDERS.items()
        for inner in ("", *find_packages(folder))
    ],
    package_data={"flashddpm": ["py.typed", "models/**/*"]},
    install_requires=[
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "Pillow>=10",
        "tqdm>=4.66",
        "typer>=0.12",
    ],
    extras_require={
        "test": TEST,
        "bench": BENCH,
        "evaluate": [FIDELITY, MATPLOTLIB],
        "dev": sorted({*TEST, *BENCH, *LINT}),
    },
    entry_points={"console_scripts": ["flashddpm = flashddpm.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
