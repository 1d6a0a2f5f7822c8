"""`import modicum` and `modicum --help` stay light, and PEFT learns of our methods in any order."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

HEAVY = ("torch", "peft", "transformers", "numpy", "datasets", "pydantic", "rich", "yaml")


def _python(code: str) -> str:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import modicum; dir(modicum)",
        "import modicum; modicum.method_names()",
        "from modicum.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from modicum.cli import main\ntry: main(['--version'])\nexcept SystemExit: pass",
    ],
    ids=["import", "method names", "help", "version"],
)
def test_imports_nothing_heavy(code):
    loaded = _python(f"{code}\nimport sys; print('\\n' + ' '.join(m for m in {HEAVY} if m in sys.modules))")
    assert loaded.splitlines()[-1:] in ([], [""]) or not set(loaded.splitlines()[-1].split()) & set(HEAVY)


@pytest.mark.parametrize(
    "imports",
    [
        "import modicum; import peft",
        "import peft; import modicum",
        "import modicum; from peft import AutoPeftModelForCausalLM",
        "from peft import AutoPeftModelForCausalLM; import modicum",
        "from modicum import LoraXSConfig",
        "import modicum.adapters.config",
        "import modicum.adapters.host",
        "import modicum.methods.lora_xs",
        "import modicum; import transformers.integrations.peft; import peft",
    ],
)
def test_peft_knows_our_methods(imports):
    found = _python(f"""
        import sys, inspect
        {imports}
        from peft import mapping
        from modicum._hooks import _Finder
        names = [kind.value for kind in mapping.PEFT_TYPE_TO_TUNER_MAPPING]
        assert not any(isinstance(f, _Finder) and "peft" in f.waiting for f in sys.meta_path)
        assert "def get_peft_model" in inspect.getsource(sys.modules["peft"].mapping_func)
        print(*names)
    """)
    assert "MODICUM_LORA_XS" in found.split()


@pytest.mark.parametrize(
    "imports",
    [
        "import modicum; from transformers import AutoModelForCausalLM as Model; Model.from_config",
        "import modicum; import transformers.quantizers.auto",
        "import transformers.quantizers.auto; import modicum",
        "import modicum.quant.huggingface",
        "from modicum import AffineConfig",
    ],
)
def test_transformers_knows_our_quantized_checkpoints(imports):
    found = _python(f"""
        import sys
        {imports}
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as quantizers
        from modicum._hooks import _Finder
        assert not any(isinstance(f, _Finder) and "transformers.quantizers.auto" in f.waiting for f in sys.meta_path)
        print(configs["modicum"].__name__, quantizers["modicum"].__name__)
    """)
    assert found.split() == ["AffineConfig", "AffineQuantizer"]


def test_a_faulty_method_does_not_take_peft_away(tmp_path):
    (tmp_path / "faulty_methods.py").write_text("raise OSError('broken on purpose')\n")
    info = tmp_path / "faulty-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[modicum.methods]\nfaulty = faulty_methods\n")
    said = _python(f"""
        import sys, warnings
        sys.path.insert(0, {str(tmp_path)!r})
        import modicum
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            import peft
        print(peft.LoraConfig.__name__, [str(w.message) for w in seen if "modicum" in str(w.message)])
    """)
    assert "LoraConfig" in said
    assert "broken on purpose" in said
