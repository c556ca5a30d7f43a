"""The loss of a language model as a layer: hidden states in, one number out, and of the logits a piece at a time."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pad

from fastprimer import ops
from fastprimer.ops import _arguments as arguments
from fastprimer.ops._loss_arguments import check_budget
from fastprimer.ops._loss_arguments import options as checked_options

OPTIONS = ("ignore_index", "label_smoothing", "z_loss", "softcap", "memory_budget")


class LinearCrossEntropy(nn.Module):
    """fp.linear_cross_entropy of hidden states with the labels of a language model, shifted as Hugging Face's models do.

    Args:
        shift: position s is asked for the label of position s + 1, and the last for nothing; False: for its own label.
        return_accuracy: forward returns (loss, accuracy): the share of counted tokens that the model would have said.
        options: ignore_index, label_smoothing, z_loss, softcap, memory_budget, as in `linear_cross_entropy`.

    Raises:
        TypeError: an unknown option; forward decides the reduction, and lse is not returned.
        TypeError, ValueError: an option does not fit; the message names it.
    """

    def __init__(self, *, shift: bool = True, return_accuracy: bool = False, **options):
        super().__init__()
        for name in options.keys() - set(OPTIONS):
            raise TypeError(f"LinearCrossEntropy: options: expected {', '.join(OPTIONS)}, got {name!r}")
        usual = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None, "memory_budget": None} | options
        check_budget("LinearCrossEntropy", usual.pop("memory_budget"))
        checked_options("LinearCrossEntropy", reduction="mean", return_lse=False, return_argmax=return_accuracy, **usual)
        self.shift, self.return_accuracy, self.options = shift, return_accuracy, options
        self.ignore_index = options.get("ignore_index", -100)

    def extra_repr(self) -> str:
        shown = {"shift": self.shift, "return_accuracy": self.return_accuracy, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def forward(
        self, x: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, num_items_in_batch: int | Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, S, C), weight (V, C), labels (B, S) -> the mean loss, or with num_items_in_batch the sum divided by that number.

        num_items_in_batch counts the tokens of a whole batch whose gradients are accumulated in several calls: the mean of each
        call's own tokens would weigh a token of a short sequence more than one of a long one.
        """
        if not (num_items_in_batch is None or isinstance(num_items_in_batch, Tensor)):
            label = "LinearCrossEntropy: num_items_in_batch"
            arguments.check(arguments.number(label, num_items_in_batch) >= 0, label, "a number of tokens", num_items_in_batch)
        if self.shift:  # the labels and not x, which would have to be copied
            labels = pad(labels, (0, 1), value=self.ignore_index)[..., 1:]
        reduction = "mean" if num_items_in_batch is None else "sum"
        options = {**self.options, "reduction": reduction, "return_argmax": self.return_accuracy}
        result = ops.linear_cross_entropy(x, weight, labels, bias=bias, **options)
        loss = result[0] if self.return_accuracy else result
        loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        if not self.return_accuracy:
            return loss
        counted = labels != self.ignore_index
        return loss, ((result[1] == labels) & counted).sum() / counted.sum()


__all__ = ["LinearCrossEntropy"]
