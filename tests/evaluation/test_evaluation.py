"""Evaluation: the layer-at-a-time scores are those of lm-eval's own model, and every task gets its result."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.errors import UserError
from autoglm_compress.evaluation import EvaluationOptions, check_tasks, evaluate, layerwise_lm, output_head
from autoglm_compress.evaluation.perplexity import perplexity
from autoglm_compress.records.task_results import without_records
from support.evaluating import WORDS, hugging_face, layerwise, make_model
from support.quiet import quiet


def instances(kind: str, *arguments: tuple[str, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, 0, metadata=("test", 0, 1)) for args in arguments]


def choices() -> list[Instance]:
    """Answer letters, answers of several tokens, no context, and a context longer than the model reads."""
    contexts = ["Question: a river?\nAnswer:", "many words of text " * 5 + "Answer: ", WORDS * 12]
    pairs = [(context, f" {letter}") for context in contexts for letter in "ABCD"]
    pairs += [(contexts[0], " the river"), (contexts[0], " the river and trees"), ("", "a model reads")]
    return instances("loglikelihood", *pairs)


def texts() -> list[Instance]:
    return instances("loglikelihood_rolling", (WORDS,), (WORDS * 15,), ("a",), ("",))


def assert_same(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    torch.testing.assert_close(
        torch.tensor([value for value, _ in ours]), torch.tensor([value for value, _ in theirs]), rtol=1e-5, atol=1e-4
    )


def test_loglikelihood_is_that_of_hflm(family_model: Path) -> None:
    assert_same(
        layerwise(family_model).loglikelihood(choices()), hugging_face(family_model).loglikelihood(choices(), True)
    )


def test_loglikelihood_tokens_is_that_of_hflm(family_model: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    requests = []
    for context, continuation in ((1, 1), (7, 3), (1, 256), (300, 2), (255, 2), (40, 40)):
        tokens = torch.randint(320, (context + continuation,), generator=generator).tolist()
        requests.append((("", ""), tokens[:context], tokens[context:]))
    reference = hugging_face(family_model)
    likeliest = reference.model(torch.tensor([requests[1][1]])).logits[0, -1].argmax().item()
    requests.append((("", ""), requests[1][1], [likeliest]))
    ours = layerwise(family_model)._loglikelihood_tokens(requests)
    assert ours[-1][1]
    assert_same(ours, reference._loglikelihood_tokens(requests, disable_tqdm=True))


def test_rolling_loglikelihood_is_that_of_hflm(family_model: Path) -> None:
    ours = layerwise(family_model).loglikelihood_rolling(texts())
    theirs = hugging_face(family_model).loglikelihood_rolling(texts(), disable_tqdm=True)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("token_budget", [1, 100, 100_000])
def test_scores_do_not_depend_on_the_batches(glm: Path, token_budget: int) -> None:
    assert_same(
        layerwise(glm, token_budget=token_budget).loglikelihood(choices()), layerwise(glm).loglikelihood(choices())
    )


def test_scores_do_not_depend_on_slices_and_walks(glm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = layerwise(glm).loglikelihood(choices())
    monkeypatch.setattr(output_head, "VOCAB_SLICE", 50)
    monkeypatch.setattr(output_head, "POSITION_SLICE", 3)
    monkeypatch.setattr(layerwise_lm, "HIDDEN_STATE_BYTES", 5_000)
    assert_same(layerwise(glm, token_budget=64).loglikelihood(choices()), expected)


def test_what_requests_share_is_walked_once(glm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[torch.Tensor] = []
    walk = layerwise_lm.walk

    def spy(checkpoint: Checkpoint, batches: list[torch.Tensor], visitor: None, **options: object) -> object:
        walked.extend(batches)
        return walk(checkpoint, batches, visitor, **options)

    monkeypatch.setattr(layerwise_lm, "walk", spy)
    letters = [([1, 2, 3], [token]) for token in (5, 6, 7, 8)]
    layerwise(glm).score([*letters, ([1, 2, 3], [5, 6, 9]), ([1, 2], [3]), ([4, 2], [3])])
    assert [batch.tolist() for batch in walked] == [[[1, 2, 3, 5, 6], [4, 2, 0, 0, 0]]]


def test_a_row_has_the_rotary_frequencies_of_its_own_length(tmp_path: Path) -> None:
    """LongRoPE has others for long rows, and plain transformers chooses by the longest of a batch."""
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 4.0, 8.0, 16.0]}
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
    folder = make_model(tmp_path, "qwen3", rope_parameters=rope | factors)
    long = torch.randint(320, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    beginnings = [(long[: length - 3], long[length - 3 : length]) for length in (4, 12, 16, 17, 18, 30, 40)]
    letters = [(long[:size], [token]) for size in (9, 20) for token in (5, 6, 7)]
    requests = [(("", ""), context, continuation) for context, continuation in beginnings + letters]
    alone = hugging_face(folder)
    expected = [alone._loglikelihood_tokens([request], disable_tqdm=True)[0] for request in requests]
    assert_same(layerwise(folder)._loglikelihood_tokens(requests), expected)


def test_no_request_at_all(glm: Path) -> None:
    assert layerwise(glm).score([]) == []


def test_perplexity(glm: Path) -> None:
    rows = torch.randint(320, (5, 24), generator=torch.Generator().manual_seed(0))
    result = perplexity(layerwise(glm), rows)
    logits = AutoModelForCausalLM.from_pretrained(glm)(rows).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    assert result["tokens"] == 5 * 23
    assert result["value"] == pytest.approx(losses.mean().exp().item(), rel=1e-4)
    spread = losses.mean(1).std().item() / math.sqrt(5)
    assert result["stderr"] == pytest.approx(result["value"] * spread, rel=1e-3)
    assert result["rows"] == pytest.approx(losses.mean(1).tolist(), rel=1e-4)
    assert (
        result["text"]
        == perplexity(layerwise(glm), rows.clone())["text"]
        != perplexity(layerwise(glm), rows[:4])["text"]
    )
    assert perplexity(layerwise(glm), rows[:1])["stderr"] is None


def test_generation_is_refused(glm: Path) -> None:
    with pytest.raises(UserError, match="--model hf --model_args pretrained="):
        layerwise(glm).generate_until(instances("generate_until", ("text", {})))


@pytest.mark.parametrize(
    ("pair", "message"),
    [(([1], []), "has 0 tokens"), (([1], [2] * 257), "has 257 tokens"), (([1], [320]), "token 320, but vocab_size")],
)
def test_requests_that_cannot_be_scored(glm: Path, pair: tuple[list[int], list[int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        layerwise(glm).score([pair])


def test_a_context_is_needed(glm: Path) -> None:
    with pytest.raises(ValueError, match="a context needs a token"):
        layerwise(glm).score([([], [1, 2])])


def test_evaluate(glm: Path, quiz: Path) -> None:
    options = EvaluationOptions.model_validate({"mmlu": {"num_fewshot": 2, "limit": 10}})
    rows = torch.randint(320, (3, 16), generator=torch.Generator().manual_seed(0))
    result = evaluate(
        Checkpoint(glm),
        ["perplexity", "mmlu"],
        options,
        perplexity_rows=lambda: rows,
        mmlu_folder=quiz,
        runtime=quiet(),
    )
    assert json.loads(json.dumps(result)) == result
    assert result["perplexity"]["tokens"] == 45
    scores = result["mmlu"]
    assert (scores["questions"], scores["num_fewshot"]) == (20, 2)
    right = [subject["correct"].count("1") for subject in scores["subjects"].values()]
    assert list(scores["subjects"]) == ["anatomy", "high_school_rivers"]
    assert scores["accuracy"] == pytest.approx(sum(right) / 20)
    assert [subject["accuracy"] for subject in scores["subjects"].values()] == pytest.approx([n / 10 for n in right])
    assert scores["stderr"] > 0
    assert set(result["versions"]) == {"lm_eval", "transformers", "torch"}


def test_other_tasks_of_lm_eval(glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": WORDS, "options": ["river", "tree"], "label": n % 2} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path)}
    common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    choosing = {"doc_to_text": "{{text}}", "doc_to_choice": "options", "doc_to_target": "label"}
    tasks = {
        "choosing": common | choosing | {"output_type": "multiple_choice"},
        "reading": common | {"doc_to_text": "", "doc_to_target": "{{text}}", "output_type": "loglikelihood_rolling"},
        "writing": common | {"doc_to_text": "", "doc_to_target": "{{text}}", "output_type": "generate_until"},
        "all": {"group": "all", "task": ["choosing", {"task": "writing"}]},
    }
    for name, config in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | config))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(
        importlib.import_module("autoglm_compress.evaluation.evaluate"), "_task_manager", lambda: manager
    )
    settings = {"perplexity_rows": None, "mmlu_folder": None, "runtime": quiet()}
    result = evaluate(Checkpoint(glm), ["choosing", "reading"], EvaluationOptions(), **settings)
    assert result["choosing"]["acc"] == 0.5
    assert result["choosing"]["acc_stderr"] > 0
    records = result["choosing"]["records"]
    assert sorted(records["values"]["acc"]) == [0, 0, 1, 1]
    assert records["higher_is_better"] == {"acc": True, "acc_norm": True}
    assert "values" not in without_records(result["choosing"])
    # A quotient of sums over the documents, and no mean of anything: one number is all there is.
    assert result["reading"]["records"]["higher_is_better"]["word_perplexity"] is False
    assert result["reading"]["records"]["values"] == {}
    assert result["reading"]["records"]["responses"] != records["responses"]
    assert result["reading"]["word_perplexity"] > 1
    with pytest.raises(UserError, match="'all' generates text"):
        check_tasks(["all"])
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="lm-eval could not load choosing: "):
        evaluate(Checkpoint(glm), ["choosing"], EvaluationOptions(), **settings)


def test_built_in_tasks_need_no_look_at_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", None)
    check_tasks(["perplexity", "mmlu"])


def test_task_names() -> None:
    check_tasks(["mmlu", "arc_easy", "ai2_arc", "wikitext"])
    with pytest.raises(UserError, match=r"unknown evaluation task 'helaswag'.* Did you mean .*hellaswag"):
        check_tasks(["helaswag"])
    for name in ("gsm8k", "bbh"):
        with pytest.raises(UserError, match=f"'{name}' generates text"):
            check_tasks([name])
