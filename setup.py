"""The list of packages, which pyproject.toml cannot say: all that are found, and the folders that lie beside them."""

from setuptools import find_packages, setup

BUNDLED = {
    "autoglm_compress.bundled.recipes": "recipes",
    "autoglm_compress.bundled.calib_data": "calib_data",
    "autoglm_compress.bundled.reference_model.checkpoint": "reference_model/checkpoint",
    "autoglm_compress.bundled.reference_model.omni.checkpoint": "reference_model/omni/checkpoint",
    "autoglm_compress.bundled.reference_model.omni.data": "reference_model/omni/data",
}
"""Folders of the repository that a wheel holds as data of the package, as far from each other as they are here: so the
relative paths of the recipes lead to the same files in both."""

setup(
    packages=[*find_packages(include=["autoglm_compress*"]), *BUNDLED],
    package_dir=BUNDLED,
    package_data={
        "autoglm_compress": ["py.typed", "architecture/families/*.yaml", "attention/*.c", "report/templates/*"],
        **{name: ["**/*"] for name in BUNDLED},
    },
)
