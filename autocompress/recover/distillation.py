"""Losses on labels and on the outputs of a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.errors import WorkloadError
from autocompress.graph.layers import flatten_outputs
from autocompress.recover.teacher import Teacher
from autocompress.recover.training_types import Batch
from autocompress.workload.inputs import describe


def hard_label_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy for integer targets, mean squared error for floating ones; shape ().

    Args:
        outputs: the first output: (n, classes, ...) for integer targets, else the targets' shape.
        targets: (n, ...), integers from 0 to classes - 1, or floating.

    Raises:
        WorkloadError: the shapes do not fit each other.
    """
    if not labels_fit(outputs, targets):
        raise WorkloadError(
            "The targets do not fit the network's first output, so it cannot learn them.",
            given=f"targets {describe(targets)}, first output {describe(outputs)}",
            allowed="integers of shape (n, ...) for class scores (n, classes, ...), or floating "
            "targets of the output's shape",
            advice="recover by method 'response', which needs no targets",
        )
    if targets.is_floating_point():
        return F.mse_loss(outputs.float(), targets.float())
    return F.cross_entropy(outputs.float(), targets.long())


def labels_fit(outputs: Tensor, targets: Tensor) -> bool:
    """Whether `hard_label_loss` can compare them."""
    if targets.is_floating_point():
        return outputs.shape == targets.shape
    scores = outputs.ndim > 1 and outputs.shape[:1] + outputs.shape[2:] == targets.shape
    return scores and not targets.is_complex()


def softened_divergence(scores: Tensor, teacher_scores: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher || student) of the softened class probabilities; shape ().

    Hinton et al. 2015, section 2: the factor T² keeps the gradient's size when T changes. The mean
    over the batch and all positions.

    Args:
        scores: (n, classes, ...), not normalised; those of the teacher likewise.
    """
    log_student = F.log_softmax(scores.float() / temperature, 1)
    log_teacher = F.log_softmax(teacher_scores.float() / temperature, 1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    return temperature**2 * divergence.sum(1).mean()


@final
@dataclass(frozen=True)
class LabelLoss:
    """Fine-tuning on the labels."""

    extra: nn.Module = field(default_factory=nn.Module)

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        """The loss on a batch; a scalar.

        Raises:
            WorkloadError: the batch has no targets, or they do not fit the outputs.
        """
        if batch.targets is None:
            raise WorkloadError(
                "Fine-tuning needs targets, but the train split has none.",
                advice="recover by method 'response' or 'feature', or give targets",
            )
        return hard_label_loss(flatten_outputs(network(*batch.inputs))[0], batch.targets)


@final
@dataclass(frozen=True)
class ResponseTerm:
    """How far a network's outputs are from the teacher's.

    Attributes:
        class_scores: the first output is class scores: it is compared by `softened_divergence`,
            and nothing else is. Otherwise all floating outputs are compared by mean squared
            error, as a share of the teacher's mean square.
    """

    temperature: float
    class_scores: bool = True

    def __call__(self, outputs: list[Tensor], teacher_outputs: list[Tensor]) -> Tensor:
        """A scalar; both lists are as `flatten_outputs` gives them.

        Raises:
            WorkloadError: class scores have fewer than two dimensions, or no output is floating.
        """
        if self.class_scores:
            if outputs[0].ndim < 2:
                raise WorkloadError(
                    "Class scores are needed along axis 1 of the network's first output.",
                    given=describe(outputs[0]),
                    allowed="(n, classes, ...)",
                )
            return softened_divergence(outputs[0], teacher_outputs[0], self.temperature)
        terms = [
            relative_error(mine, wanted)
            for mine, wanted in zip(outputs, teacher_outputs, strict=True)
            if wanted.is_floating_point()
        ]
        if not terms:
            raise WorkloadError(
                "None of the network's outputs is floating, so it cannot learn them.",
                given=", ".join(map(describe, outputs)),
                advice="recover by method 'fine_tune'",
            )
        return torch.stack(terms).mean()


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error as a share of the mean square of what is wanted; shape ()."""
    square = wanted.float().square().mean().clamp(min=1e-12)
    return F.mse_loss(found.float(), wanted.float()) / square


@final
@dataclass(frozen=True)
class ResponseLoss:
    """Distillation of the teacher's outputs (Hinton et al. 2015), plus `alpha` times the labels.

    Attributes:
        alpha: weight of the `hard_label_loss`, which is left out where there are no targets that
            fit the first output, or where that is no class scores and the targets are integers.
    """

    teacher: Teacher
    response: ResponseTerm
    alpha: float = 1.0
    extra: nn.Module = field(default_factory=nn.Module)

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        """The loss on a batch; a scalar."""
        wanted = self.teacher.outputs(batch)
        outputs = flatten_outputs(network(*batch.inputs))
        loss = self.response(outputs, wanted)
        return loss + label_term(outputs[0], batch.targets, self.alpha, self.response.class_scores)


def label_term(
    output: Tensor, targets: Tensor | None, alpha: float, class_scores: bool
) -> Tensor | float:
    """`alpha` times the `hard_label_loss`; 0 where no labels can be learned."""
    if targets is None or alpha == 0 or not labels_fit(output, targets):
        return 0.0
    if not class_scores and not targets.is_floating_point():
        return 0.0
    return alpha * hard_label_loss(output, targets)
