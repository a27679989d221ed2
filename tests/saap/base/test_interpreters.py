"""Which Python has a package."""

import sys

import pytest

from saap.base.errors import UserError
from saap.base.interpreters import PEER_PYTHON, python_with


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PEER_PYTHON, raising=False)
    with pytest.raises(UserError, match="x needs no_such_package, which is not installed: pip install some-package"):
        python_with(["no_such_package"], "x", "some-package")
    assert python_with(["numpy"], "x", "numpy") == sys.executable
    monkeypatch.setenv(PEER_PYTHON, sys.executable)
    told = f"no_such_package.part, which is not installed in {sys.executable}, nor no_such_package.part here"
    with pytest.raises(UserError, match=told):
        python_with(["no_such_package.part"], "x", "some-package")
    monkeypatch.setenv(PEER_PYTHON, "/nowhere/python")
    with pytest.raises(UserError, match="/nowhere/python does not run"):
        python_with(["numpy"], "x", "numpy")
