"""Make an exported folder loadable where this package is not installed.

``transformers`` runs Python files that lie beside a model (``trust_remote_code=True``) when the
configuration's ``auto_map`` names them. The files written here are the package's own modules, their
imports made relative, so both ways of loading run the same code.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

# Every module that the classes need, inside the package; tests check that none is missing.
MODULES = (
    "fast_weights.accumulate",
    "fast_weights.documents",
    "fast_weights.exchange",
    "fast_weights.groups",
    "fast_weights.inside",
    "fast_weights.labels",
    "fast_weights.scale",
    "fast_weights.scan_call",
    "fast_weights.sweeps",
    "fast_weights.target",
    "fast_weights.update",
    "fast_weights.upload",
    "fast_weights.write_rules",
    "hf.cache",
    "hf.configuration",
    "hf.mlp",
    "hf.modeling",
    "hf.versions",
    "inference.fast_weight_state",
    "inference.token_runs",
    "rule",
)
CLASSES = {
    "qwen3_ttt": "Qwen3TTT",
    "llama_ttt": "LlamaTTT",
    "qwen2_ttt": "Qwen2TTT",
    "mistral_ttt": "MistralTTT",
}
_IMPORT = re.compile(r"^from megatron_ttt\.([\w.]+) import", re.MULTILINE)


def file_name(module: str) -> str:
    """``hf.modeling`` lies in ``megatron_ttt_hf_modeling.py``: all in one folder, none hidden."""
    return f"megatron_ttt_{module.replace('.', '_')}"


def write_auto_map(folder: Path | str) -> None:
    """Write the modules beside an exported model and name them in its ``config.json``.

    Args:
        folder: holds ``config.json`` of one of our model types.

    Raises:
        ValueError: the configuration is of another model type.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind not in CLASSES:
        raise ValueError(f"{path}: model_type {kind!r} is none of {', '.join(CLASSES)}")
    package = files("megatron_ttt")
    for module in MODULES:
        source = package.joinpath(*module.split(".")[:-1], f"{module.split('.')[-1]}.py")
        text = _IMPORT.sub(_relative, source.read_text(encoding="utf-8"))
        (folder / f"{file_name(module)}.py").write_text(text, encoding="utf-8")
    configuration = folder / f"{file_name('hf.configuration')}.py"
    configuration.write_text(configuration.read_text(encoding="utf-8") + _all_files())
    modeling, name = file_name("hf.modeling"), CLASSES[kind]
    config["auto_map"] = {
        "AutoConfig": f"{file_name('hf.configuration')}.{name}Config",
        "AutoModel": f"{modeling}.{name}Model",
        "AutoModelForCausalLM": f"{modeling}.{name}ForCausalLM",
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _all_files() -> str:
    """Python that names every file and never runs.

    An older ``transformers`` fetches the files that the first one names and no others; without
    them it would end with a missing file instead of what ``hf/versions.py`` says.
    """
    names = "".join(
        f"    from .{file_name(module)} import __name__  # noqa: F401\n" for module in MODULES
    )
    return f"\n\ndef _needed() -> None:\n{names}"


def _relative(match: re.Match[str]) -> str:
    assert match[1] in MODULES, f"megatron_ttt.{match[1]} is not among the files of an export"
    return f"from .{file_name(match[1])} import"
