import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    text = (ROOT / "a3po_kernels" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise RuntimeError("a3po_kernels/__init__.py has no __version__")
    return found[1]


# https://HOST/OWNER/NAME, for a release: a package index shows no file of the repository.
REPOSITORY = os.environ.get("A3PO_REPOSITORY", "").rstrip("/")


def readme() -> str:
    """README.md; with A3PO_REPOSITORY its links and images are absolute."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not REPOSITORY:
        return text
    text = re.sub(r"\]\(\.\./\.\./", f"]({REPOSITORY}/", text)
    text = re.sub(r"(!\[[^\]]*\]\()(?![a-z]+:)", rf"\1{REPOSITORY}/raw/main/", text)
    return re.sub(r"(\]\()(?![a-z]+:|#)", rf"\1{REPOSITORY}/blob/main/", text)


TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "expecttest>=0.2",  # torch.library.opcheck imports it
    "tqdm>=4.66",  # the benchmarks' progress bars
    "pyyaml>=6",
    "check-jsonschema==0.39.0",  # carries the workflow schema
]

setup(
    name="a3po_kernels",
    version=version(),
    description="Fused Triton loss heads for reinforcement learning with verifiable rewards: "
    "A3PO, GRPO, DAPO and others, from logits to loss, gradient and metrics",
    long_description=readme(),
    long_description_content_type="text/markdown",
    project_urls={"Source": REPOSITORY, "Manual": f"{REPOSITORY}/blob/main/docs/index.md"} if REPOSITORY else {},
    author="the a3po_kernels founders",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["triton", "pytorch", "reinforcement-learning", "rlvr", "a3po", "grpo", "dapo", "llm"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Software Development :: Libraries :: Python Modules",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["a3po_kernels", "a3po_kernels.*"]),
    package_data={"a3po_kernels": ["py.typed"]},
    include_package_data=False,
    zip_safe=False,
    python_requires=">=3.11",
    install_requires=["torch>=2.8", "triton>=3.6", "numpy"],
    extras_require={
        "test": TEST,
        "bench": ["matplotlib>=3.8", "tqdm>=4.66"],
        "transformers": ["transformers>=5.5"],
        "trl": ["trl>=1.16"],
        "examples": ["trl>=1.16", "reasoning-gym>=0.1.25", "matplotlib>=3.8"],
        "verl": ["verl==0.9.1"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1.0"],
        "dev": [*TEST, "ruff>=0.12", "mypy>=1.15"],
    },
)
