"""What pyproject.toml cannot say: the folder conf/ of the repository lies inside the package when it is installed."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["knowledge_compression*", "hydra_plugins*"]),
        "knowledge_compression.conf",
    ],
    package_dir={"knowledge_compression.conf": "conf"},
)
