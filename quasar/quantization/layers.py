"""Linear layers with low-bit weights."""

from __future__ import annotations

import quasar_kernels
import torch
from quasar_kernels import DenseWeight, Fp8Weight, GroupInt8Weight, InputOrder, Int4Weight, Int8Weight, Quantized
from quasar_kernels.gpu import multiplies_fp8
from torch import Tensor, nn

from quasar.model.linear import Activations, Linear, QuantizedLinear


class _Int8Linear(QuantizedLinear):
    """Base class of the linear layers with an int8 weight and a bias."""

    def __init__(self, weight: Int8Weight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    @property
    def weight_bytes(self) -> int:
        return self.weight.nbytes + _bias_bytes(self.bias)


class W8A8Linear(_Int8Linear):
    """A linear layer with int8 weights and dynamic int8 activations, scaled per token or per token and group."""

    int8_activations = True

    def __init__(self, weight: Int8Weight, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.activation_group_size = weight.group_size or None

    def forward(self, x: Activations) -> Tensor:
        return quasar_kernels.linear_w8a8(x, self.weight, self.bias)


class W8A16Linear(_Int8Linear):
    """A linear layer with int8 weights and activations in the model's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return quasar_kernels.linear_w8a16(x, self.weight, self.bias)


class Fp8Linear(QuantizedLinear):
    """A linear layer with FP8 weights, one scale per output channel, and dynamic FP8 activations, scaled per token."""

    def __init__(self, weight: Fp8Weight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.emulated = not multiplies_fp8(weight.scales.device)

    @property
    def weight_bytes(self) -> int:
        return self.weight.nbytes + _bias_bytes(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return quasar_kernels.linear_fp8(x, self.weight, self.bias)


class W4Linear(QuantizedLinear):
    """A linear layer with 4-bit weights in groups. With ``activation_bits`` 8 its inputs are int8 in these groups.

    input_order: the input that each column of the weight is multiplied with; None if it is that of the same index. The
        op before must not quantize such inputs, because it would do so in the groups of another order
    """

    def __init__(
        self, weight: Int4Weight, bias: Tensor | None, activation_bits: int = 16, input_order: InputOrder | None = None
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.input_order = weight, bias, input_order
        self.int8_activations = activation_bits == 8 and input_order is None
        self.activation_group_size = weight.group_size
        self._quantizes = activation_bits == 8

    @property
    def weight_bytes(self) -> int:
        return self.weight.nbytes + _bias_bytes(self.bias) + _order_bytes(self.input_order)

    def forward(self, x: Activations) -> Tensor:
        if self.input_order is not None:
            assert isinstance(x, Tensor)
            x = quasar_kernels.select_inputs(x, self.input_order)
        if self._quantizes or isinstance(x, Quantized):
            return quasar_kernels.linear_w4a8(x, self.weight, self.bias)
        return quasar_kernels.linear_w4a16(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """A linear layer with 16-bit weights that are stored in the order in which the kernels read them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = DenseWeight(linear.weight.detach()), linear.bias

    @property
    def weight_bytes(self) -> int:
        return self.weight.nbytes + _bias_bytes(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return quasar_kernels.linear_bf16(x, self.weight, self.bias)


class PackedEmbedding(nn.Module):
    """An embedding that reads its rows from the packed weight of the output layer, which it is tied to."""

    weight_bytes = 0
    """The output layer counts the table."""

    def __init__(self, table: DenseWeight) -> None:
        super().__init__()
        self.table = table

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table.rows(tokens)


def pack_linears(model: nn.Module) -> None:
    """Replace every unquantized bfloat16 linear layer by a `PackedLinear`, in place, if there are kernels for it.

    An embedding that is tied to such a layer becomes a `PackedEmbedding`, so that its table is in memory only once.
    """
    modules = list(model.named_modules())
    embeddings = {module.weight: name for name, module in modules if isinstance(module, nn.Embedding)}
    for name, linear in modules:
        if type(linear) not in (nn.Linear, Linear) or linear.weight.dtype != torch.bfloat16:
            continue
        if DenseWeight.has_kernels(linear.weight):
            packed = PackedLinear(linear)
            model.set_submodule(name, packed)
            if linear.weight in embeddings:
                model.set_submodule(embeddings[linear.weight], PackedEmbedding(packed.weight))


class GroupInt8Linear(QuantizedLinear):
    """A linear layer with int8 weights in groups along the input dimension, and activations in the model's dtype.

    input_order: the input that each column is multiplied with; None if it is that of the same index
    """

    def __init__(self, weight: GroupInt8Weight, bias: Tensor | None, input_order: InputOrder | None = None) -> None:
        super().__init__()
        self.weight, self.bias, self.input_order = weight, bias, input_order

    @property
    def weight_bytes(self) -> int:
        return self.weight.nbytes + _bias_bytes(self.bias) + _order_bytes(self.input_order)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_order is not None:
            x = quasar_kernels.select_inputs(x, self.input_order)
        return quasar_kernels.linear_w8a16(x, self.weight, self.bias)


class QuantizedEmbedding(nn.Module):
    """An embedding that reads its rows from the quantized weight of the output layer, which it is tied to.

    dtype: of the rows
    """

    weight_bytes = 0
    """The output layer counts the table."""

    def __init__(self, table: Int4Weight | Int8Weight | GroupInt8Weight, dtype: torch.dtype) -> None:
        super().__init__()
        self.table, self.dtype = table, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table.rows(tokens).to(self.dtype)


def _bias_bytes(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.nbytes


def _order_bytes(order: InputOrder | None) -> int:
    return 0 if order is None else order.nbytes
