"""One export from the checkpoint to a folder that a person can use: files, proof, checksums, card."""

from pathlib import Path
from typing import Any

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.atomic import appearing, read_object, write_json
from autoglm_compress.checkpoint.source import CARD
from autoglm_compress.errors import UserError
from autoglm_compress.export.card import card
from autoglm_compress.export.engine_process import EngineError, has_package
from autoglm_compress.export.formats import ExportFormat
from autoglm_compress.export.job import ExportJob
from autoglm_compress.export.options import ExportOptions
from autoglm_compress.export.proof import Proof, ProofRows, proof_memory, proof_rows, prove
from autoglm_compress.export.rounded_ends import cost_of_rounding
from autoglm_compress.hashing import sha256
from autoglm_compress.publishing.content import CHECKSUMS


def memory_needed(kind: ExportFormat, shape: ModelShape, options: ExportOptions) -> int:
    """Bytes of memory that an export takes beside the process's own, at most: writing, or the proof."""
    return max(kind.memory(shape, options), proof_memory(shape))


def export(kind: ExportFormat, job: ExportJob, held_out: list[torch.Tensor]) -> dict[str, Any]:
    """Export a checkpoint, and prove that the engine predicts from the files what the checkpoint predicts.

    Args:
        kind: the format; its checks have let the checkpoint pass.
        job: what to export and where to.
        held_out: batches of token ids [rows, length] of text that nothing was fitted to.

    Returns:
        What goes on record.

    Raises:
        UserError: the engine does not take the files or predicts something else; they are deleted.
    """
    note = job.runtime.progress.note
    rounded = _write(kind, job)
    note(f"{kind.file(job).name}: {rounded['summary']}")
    verified, rows = has_package(kind.engine_package), proof_rows(held_out, kind.longest(job.checkpoint))
    found: dict[str, Any] = {
        "format": kind.name,
        "file": kind.file(job).name,
        "bytes": sum(file.stat().st_size for file in kind.files(job)),
        "verified": verified,
        "rounded": rounded,
        **kind.details(job),
    }
    if job.options.embedding_bits is not None:
        cost = cost_of_rounding(job.checkpoint, rows.tokens, job.runtime)
        found["embedding_bits"] = {"bits": job.options.embedding_bits, "kl_divergence": float(f"{cost:.4g}")}
        note(f"{found['file']}: embedding and head in 8 bits cost a KL divergence of {cost:.2g} nats")
    if verified:
        proof, towers = _proof(kind, job, rows)
        found |= {"proof": proof.as_data()} | towers
        note(
            f"{found['file']}: proven with {kind.engine}: KL divergence {proof.divergence:.2g} nats over "
            f"{proof.positions} tokens, the same next token for {100 * proof.top1:.1f} %"
        )
        if seen := towers.get("vision_proof"):
            note(f"{found['vision_file']}: proven: {100 * seen['squared_error']:.2g} % squared error of an image")
    else:
        note(f"warning: {found['file']}: not proven: {kind.engine_package} is not installed")
    for text in found.get("notes", ()):
        note(f"warning: {found['file']}: {text}")
    for name, text in {CARD: card(kind, job, found), **kind.beside(found["file"])}.items():
        _write_text(job.folder / name, text)
    _write_text(job.folder / CHECKSUMS, _checksums(job.folder))
    return found


def _write(kind: ExportFormat, job: ExportJob) -> dict[str, Any]:
    """Write the files, if a process that was killed later has not; returns what was rounded."""
    done = job.work / "written.json"
    if not (kind.file(job).exists() and done.exists()):
        exactness = kind.write(job)
        write_json(done, exactness.as_data() | {"summary": exactness.in_words()})
    return read_object(done)


def _proof(kind: ExportFormat, job: ExportJob, rows: ProofRows) -> tuple[Proof, dict[str, Any]]:
    file = kind.file(job)
    try:
        prediction = kind.predict(job, rows)
        proof = prove(job.checkpoint, rows.tokens, prediction, job.runtime)
        proof.require(kind.limits(job.checkpoint.shape, job.options), kind.engine, file)
        towers = kind.prove_towers(job)
    except EngineError as error:
        _discard(kind, job)
        raise UserError(f"{file.name}: {kind.engine} does not take it: {error}. Nothing was kept.") from None
    except UserError:
        _discard(kind, job)
        raise
    prediction.logits.unlink()
    return proof, towers


def _discard(kind: ExportFormat, job: ExportJob) -> None:
    for file in kind.files(job):
        file.unlink(missing_ok=True)


def _checksums(folder: Path) -> str:
    """The hashes of all files in a folder, as `sha256sum -c` takes them."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in names if not name.startswith("."))


def _write_text(path: Path, text: str) -> None:
    with appearing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
