"""An lm-eval model that scores a checkpoint one decoder layer at a time, so the model need not fit into memory."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from autoglm_compress.calibration.answers import require_length
from autoglm_compress.calibration.reader import reader_of
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.errors import UserError
from autoglm_compress.evaluation.batches import Batch, Row, in_batches
from autoglm_compress.evaluation.chat_task import ChatPrompt
from autoglm_compress.evaluation.costs import HIDDEN_STATE_BYTES, TOKEN_BUDGET
from autoglm_compress.evaluation.output_head import OutputHead
from autoglm_compress.evaluation.walk_store import WalkStore
from autoglm_compress.forward.features import Features
from autoglm_compress.forward.one_layer_model import compute_dtype
from autoglm_compress.forward.rotary import by_frequencies
from autoglm_compress.forward.walk import walk
from autoglm_compress.runtime import Runtime


@dataclass(frozen=True)
class _Request:
    """A continuation and the tokens the model reads to predict it: all before the continuation's last token."""

    read: Row
    continuation: Row


Asked = list[tuple[int, _Request]]
"""The numbered requests that one batch answers."""


class LayerwiseLM(TemplateLM):
    """Log-likelihoods by streaming a checkpoint, as lm-eval's `hf` model gives them for the whole model in memory.

    All requests of a call share one walk through the model where their hidden states fit, and tokens that several
    requests have in common from the start (a question and its answer letters, the examples of a subject) are sent
    through once. Of chats with images or sounds every question is sent through by itself, with its answer letters.

    Args:
        checkpoint: the model; quantized weights are dequantized once per walk. Chats with images and sounds are read
            by `reader`, and what its towers make of them is in its `features` from then on.
        runtime: where layers run.
        progress: shows the walks.
        title: the name of the walks in the progress display.
        token_budget: the most tokens in a batch, padding included (a longer row is a batch of its own).
        work: a folder from which a killed evaluation continues at the layer it had reached. It must be for this
            checkpoint, device and versions alone, because only requests are distinguished in it. None keeps everything
            in memory.

    Raises:
        UserError: the folder has no tokenizer that `transformers` can load, or it has neither a BOS nor an EOS token.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        runtime: Runtime,
        title: str,
        token_budget: int = TOKEN_BUDGET,
        work: Path | None = None,
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.tokenizer = _load_tokenizer(checkpoint)
        self.reader = reader_of(checkpoint.folder, checkpoint.family, self.tokenizer)
        self._runtime = runtime.alone()
        self._device = runtime.device
        self._title = title
        self._token_budget = token_budget
        self._work = work
        self._prefix_text = self.tokenizer.decode([self.prefix_token_id])
        if self.reader.media is not None:
            self._held = TemporaryDirectory()  # empty where there is a work folder; goes with this object
            folder = Path(self._held.name) if work is None else work / "features"
            dtype = compute_dtype(checkpoint, self._device)
            checkpoint.features = Features(checkpoint, self.reader.media, folder, self._runtime, dtype)

    @property
    def eot_token_id(self) -> int:
        """The id of the end-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The id of the token that stands before a text without context: BOS, or EOS where there is no BOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """The most tokens the model reads at once."""
        return self.checkpoint.model_config.max_position_embeddings

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; by default the tokenizer decides on special tokens, never doubling a leading BOS."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix_text)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of a prompt and of what follows it, which of a chat is the beginning of the model's turn."""
        if not isinstance(context, ChatPrompt):
            return super()._encode_pair(context, continuation)
        prompt, answer = self.reader.ids(context.chat), self.reader.answer_ids(continuation)
        require_length(context.chat, len(prompt) + len(answer), self.max_length)
        return prompt, answer

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each request's continuation, and whether it is what greedy decoding gives."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of each whole text, in windows of `max_length` where it is longer."""
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += [make_disjoint_window(window) for window in rolling]
            owners += [number] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self.score(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Not supported: every generated token would be a walk through the whole model."""
        raise UserError(
            f"the task {requests[0].task_name} generates text, which layer-at-a-time evaluation does not support. "
            "Choose a multiple-choice or perplexity task, or evaluate the checkpoint in lm-eval itself: "
            f"lm-eval run --model hf --model_args pretrained={self.checkpoint.folder} --tasks {requests[0].task_name}"
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self.score([(context, continuation) for _, context, continuation in requests])

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """Score continuations given contexts, both as token ids; a context is cut on the left to fit `max_length`.

        Returns:
            For each pair the log-likelihood in nats, and whether greedy decoding gives the continuation.

        Raises:
            UserError: a continuation is empty or longer than the model reads, or a token is not in the vocabulary.
        """
        requests = [self._request(context, continuation) for context, continuation in pairs]
        reads = {request.read for request in requests}
        config = self.checkpoint.model_config
        groups: list[list[Row]] = []
        row_of: dict[Row, Row] = {}
        for alike in by_frequencies(reads, config):
            rows, found = _distinct_rows(alike)
            groups.append(rows)
            row_of |= found
        numbers_by_row: dict[Row, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            numbers_by_row[row_of[request.read]].append(number)
        scores: dict[int, tuple[float, bool]] = {}
        window = getattr(config, "sliding_window", None)
        if self.checkpoint.family.layer_kinds is not None:
            window = 0  # layers other than attention have no mask to separate branches
        walks = list(self._walks(batch for rows in groups for batch in self._batches(rows, window)))
        for number, batches in enumerate(walks, 1):
            title = self._title if len(walks) == 1 else f"{self._title} {number}/{len(walks)}"
            asked = [[(n, requests[n]) for row in batch.rows for n in numbers_by_row[row]] for batch in batches]
            scores |= self._scored_before_or_now(batches, asked, row_of, title)
        return [scores[number] for number in range(len(requests))]

    def _batches(self, rows: Sequence[Row], window: int | None) -> Iterator[Batch]:
        """Rows in batches. Those with features share no sequence, since their positions are not those of a fork."""
        by_kind: dict[bool, list[Row]] = {False: [], True: []}
        for row in rows:
            by_kind[max(row) >= self.checkpoint.shape.vocab_size].append(row)
        yield from in_batches(by_kind[False], self._token_budget, window)
        yield from in_batches(by_kind[True], self._token_budget, 0)

    def _request(self, context: Sequence[int], continuation: Sequence[int]) -> _Request:
        if not context:
            raise ValueError("the first token of a text has nothing to be predicted from: a context needs a token")
        if not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"a text to score has {len(continuation)} tokens; the model in {self.checkpoint.folder} takes "
                f"1 to {self.max_length} (max_position_embeddings). Choose a task or sequence length that fits."
            )
        tokens = (*context, *continuation)
        if max(tokens) >= (self.reader.end or self.checkpoint.shape.vocab_size):
            raise UserError(
                f"{self.checkpoint.folder}: the tokenizer gives token {max(tokens)}, but vocab_size in config.json is "
                f"{self.checkpoint.shape.vocab_size}. Use the tokenizer that belongs to the model."
            )
        return _Request(tokens[-(self.max_length + 1) : -1], tuple(continuation))

    @property
    def _state_bytes(self) -> int:
        """Of the hidden state of one token."""
        return self.checkpoint.shape.hidden_size * compute_dtype(self.checkpoint, self._device).itemsize

    def _walks(self, batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """Batches grouped so that the hidden states of a group stay within HIDDEN_STATE_BYTES."""
        group: list[Batch] = []
        size = 0
        for batch in batches:
            nbytes = batch.size * self._state_bytes
            if group and size + nbytes > HIDDEN_STATE_BYTES:
                yield group
                group, size = [], 0
            group.append(batch)
            size += nbytes
        if group:
            yield group

    def _scored_before_or_now(
        self, batches: list[Batch], asked: list[Asked], row_of: dict[Row, Row], title: str
    ) -> dict[int, tuple[float, bool]]:
        """The scores of a walk, read from the work folder if an earlier process finished it."""
        if self._work is None:
            return self._score_walk(batches, asked, row_of, title, None)
        described: list[Any] = [[(n, r.read, r.continuation) for n, r in part] for part in asked]
        described += [self.reader.key] if self.reader.key else []
        store = WalkStore(self._work, batches, described)
        scores = store.scores()
        if scores is None:
            nbytes = 2 * sum(batch.size for batch in batches) * self._state_bytes
            scores = self._score_walk(batches, asked, row_of, title, store.states(nbytes))
            store.keep(scores)
        return scores

    def _score_walk(
        self,
        batches: list[Batch],
        asked: list[Asked],
        row_of: dict[Row, Row],
        title: str,
        folder: Path | None,
    ) -> dict[int, tuple[float, bool]]:
        """Walk some batches; give the scores of the numbered requests asked of each."""
        last = walk(
            self.checkpoint,
            [batch.tokens for batch in batches],
            None,
            runtime=self._runtime,
            title=title,
            folder=folder,
            forks=[batch.fork for batch in batches],
        )
        hidden, positions = [], []
        tokens: list[int] = []
        count = 0
        for batch, requests, states in zip(batches, asked, last, strict=True):
            line_of = {row: line for line, row in enumerate(batch.rows)}
            spots: dict[tuple[int, int], int] = {}
            for _, request in requests:
                line = line_of[row_of[request.read]]
                start = len(request.read) - len(request.continuation)
                for place in range(start, len(request.read)):
                    positions.append(count + spots.setdefault(batch.spot(line, place), len(spots)))
                tokens += request.continuation
            lines, places = zip(*spots, strict=True)
            hidden.append(states[list(lines), list(places)])
            count += len(spots)
        head = OutputHead(self.checkpoint, self._device)
        values, likeliest = head.score(torch.cat(hidden), torch.tensor(positions), torch.tensor(tokens))
        numbered = [pair for requests in asked for pair in requests]
        lengths = [len(request.continuation) for _, request in numbered]
        return {
            number: (float(value.sum()), bool(greedy.all()))
            for (number, _), value, greedy in zip(
                numbered, values.split(lengths), likeliest.split(lengths), strict=True
            )
        }


def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    checkpoint.require_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raise many kinds; the user needs one sentence
        raise UserError(f"{checkpoint.folder}: transformers cannot load the tokenizer: {error}") from None
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        raise UserError(
            f"{checkpoint.folder / 'tokenizer_config.json'}: neither bos_token nor eos_token is set; scoring a text "
            "from its first token needs one of them. Add eos_token."
        )
    return tokenizer


def _distinct_rows(
    reads: Iterable[Row],
) -> tuple[list[Row], dict[Row, Row]]:
    """The rows that contain every read as a prefix, and for each read the row that does.

    Under causal attention the states of a prefix are the same in every row that starts with it.
    """
    rows: list[Row] = []
    row_of = {}
    # In descending order, a prefix directly follows the rows that extend it.
    for read in sorted(reads, reverse=True):
        if not rows or rows[-1][: len(read)] != read:
            rows.append(read)
        row_of[read] = rows[-1]
    return rows, row_of
