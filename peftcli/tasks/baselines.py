"""What a task's rows give away without the model. N rows, C classes."""

from __future__ import annotations

from typing import Any

import torch

from peftcli.data.rows import Rows
from peftcli.tasks import metrics
from peftcli.tasks.contract import Quality
from peftcli.tasks.prompts import Template


def classification(splits: Any, template: Template, labels: list[str]) -> list[Quality]:
    """The majority class (with the classes' shares as probabilities), and TF-IDF with logistic regression.

    Both learn from the training rows and are measured on the test split, or else on the validation split. There are
    none where the training rows are a stream.

    Args:
        splits: Rows with the template's columns and `label`.
        template: The prompt; texts are compared uncut.
        labels: The label set.
    """
    held_out = splits.test if splits.test is not None else splits.validation
    if held_out is None or not isinstance(splits.train, Rows):
        return []
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    index = {label: i for i, label in enumerate(labels)}
    learnt, asked = ([index[str(label)] for label in rows["label"]] for rows in (splits.train, held_out))
    targets_N = torch.tensor(asked)
    shares_C = torch.bincount(torch.tensor(learnt), minlength=len(labels)) / len(learnt)
    majority = metrics.classification(shares_C.log().expand(len(asked), -1), targets_N)
    found = [Quality("majority class", majority)]

    texts, asked_texts = (
        ["\n".join(template.values(row).values()) for row in rows] for rows in (splits.train, held_out)
    )
    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"), LogisticRegression(max_iter=1000)
    )
    try:
        model.fit(texts, learnt)
    except ValueError:  # No text has a word in it.
        return found
    scores_NC = torch.from_numpy(model.predict_log_proba(asked_texts)).float()
    return [*found, Quality("TF-IDF + logistic regression", metrics.classification(scores_NC, targets_N))]
