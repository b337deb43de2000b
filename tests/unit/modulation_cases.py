"""Inputs of adaptive layer norm, and what fp64 makes of them."""

import torch
from kernel_cases import assert_near, in_fp64, leaf

from dstrain.kernels.modulation import (
    gated_norm_modulate,
    gated_residual,
    gated_residual_reference,
    norm_modulate,
    norm_modulate_reference,
)
from dstrain.kernels.segments import Segments

EPS = 1e-6


class Case:
    """Random inputs of each operation, and what is computed from them."""

    def __init__(self, lengths, streams, biases, width, device="cpu", dtype=torch.float32):
        torch.manual_seed(sum(lengths) * width)
        self.segments = Segments(lengths, device, streams)
        rows, segments = sum(lengths), len(lengths)
        self.x, self.h, self.dout, self.dy = (leaf(torch.randn(rows, width), device, dtype) for _ in range(4))
        tables = [leaf(torch.randn(segments, width), device, dtype) for _ in range(3)]
        self.gate, self.shift, self.scale = tables
        self.biases = [leaf(torch.randn(width), device, dtype) for _ in range(biases)]
        self.x.data += 1  # a mean that is not zero
        self.index = self.segments.of_row, streams

    def inputs(self, op):
        if op == "norm":
            return [self.x, self.shift, self.scale]
        return [self.x, self.h, self.gate, *([self.shift, self.scale] if op == "gated_norm" else []), *self.biases]

    def names(self, op):
        names = ["x", "shift", "scale"] if op == "norm" else ["x", "h", "gate", "shift", "scale"]
        biases = [] if op == "norm" else [f"bias {i}" for i in range(len(self.biases))]
        return [*(names[:3] if op == "gated" else names), *biases]

    def run(self, op, mode, inputs=None):
        """Return the outputs, a tuple."""
        x, *rest = self.inputs(op) if inputs is None else inputs
        if op == "norm":
            return (norm_modulate(x, *rest, self.segments, EPS, mode),)
        count = 4 if op == "gated_norm" else 2
        (h, *tables), biases = rest[:count], rest[count:]
        if op == "gated_norm":
            return gated_norm_modulate(x, h, biases, *tables, self.segments, EPS, mode)
        return (gated_residual(x, h, biases, *tables, self.segments, mode),)

    def upstream(self, op):
        return {"norm": [self.dy], "gated": [self.dout], "gated_norm": [self.dout, self.dy]}[op]

    def grads(self, op, outputs, inputs=None):
        upstream = [grad.detach().to(out.dtype) for grad, out in zip(self.upstream(op), outputs)]
        return torch.autograd.grad(outputs, self.inputs(op) if inputs is None else inputs, upstream)

    def wanted(self, op, outputs):
        """Outputs and gradients in fp64. What is normed is `out` as the operation rounded it."""
        x, *rest = inputs = in_fp64(*self.inputs(op))
        of_row, streams = self.index
        if op == "norm":
            results = (norm_modulate_reference(x, *rest, of_row, EPS),)
        else:
            h, gate, *tables = rest[: 4 if op == "gated_norm" else 2]
            biases = rest[2 + len(tables) :]
            out = gated_residual_reference(x, h, biases, gate, of_row, streams)
            results = (out,)
            if op == "gated_norm":
                rounded = out + (outputs[0].double() - out).detach()
                results = out, norm_modulate_reference(rounded, *tables, of_row, EPS)
        return results, self.grads(op, results, inputs)


def assert_all_near(case, op, outputs, grads, atol=None):
    outputs_wanted, grads_wanted = case.wanted(op, outputs)
    for name, actual, wanted in zip(("out", "y"), outputs, outputs_wanted):
        assert actual.dtype == case.x.dtype
        assert_near(actual, wanted, name)
    for name, given, actual, wanted in zip(case.names(op), case.inputs(op), grads, grads_wanted):
        assert actual.dtype == given.dtype
        assert_near(actual, wanted, f"gradient of {name}", atol)
