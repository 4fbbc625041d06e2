"""A dataset as calibration text: streamed once, split as other sources, known by its content, refused in a message."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.command_line import assert_says, plan, refusal
from support.running import invoke, result_folders, run, tensors_of, write_recipe

MakeCheckpoint = Callable[..., Path]
STAGES = [{"stage": "ffn", "intermediate_size": 96}]
COMMIT = "0123456789" * 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "autoglm-compress"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset folder beside the recipe."""
    return write_dataset(tmp_path / "data", "This is about the number {}.")


def write_dataset(folder: Path, sentence: str, count: int = 300, column: str = "text") -> Path:
    folder.mkdir(exist_ok=True)
    rows = [json.dumps({column: sentence.format(number), "other": number}) for number in range(count)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def write(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Callable[..., Path]:
    def write(source: Any, **changes: Any) -> Path:
        calibration = {"source": source, "samples": 8, "sequence_length": 32}
        evaluation = {"every_stage": ["perplexity"], "perplexity": {"samples": 2, "sequence_length": 32}}
        changes = {"calibration": calibration, "evaluation": evaluation} | changes
        return write_recipe(tmp_path, make_checkpoint("glm"), STAGES, **changes)

    return write


def measured(output: Path) -> Any:
    return json.loads((output / "metrics.json").read_text())["stages"][1]["perplexity"]


def test_a_dataset_gives_what_the_same_texts_in_a_file_give(dataset: Path, write: Callable[..., Path], tmp_path: Path):
    run(write({"dataset": "data"}))
    [stage] = result_folders(tmp_path / "out")
    from_dataset, perplexity = tensors_of(stage), measured(tmp_path / "out")
    run(write(str(dataset / "train.jsonl")), "--fresh")
    assert all(tensor.equal(tensors_of(stage)[name]) for name, tensor in from_dataset.items())
    assert measured(tmp_path / "out") == perplexity


def test_a_changed_dataset_is_fetched_again_and_the_stages_follow(
    dataset: Path, write: Callable[..., Path], tmp_path: Path, cache: Path
):
    recipe = write({"dataset": "data"})
    run(recipe)
    [file] = cache.glob("data-*.jsonl")
    assert "01-ffn: finished before, reused" in run(recipe)
    assert list(cache.glob("data-*.jsonl")) == [file]
    write_dataset(dataset, "Now it is about the letter {}.")
    assert "01-ffn: its options, or what it depends on, changed: done again" in run(recipe)
    assert len(list(cache.glob("data-*.jsonl"))) == 2


def test_the_first_documents_of_a_column_split_and_no_more(dataset: Path, write: Callable[..., Path], cache: Path):
    write_dataset(dataset, "The body of number {}.", column="body")
    (dataset / "train.jsonl").rename(dataset / "validation.jsonl")
    source = {"dataset": "data", "split": "validation", "documents": 120}
    plan(write(source | {"column": "body"}))
    [file] = cache.glob("data-*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [{"text": f"The body of number {number}."} for number in range(120)]
    plan(write(source | {"field": "body"}))
    assert list(cache.glob("data-*.jsonl")) == [file]


def test_one_revision_of_the_hub_is_streamed(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, subset: str | None, **options: Any) -> list[dict[str, str]]:
        asked.append((name, subset, options["split"], options["revision"], options["streaming"]))
        return [{"text": f"This is about the number {number}."} for number in range(300)]

    class Info:
        sha = COMMIT

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, revision=None: Info)
    plan(write({"dataset": "owner/texts", "subset": "small"}))
    assert asked == [("owner/texts", "small", "train", COMMIT, True)]
    plan(write({"dataset": "owner/texts", "subset": "small"}))
    assert len(asked) == 1

    def unreachable(self: Any, name: str, revision: str | None = None) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    plan(write({"dataset": "owner/texts", "subset": "small", "revision": COMMIT}))
    assert len(asked) == 1
    message = refusal("plan", write({"dataset": "owner/texts", "subset": "small"}))
    assert_says(message, "calibration.source: no folder 'owner/texts'", "no network", "revision")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"dataset": "data", "column": "body"}, ["calibration.source: data: no column 'body'", "text, other"]),
        (
            {"dataset": "data", "column": "other"},
            ["calibration.source: data: row 1: column 'other' holds a value of type int, not text"],
        ),
        ({"dataset": "data", "split": "test"}, ["calibration.source: data: cannot be streamed", "test"]),
        ({"dataset": "data", "documents": 0}, ["line", "calibration.source.documents: given 0"]),
        (
            {"dataset": "data", "documents": 2},
            ["calibration.source: data: the held-out split", "not enough for one row"],
        ),
        ({"dataset": "data", "column": "text", "field": "text"}, ["calibration.source: ", "give one of them"]),
        ({"dataset": 3}, ["1 problem", "calibration.source.dataset: given 3: expected text"]),
        ({"dataset": "data", "subsets": "a"}, ["calibration.source.subsets: unknown key: did you mean subset?"]),
        ({"dataset": ""}, ["calibration.source.dataset: given ''"]),
        ({"dataset": 1.0, "split": "train"}, ["calibration.source"]),
    ],
    ids=str,
)
def test_a_dataset_that_cannot_be(source: dict[str, Any], words: list[str], dataset: Path, write: Callable[..., Path]):
    assert_says(refusal("plan", write(source)), *words)


def test_rows_without_text_are_left_out(dataset: Path, write: Callable[..., Path], cache: Path):
    rows = [json.dumps({"text": f"Row {number}." if number else None}) for number in range(300)]
    (dataset / "train.jsonl").write_text("\n".join(rows))
    plan(write({"dataset": "data"}))
    [file] = cache.glob("data-*.jsonl")
    assert json.loads(file.read_text().splitlines()[0]) == {"text": "Row 1."}
    assert len(file.read_text().splitlines()) == 299


def test_a_fetch_that_fails_leaves_no_half_of_a_file(
    write: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def breaking(*_: Any, **__: Any) -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise ConnectionError("the line broke")

    monkeypatch.setattr("datasets.load_dataset", breaking)
    message = refusal("plan", write({"dataset": "owner/texts", "revision": COMMIT}))
    assert_says(message, "owner/texts: cannot be streamed", "the line broke")
    assert [file.suffix for file in cache.iterdir()] == [".lock"]


def test_a_dataset_without_text(dataset: Path, write: Callable[..., Path]):
    write_dataset(dataset, "{}", count=0)
    assert_says(refusal("plan", write({"dataset": "data"})), "calibration.source: data: ")


def test_set_takes_a_dataset(dataset: Path, write: Callable[..., Path], cache: Path):
    recipe = write({"python-docs": 3, "other.jsonl": 1})
    result = invoke("plan", recipe, "--set", "calibration.source={dataset: data, documents: 200}")
    assert result.exit_code == 0, result.output
    assert len(list(cache.glob("data-*.jsonl"))) == 1
