"""``edgeq imatrix``: which columns of a model's matrices matter, as a file for quantizers."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.cli.arguments import add_json_argument, positive_int, read_file, thread_count, whole_number
from edgeq.cli.files import check_output

if TYPE_CHECKING:
    from edgeq.planner.importance import Collection, ImatrixJob

EXAMPLES = """\
edgeq imatrix ./model -o model.imatrix.gguf
edgeq imatrix ./model-f16.gguf --calibration text.txt --calibration-tokens 50000 -o model.imatrix.gguf
edgeq convert ./model --target laptop-cpu --quant iq2_m --imatrix model.imatrix.gguf -o bundle
llama-quantize --imatrix model.imatrix.gguf model-f16.gguf out.gguf iq2_m
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", help="Hugging Face id, a folder with config.json and safetensors, or a float GGUF")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the importance matrix, in llama.cpp's format"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the file if it is there")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument(
        "--llama-cpp", type=Path, metavar="DIR", help="use the convert_hf_to_gguf.py of this llama.cpp checkout"
    )
    parser.add_argument("--calibration", type=read_file, metavar="FILE", help="text; default: the model writes its own")
    parser.add_argument("--calibration-tokens", type=positive_int, metavar="N", help="of that text, at most (10240)")
    parser.add_argument("--seed", type=whole_number, metavar="N", help="of the text that the model writes (0)")
    parser.add_argument("--threads", type=thread_count, metavar="N", help="default: the physical cores")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Collect and write it, and say what it stands on."""
    from edgeq.cli.output import show, show_lines
    from edgeq.cli.progress import Progress
    from edgeq.planner.importance import make_imatrix
    from edgeq.types import to_json

    job = _job(args)
    check_output(args.output, force=args.force)
    with Progress(sys.stderr) as progress:
        made = make_imatrix(
            job,
            args.output,
            force=args.force,
            progress=lambda stage, done, total, detail: progress(done, total, stage),
        )
    if args.json:
        show(to_json(_document(made, args.output)).decode())
    else:
        show_lines(_lines(made, args))
    return 0


def _job(args: argparse.Namespace) -> ImatrixJob:
    from edgeq.converters.calibration.texts import CHUNK_TOKENS
    from edgeq.errors import UsageError
    from edgeq.planner.importance import ImatrixJob

    if args.calibration_tokens is not None and args.calibration_tokens < CHUNK_TOKENS:
        raise UsageError(
            f"--calibration-tokens {args.calibration_tokens} is less than one chunk of {CHUNK_TOKENS}",
            "Use 2048 or more",
        )
    if args.calibration is not None and args.seed is not None:
        raise UsageError("--seed is for the text that the model writes, and --calibration gives one", "Leave it out")
    given: dict[str, Any] = {"tokens": args.calibration_tokens, "seed": args.seed}
    return ImatrixJob(
        model=args.model,
        revision=args.revision,
        llama_cpp=args.llama_cpp,
        calibration=args.calibration,
        threads=args.threads,
        **{name: value for name, value in given.items() if value is not None},
    )


def _document(made: Collection, out: Path) -> dict[str, Any]:
    text = made.text
    return {
        "path": str(out).encode("utf-8", errors="backslashreplace").decode(),
        "source": made.source,
        "matrix_sha256": made.matrix.sha256,
        "matrices": len(made.matrix.entries),
        "without_entry": made.without_entry,
        "text": {
            "source": text.source,
            "name": text.name,
            "tokens": text.n_tokens,
            "chunks": len(text.chunks),
            "seed": text.seed,
            "text_sha256": text.text_sha256,
        },
        "notes": made.notes,
    }


def _lines(made: Collection, args: argparse.Namespace) -> list[str]:
    source, text = made.source, made.text
    wrote = "that the model wrote itself" if text.source == "self" else f"of {text.name}"
    seed = "" if text.seed is None else f", seed {text.seed}"
    without = f"; no entry: {', '.join(made.without_entry)}" if made.without_entry else ""
    model, out = shlex.quote(args.model), shlex.quote(str(args.output))
    return [
        f"model    {source.id}, {source.architecture}, {source.n_params / 1e6:.1f} M weights in {source.dtype}",
        f"text     {text.n_tokens} tokens {wrote}, in {len(text.chunks)} texts{seed}, sha256 {text.text_sha256}",
        f"matrices {len(made.matrix.entries)}{without}",
        f"contents sha256 {made.matrix.sha256}",
        *(f"note     {note}" for note in made.notes),
        f"wrote {args.output}",
        f"next: edgeq convert {model} --target DEVICE --imatrix {out}",
    ]
