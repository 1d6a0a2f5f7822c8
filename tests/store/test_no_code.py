"""Reading what others have made runs none of it."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

import modicum.store
from modicum.errors import CorruptAdapterError
from modicum.store.files import read_adapter

PACKAGE = Path(modicum.store.__file__).parent
#: modules whose loading runs what they read, and functions that run text
RUNNING = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "runpy",
    "code",
}
RUN = {"eval", "exec", "compile", "__import__"}


class Trap:
    """Leaves a trace if it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_a_pickled_adapter_is_not_unpickled(tmp_path):
    folder, trace = tmp_path / "adapter", tmp_path / "trace"
    folder.mkdir()
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    weights = {"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 4), "trap": Trap(trace)}
    torch.save(weights, folder / "adapter_model.bin")
    with pytest.raises(CorruptAdapterError, match=r"adapter_model\.bin"):
        read_adapter(folder)
    assert not trace.exists()
    torch.load(folder / "adapter_model.bin", weights_only=False)
    assert trace.exists()  # the trap is one


def test_no_module_of_the_store_can_run_what_it_reads():
    modules = sorted(PACKAGE.rglob("*.py"))
    assert len(modules) > 40
    assert [fault for path in modules for fault in faults(path)] == []


def faults(path: Path) -> list[str]:
    """What in a module could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [one.name for one in node.names if one.name.partition(".")[0] in RUNNING]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in RUNNING:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            said = ast.unparse(node.func)
            options = {one.arg: ast.unparse(one.value) for one in node.keywords}
            unsafe = said == "torch.load" and options.get("weights_only") != "True"
            if said in RUN or unsafe or options.get("allow_pickle", "False") != "False":
                found.append(ast.unparse(node))
    return [f"{path.name}: {one}" for one in found]
