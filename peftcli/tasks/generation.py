"""Text that follows a prompt. B rows of a batch, L tokens, S supervised positions, V words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from rich.text import Text
from torch import Tensor, nn

from peftcli.config.errors import Mistake, UserError
from peftcli.data.collate import IGNORE
from peftcli.models.positions import select
from peftcli.tasks import metrics
from peftcli.tasks.chat import Chat
from peftcli.tasks.contract import Encoded, Evaluation, Loss, Task, bare, check_metric
from peftcli.tasks.inference import decode_greedily, marked, measuring, to_batch
from peftcli.tasks.loss import cross_entropy_sum
from peftcli.tasks.prompts import Template
from peftcli.tasks.tokens import Tokens, cut_to_fit, hand_over_spaces
