"""A model as an ONNX file, the same with 8-bit weights, and both as modules that ONNX Runtime computes.

Shapes: B rows, L tokens, C colours, S pixels a side.
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.config.errors import CheckFailed, Mistake, UserError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
SCORES = "logits"
"""Name of the graph's only output."""
LARGEST_FILE = 2**31 - 2**26
"""Bytes of weights that fit into one file (2 GiB, less the graph); more go to a file beside it."""
WARM_UP, RUNS, SECONDS = 5, 50, 2.0
"""Runs that do not count, and how many do, or for how long."""


def check_installed() -> None:
    """Raises UserError where a package that export needs is missing."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        what = f"--onnx needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
        raise UserError(Mistake(what, "--onnx", hint='pip install "peftcli[onnx]"'))


class _Scores(nn.Module):
    """Inputs by position, scores alone out."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


class Exported(nn.Module):
    """An ONNX file on the CPU in place of the model that it was written from: same arguments, `logits` in the answer.

    Args:
        path: The file.
        threads: Threads of one operator; as many as PyTorch takes if not given.

    Raises:
        CheckFailed: `export-drift`, ONNX Runtime cannot load it, or cannot run it on a batch.
    """

    def __init__(self, path: Path, threads: int | None = None):
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or torch.get_num_threads()
        self.path = path
        with self._explained():
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(self, **batch: Tensor) -> SimpleNamespace:
        with self._explained():
            [scores] = self.session.run([SCORES], {name: tensor.cpu().numpy() for name, tensor in batch.items()})
        return SimpleNamespace(logits=torch.from_numpy(scores))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        kinds = tuple(k for k in vars(state).values() if isinstance(k, type) and issubclass(k, Exception))
        try:
            yield
        except kinds as error:
            what = f"ONNX Runtime cannot compute {self.path.name}: {_first_line(error)}"
            raise CheckFailed("export-drift", what, "this model cannot be used by way of ONNX") from error


def write(model: Any, batch: Mapping[str, Tensor], path: Path) -> None:
    """Write a model's scores as an ONNX graph in float32, for any number of rows and tokens.

    Args:
        model: On the CPU, in float32; put into evaluation mode, and nothing in it needs a gradient afterwards.
        batch: Its arguments, two or more rows: `pixel_values` [B, C, S, S], or `input_ids` and `attention_mask` [B, L].
        path: The file; weights of more than 2 GiB go beside it, to `path` with `.data`.

    Raises:
        UserError: The model has no graph.
    """
    names, values = list(batch), tuple(batch.values())
    free = tuple({0: "rows"} if tensor.dim() == 4 else {0: "rows", 1: "tokens"} for tensor in values)
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    with _quiet():
        try:
            program = torch.onnx.export(
                _Scores(model, names),
                values,
                input_names=names,
                output_names=[SCORES],
                dynamic_shapes=(free,),
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            kind = model.config.model_type
            raise UserError(
                Mistake(f"a model of type {kind} cannot be exported: {_reason(error)}", "--onnx")
            ) from error
        assert program is not None
        size = sum(parameter.nbytes for parameter in model.parameters())
        program.save(path, external_data=size > LARGEST_FILE)


class Program(nn.Module):
    """A program of `torch.export` in place of the model that it was written from: same arguments, same `logits`.

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.program = torch.export.load(path).module()

    def train(self, mode: bool = True) -> Program:
        """A program has one mode, that in which it was written."""
        return self

    def forward(self, **batch: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.program(*batch.values()))


def write_program(model: Any, batch: Mapping[str, Tensor], path: Path) -> None:
    """Write a model's scores as a program of `torch.export`, which PyTorch runs without the model's code.

    Args:
        model: As for `write`.
        batch: As for `write`.
        path: The file.

    Raises:
        UserError: The model has no graph.
    """
    values = tuple(batch.values())
    any_size = torch.export.Dim.AUTO
    free = tuple({0: any_size} if tensor.dim() == 4 else {0: any_size, 1: any_size} for tensor in values)
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    with _quiet():
        try:
            program = torch.export.export(_Scores(model, list(batch)), values, dynamic_shapes=(free,), strict=False)
            torch.export.save(program, path)
        except Exception as error:  # each thing that cannot be followed or written fails in its own way
            kind = model.config.model_type
            what = f"a model of type {kind} cannot be exported: {_reason(error)}"
            raise UserError(Mistake(what, "--pt2", hint="leave out --pt2")) from error


def quantise(path: Path, to: Path) -> None:
    """Write an ONNX file's matrices and convolutions with 8-bit weights; activations are rounded as they come.

    Args:
        path: From `write`.
        to: The new file.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(path)
    del graph.graph.value_info[:]  # shapes of weights that are about to be laid out differently
    data = path.with_name(f"{path.name}.data").is_file()
    with _quiet():
        # Unsigned: signed ones overflow in the 16-bit sums of processors without VNNI.
        quantize_dynamic(graph, to, per_channel=True, weight_type=QuantType.QUInt8, use_external_data_format=data)


def latency(model: Callable[..., Any], row: Mapping[str, Tensor]) -> dict[str, float]:
    """Milliseconds of a forward pass of one row: `median` and `p95` of `runs`."""
    taken: list[float] = []
    with torch.inference_mode():
        for _ in range(WARM_UP):
            model(**row)
        end = time.perf_counter() + SECONDS
        while len(taken) < RUNS and (len(taken) < 2 or time.perf_counter() < end):
            start = time.perf_counter()
            model(**row)
            taken.append((time.perf_counter() - start) * 1e3)
    return {"median": statistics.median(taken), "p95": statistics.quantiles(taken, n=20)[-1], "runs": len(taken)}


@contextmanager
def _quiet() -> Iterator[None]:
    """No advice about packages, shapes and steps that the user has no part in."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """What was wrong in the first place, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
