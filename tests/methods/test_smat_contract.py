"""SMAT in the contract matrix: every family, asked whole few-shot tasks."""

from __future__ import annotations

from functools import partial

import pytest

from peftcli.testing.contract import CLOSE, MethodContract, _gap
from peftcli.testing.rows import Row
from tests.few_shot import KINDS, base_of

ARCHITECTURES = {kind: architecture for kind, (_, architecture) in KINDS.items()}


class TestContract(MethodContract):
    rows = (
        *(
            Row("smat", {"experts": 3}, kind, partial(base_of, kind), architecture, exact_gradients=False)
            for kind, architecture in ARCHITECTURES.items()
        ),
        Row("smat", {"experts": 2, "structure": "unstructured", "stochastic": True, "sparsity": 0.5}, "unstructured",
            partial(base_of, "vit"), "image-classification", exact_gradients=False),
    )  # fmt: skip

    def test_does_not_do_what_it_does_not_promise(self, row: Row) -> None:
        """It starts as the base on every task; without a task, as training asks all methods, it has no answer."""
        base, model, method = row.attached()
        assert not method.capabilities.identity_at_start
        assert _gap(base.outputs(model), base.outputs(base.model)) < CLOSE[row.dtype]
        with pytest.raises(ValueError, match="each task has its own merged model"):
            model.merge_and_unload()
        with pytest.raises(ValueError, match="one adapter of a model"):
            model.add_adapter("second", model.peft_config["default"])
