"""The attack on the server, in its quick form: every well-formed request is answered with its own numbers."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from tests import ROOT
from tests.serving.helpers import ENVIRONMENT


@pytest.mark.nightly
def test_the_server_holds(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    spec = importlib.util.spec_from_file_location("attack_server", ROOT / "scripts/attack_server.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "attack_server", module)
    spec.loader.exec_module(module)
    found = module.attack(module.QUICK)
    assert found["held"], found
    assert (found["answered"], found["wrong"], sum(found["garbage"].values())) == (80, 0, 200)
