"""Where the repository keeps what tests read."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
RECIPES = ROOT / "recipes"
DATA = TESTS / "data"
QWEN = TESTS / "configs" / "qwen3-8b"
GLM = TESTS / "configs" / "glm-4-9b-0414"
GLM4V = TESTS / "configs" / "glm-4.1v-9b"
"""In the shape of GLM-4.1V-9B, which is that of AutoGLM-Phone-9B."""
OMNI = TESTS / "configs" / "omni-phone"
"""A thinker of Qwen2.5-Omni with the article's text layers, and small towers whose adapters could be one."""
