"""The paired walk: original and compressed model in lock-step, one layer of each in memory. The latter is refitted.

Within a layer, linears that share an input are fitted in the order in which they run, on the inputs that they get in
the compressed model by then:

- readers of a norm (q, k, v; gate, up) to the original's outputs for the heads and neurons that are left;
- writers (o, down) to what is missing between the compressed residual stream and the original's, at the same place or,
  after the last linear of a layer, where the next kept layer begins. So the error of everything before, dropped layers
  included, is part of the target.

After that a layer may be fitted by gradient as a whole to the same target, the last one before tied embeddings to the
original's next-token distribution, and so may a head of its own.

With several processes, each walks a share of the rows. Sums over tokens are added up, the first process fits, and all
continue with its weights.

In a writer's fit, a token has the weight 1 / mean square of the original's residual. All readers of the stream
normalise it, and without this weight a few tokens with massive activations would dominate the fit.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoglm_compress.calibration.divided_rows import DividedRows
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.cutting.lineage import Lineage
from autoglm_compress.cutting.surgery import Cut, cut_heads, cut_neurons, slice_axes
from autoglm_compress.errors import UserError
from autoglm_compress.fitting.affine import affine, before_norm, with_one
from autoglm_compress.fitting.descent import (
    Descent,
    LayerRun,
    distil_head,
    distil_last_layer,
    distil_layer,
)
from autoglm_compress.fitting.fit_records import fit_record
from autoglm_compress.fitting.fitting_rows import FittingRows
from autoglm_compress.fitting.refit_costs import HEAD_SAMPLE
from autoglm_compress.fitting.ridge import (
    Examples,
    Fit,
    InputExamples,
    InputMoments,
    Moments,
    NotFiniteError,
    fit,
    ridge,
)
from autoglm_compress.forward.activations import capture_input, copy_input, linear_of
from autoglm_compress.forward.hidden_states import HiddenStates, remaining_layers
from autoglm_compress.forward.one_layer_model import OneLayerModel, compute_dtype, final_norm
from autoglm_compress.memory import bound_freed_memory, give_back_freed_memory
from autoglm_compress.runtime import Runtime
from autoglm_compress.slices import row_slices


@dataclass(frozen=True)
class RefitLayer:
    """A layer's tensors after the refit, by names relative to it, the record of each linear's fit, and the fit of the
    whole layer.

    The fits of linears are not kept: their weights are as large as the layer.
    """

    weights: dict[str, torch.Tensor]
    fits: dict[str, dict[str, Any]]
    descent: Descent | None


class PairedWalk:
    """Refits a compressed checkpoint, layer by layer, against the original it was cut from.

    Args:
        original: the checkpoint whose activations are the target.
        compressed: the checkpoint to refit.
        lineage: which parts of the original the compressed one has.
        rows: token ids to fit to and to decide by, the same in all processes.
        folder: the folder of the hidden states, so that a killed walk continues at the layer it had reached.
        layer_passes: how often gradient descent goes over the tokens for each layer after its linears are fitted.
        logit_passes: the same for the last part before the logits: the head, or the last layer if the head is tied.
    """

    def __init__(
        self,
        original: Checkpoint,
        compressed: Checkpoint,
        lineage: Lineage,
        rows: DividedRows,
        *,
        runtime: Runtime,
        folder: Path,
        layer_passes: int = 0,
        logit_passes: int = 0,
    ) -> None:
        self.layer_passes, self.logit_passes = layer_passes, logit_passes
        self.original, self.compressed, self.lineage = original, compressed, lineage
        self.family = original.family
        self.device, self.progress, self.processes = runtime.device, runtime.progress, runtime.processes
        self.rows = FittingRows(rows, runtime.processes)
        dtype = compute_dtype(original, runtime.device)
        self.teacher_model = OneLayerModel(original, runtime.device, dtype)
        self.student_model = OneLayerModel(compressed, runtime.device, dtype)
        self.teacher = HiddenStates(
            self.rows.batches, original.shape.hidden_size, dtype, folder / "original", runtime.processes
        )
        self.student = HiddenStates(
            self.rows.batches, compressed.shape.hidden_size, dtype, folder / "compressed", runtime.processes
        )
        # A kill between the two commits of a step leaves one stream ahead. Its earlier states are in its other buffer.
        self.student.done = self.teacher.done = min(self.student.done, self.teacher.done)
        self.final_norms = final_norm(compressed, runtime.device), final_norm(original, runtime.device)

    @torch.no_grad()
    def run(self) -> Iterator[tuple[int, RefitLayer]]:
        """Refit layer after layer. A layer counts as done when the next one is requested."""
        layers = self.compressed.shape.num_hidden_layers
        streams, reached = (self.student, self.teacher), self.student.layers_done
        with self.progress.task("refit", total=layers, unit="layers", reached=reached) as advance:
            for layer in remaining_layers(streams, layers, self._embed):
                with self._located(f"layer {layer}"):
                    refitted = self._refit_layer(layer)
                yield layer, refitted
                del refitted  # or its weights would be there beside the next layer's
                advance(1)

    @torch.no_grad()
    def refit_head(self) -> tuple[torch.Tensor, Fit, Descent | None]:
        """The head [vocab_size, hidden_size] in its stored dtype, fitted to the original's logits.

        Call it when all layers are done. HEAD_SAMPLE evenly spaced rows of the head decide the ridge strength for all
        rows, and the returned fit is that of these rows. Gradient descent follows, if any passes are asked for.
        """
        self.teacher_model.release()
        self.student_model.release()
        give_back_freed_memory()
        target = self.original.head_weight()
        head, chosen = self._ridge_head(target)
        if not self.logit_passes:
            return head, chosen, None
        give_back_freed_memory()
        fitted = head.to(self.device).float()
        with self.progress.task("fit the head to next tokens", total=self.logit_passes, unit="passes") as advance:
            batches = self.rows.paired(self.student.before, self.teacher.before)
            descent = distil_head(fitted, batches, self.final_norms, target, self.logit_passes, self.processes, advance)
        return (fitted.to(head).cpu() if descent.improved else head), chosen, descent

    def _ridge_head(self, target: torch.Tensor) -> tuple[torch.Tensor, Fit]:
        """Fit the head by ridge towards the original's. A separate function, so that its large tensors are freed at the
        end.
        """
        prior = self.compressed.head_weight()
        sample = torch.arange(0, len(prior), max(1, len(prior) // HEAD_SAMPLE))
        train, held_out = self._input_moments(self._last_normed())
        some = target[sample].to(self.device).float()
        with self._located("head"):
            [chosen] = self._fit(train.for_targets(some), held_out.for_targets(some), prior[sample].to(some))
        head = prior if self.processes.is_first else torch.empty_like(prior)
        if chosen.strength is not None:
            head = torch.empty_like(prior)
            for rows in row_slices(len(prior)):
                moments = train.for_targets(target[rows].to(self.device).float())
                head[rows] = ridge(moments, prior[rows].to(self.device).float(), chosen.strength).to(head)
        return self.processes.copy_first(head), chosen

    def _last_normed(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each batch the inputs of the heads, ours and the original's."""
        for ours, original in zip(self.student.before, self.teacher.before, strict=True):
            yield self.final_norms[0](ours.to(self.device)), self.final_norms[1](original.to(self.device))

    @contextmanager
    def _located(self, part: str) -> Iterator[None]:
        """Say where activations are not finite."""
        try:
            yield
        except NotFiniteError as error:
            raise UserError(f"{self.compressed.folder}: {part}: {error}.") from None

    def _embed(self) -> None:
        for checkpoint, states in ((self.original, self.teacher), (self.compressed, self.student)):
            states.embed(self.rows.batches, checkpoint)
        self._skip(range(self.lineage.layers[0]))

    def _skip(self, layers: range) -> None:
        """Send the original's states through the layers that the compressed model does not have."""
        for layer in layers:
            _, run = self.teacher_model.load(layer)
            for batch, after in zip(self.rows.batches, self.teacher.after, strict=True):
                after.copy_(run(after, batch))

    def _refit_layer(self, layer: int) -> RefitLayer:
        student, run_student, fits = self._fit_linears(layer)
        bound_freed_memory()
        descent = self._distil(layer, student, run_student)
        for batch, (before, after) in zip(self.rows.batches, self.student.pairs(), strict=True):
            after.copy_(run_student(before, batch))
        return RefitLayer(dict(student.named_parameters()), fits, descent)

    def _fit_linears(self, layer: int) -> tuple[nn.Module, LayerRun, dict[str, dict[str, Any]]]:
        """A layer with its linears fitted, what runs it, and the records of the fits.

        A function, so that nothing of the original's layer is kept.
        """
        origin = self.lineage.layers[layer]
        following = [*self.lineage.layers, self.original.shape.num_hidden_layers][layer + 1]
        teacher, run_teacher = self.teacher_model.load(origin)
        student, run_student = self.student_model.load(layer)
        (first, first_readers), (second, second_readers) = self.family.norm_readers.items()
        attention, mlp = self.family.attention_output, self.family.mlp_output
        cut = self._cut(layer)
        fits: dict[str, dict[str, Any]] = {}

        def normed(norm: str, originals: Iterable[torch.Tensor], ours: Iterable[torch.Tensor]) -> Iterator[Any]:
            for t, s in zip(originals, ours, strict=True):
                yield student.get_submodule(norm)(s.to(self.device)), teacher.get_submodule(norm)(t.to(self.device))

        inputs, originals, batches = self.student.before, self.teacher.before, self.rows.batches
        fits |= self._fit_readers(first_readers, teacher, student, cut, normed(first, originals, inputs))
        for batch, middle, (before, after) in zip(batches, self.teacher.middle, self.teacher.pairs(), strict=True):
            with copy_input(teacher.get_submodule(second), middle):
                after.copy_(run_teacher(before, batch))

        written = (
            capture_input(student.get_submodule(attention), run_student, states, batch)
            for batch, states in zip(batches, inputs, strict=True)
        )
        fits[attention] = self._fit_writer(attention, student, written, self.teacher.middle, inputs)
        for batch, middle, states in zip(batches, self.student.middle, inputs, strict=True):
            middle.copy_(capture_input(student.get_submodule(second), run_student, states, batch))

        examples = normed(second, self.teacher.middle, self.student.middle)
        fits |= self._fit_readers(second_readers, teacher, student, cut, examples)
        self._skip(range(origin + 1, following))
        block = student.get_submodule(mlp.rpartition(".")[0])
        written = (
            capture_input(student.get_submodule(mlp), block, student.get_submodule(second)(middle.to(self.device)))
            for middle in self.student.middle
        )
        fits[mlp] = self._fit_writer(mlp, student, written, self.teacher.after, self.student.middle)
        return student, run_student, fits

    def _distil(self, layer: int, student: nn.Module, run: LayerRun) -> Descent | None:
        """Fit a layer as a whole if any passes are asked for. Keep the fit if it is better on deciding rows."""
        last = layer == self.compressed.shape.num_hidden_layers - 1
        to_logits = last and self.compressed.shape.tie_word_embeddings and self.logit_passes > 0
        if not (to_logits or self.layer_passes):
            return None
        batches = self.rows.paired(self.student.before, self.teacher.after)
        prefix, computed = self.family.layer_prefix(layer), next(student.parameters()).dtype
        # As they are stored, which loses nothing.
        before = {
            name: weight.to(self.compressed.dtype_of(prefix + name), copy=True)
            for name, weight in student.state_dict().items()
        }
        student.float()
        if to_logits:
            self.teacher_model.release()  # this layer was its last
            give_back_freed_memory()
            heads = self.compressed.head_weight().to(self.device), self.original.head_weight()
            descent = distil_last_layer(
                student, run, batches, self.final_norms, heads, self.logit_passes, self.processes
            )
        else:
            descent = distil_layer(student, run, batches, self.lineage.project, self.layer_passes, self.processes)
        if descent.improved:
            before = {name: weight.to(self.compressed.dtype) for name, weight in student.state_dict().items()}
        student.load_state_dict({name: weight.to(computed) for name, weight in before.items()}, assign=True)
        student.requires_grad_(False)
        return descent

    def _cut(self, layer: int) -> Cut:
        """Which rows of the original's readers belong to the heads and neurons that a layer still has."""
        heads = cut_heads(self.lineage.heads[layer], self.lineage.key_value_heads[layer], self.original.shape.head_dim)
        return heads | cut_neurons(self.lineage.neurons[layer], self.original.shape.intermediate_size)

    def _fit_readers(
        self,
        readers: tuple[str, ...],
        teacher: nn.Module,
        student: nn.Module,
        cut: Cut,
        examples: Iterable[tuple[torch.Tensor, torch.Tensor]],
    ) -> dict[str, dict[str, Any]]:
        """Fit linears that read one input to the original's outputs; examples are inputs of both, ours first.

        Returns the records of the fits.
        """
        has_bias = linear_of(student, readers[0]).bias is not None
        train, held_out = self._input_moments(
            (with_one(ours, has_bias), with_one(original, has_bias)) for ours, original in examples
        )
        targets = []
        for reader in readers:
            rows = self.family.layer_tensors[f"{reader}.weight"].axes[:1]
            targets.append(slice_axes(affine(linear_of(teacher, reader)), rows, cut))
        priors = [affine(linear_of(student, reader)) for reader in readers]
        target, groups = torch.cat(targets), _consecutive([len(prior) for prior in priors])
        found = self._fit(train.for_targets(target), held_out.for_targets(target), torch.cat(priors), groups)
        for reader, one in zip(readers, found, strict=True):
            self._replace(linear_of(student, reader), one.weight)
        return {reader: fit_record(one) for reader, one in zip(readers, found, strict=True)}

    def _input_moments(
        self, examples: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> list[InputMoments | InputExamples]:
        """What readers are fitted to, and what decides about the fits; examples are inputs of both, ours first."""
        found: list[InputMoments | InputExamples] = []
        for (ours, original), decides in zip(examples, self.rows.held_out, strict=True):
            if not found:
                sizes = ours.shape[-1], original.shape[-1], ours.device
                for held_out in (False, True):
                    few = self.rows.few(sizes[0], held_out)
                    found.append(InputExamples() if few else InputMoments(*sizes, for_errors=held_out))
            for moments, rows in zip(found, (~decides, decides), strict=True):
                moments.add(ours[rows].flatten(0, 1).float(), original[rows].flatten(0, 1).float())
        for moments in found:
            moments.add_up(self.processes)
        return found

    def _fit(
        self,
        train: Moments | Examples,
        held_out: Moments | Examples,
        prior: torch.Tensor,
        groups: Sequence[slice] = (slice(None),),
    ) -> list[Fit]:
        """The result of `fit` in the first process. The other processes get its weights, without the errors."""
        if self.processes.is_first:
            found = fit(train, held_out, prior, groups)
        else:
            found = [Fit(torch.empty_like(prior[rows]), None, nan, nan) for rows in groups]
        for one in found:
            self.processes.copy_first(one.weight)
        return found

    def _fit_writer(
        self,
        writer: str,
        student: nn.Module,
        inputs: Iterable[torch.Tensor],
        originals: Iterable[torch.Tensor],
        residuals: Iterable[torch.Tensor],
    ) -> dict[str, Any]:
        """Fit a linear to the difference between the original's residual stream and ours.

        Returns the record of the fit.
        """
        module = linear_of(student, writer)
        has_bias, prior = module.bias is not None, affine(module)
        norm = self.family.writer_norms.get(writer)
        gain = student.get_parameter(f"{norm}.weight") if norm else None
        train, held_out = sums = [
            Examples()
            if self.rows.few(prior.shape[1], kind)
            else Moments.zeros(prior.shape[1], len(prior), prior.device)
            for kind in (False, True)
        ]
        for x, original, residual, decides in zip(inputs, originals, residuals, self.rows.held_out, strict=True):
            original = self.lineage.project(original.to(self.device).float())
            target = original - residual.to(self.device).float()
            weights = 1 / original.square().mean(-1).clamp_min(1e-12)
            x = with_one(x.float(), has_bias)
            if gain is not None:
                target = before_norm(target, gain, x @ prior.T)
                weights = torch.ones_like(weights)
            for moments, rows in zip(sums, (~decides, decides), strict=True):
                moments.add(x[rows].flatten(0, 1), target[rows].flatten(0, 1), weights[rows].flatten())
        for moments in sums:
            moments.add_up(self.processes)
        [found] = self._fit(train, held_out, prior)
        self._replace(module, found.weight)
        return fit_record(found)

    def _replace(self, linear: nn.Linear, weight: torch.Tensor) -> None:
        """Set a linear's weight (and bias, the last column) to the fit, rounded as the checkpoint will hold it."""
        stored = weight.to(self.compressed.dtype).to(linear.weight.dtype)
        if linear.bias is not None:
            linear.bias = nn.Parameter(stored[:, -1].contiguous(), requires_grad=False)
            stored = stored[:, :-1].contiguous()
        linear.weight = nn.Parameter(stored, requires_grad=False)


def _consecutive(lengths: list[int]) -> list[slice]:
    """Slices of these lengths, one after the other."""
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    return [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
