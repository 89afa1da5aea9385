from __future__ import annotations

import inspect
import pickle
import re

import pytest

from edgeq import errors
from edgeq.errors import BudgetError, EdgeqError, MissingPackageError, SourceError, require_package


def _all_errors() -> list[type[EdgeqError]]:
    found = [item for _, item in inspect.getmembers(errors, inspect.isclass)]
    return [item for item in found if issubclass(item, EdgeqError)]


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn = {name: int(code) for name, code in re.findall(r"(\w+Error) +(?:exit code )?(\d)", errors.__doc__ or "")}
    assert drawn == {kind.__name__: kind.exit_code for kind in _all_errors()}


@pytest.mark.parametrize("kind", _all_errors(), ids=lambda kind: kind.__name__)
def test_one_line_with_cause_and_remedy(kind: type[EdgeqError]) -> None:
    error = kind("the file\nis gone.", "copy it  again", details=("a", "b"))
    assert str(error) == "the file is gone. copy it again."
    assert str(kind("alone")) == "alone."
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.cause, copy.remedy, copy.details) == (error.cause, error.remedy, error.details)


def test_exit_codes() -> None:
    assert (SourceError.exit_code, BudgetError.exit_code) == (1, 3)


def test_a_missing_package_names_its_extra() -> None:
    with pytest.raises(MissingPackageError, match=r"pip install 'edgeq\[cpu\]'"):
        require_package("no_such_package_of_ours", "cpu", "to run models")


def test_a_broken_package_is_not_called_missing(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from pathlib import Path

    folder = Path(str(tmp_path))
    (folder / "half_installed.py").write_text("import its_missing_dependency\n")
    (folder / "does_not_load.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(MissingPackageError, match="its_missing_dependency, which it needs, is not"):
        require_package("half_installed", "cpu", "to run models")
    with pytest.raises(MissingPackageError, match=r"does not load .*libcuda"):
        require_package("does_not_load", "cpu", "to run models")
    sys.modules.pop("half_installed", None)
