"""Requests to stop, one within another."""

from __future__ import annotations

import os
import signal

from peftcli.training.signals import StopRequest


def test_who_is_started_after_the_request_knows_of_it():
    with StopRequest() as outer:
        with StopRequest() as calm:
            assert calm.name == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer.name == "SIGTERM"
        with StopRequest() as inner:
            assert inner.name == "SIGTERM"
