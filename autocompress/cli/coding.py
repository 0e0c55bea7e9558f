"""Commands for coded containers: `encode` and `decode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autocompress.cli.app import app
from autocompress.cli.output import make_console
from autocompress.errors import ConfigError


@app.command()
def encode(
    model: Annotated[Path, typer.Argument(help="An ONNX file.")],
    out: Annotated[
        Path | None, typer.Option(help="The container; by default beside the file, as .acz.")
    ] = None,
) -> None:
    """Code an ONNX file for download: smaller, and bit for bit the same file once decoded.

    Example: autocompress encode picked/model.onnx --out picked/model.acz
    """
    from autocompress.export.coding import CODED_SUFFIX, encode_file
    from autocompress.report.coded import coded_table
    from autocompress.report.figures import byte_size

    target = out or model.with_suffix(CODED_SUFFIX)
    sizes = encode_file(model, target)
    console = make_console()
    console.print(coded_table(sizes))
    console.print(
        f"file {byte_size(sizes.file_bytes)}, download {byte_size(sizes.coded_bytes)}: "
        f"{sizes.ratio:.2f} times smaller\ncontainer: {target}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    if sizes.external_tensors:
        console.print(
            f"warning: {sizes.external_tensors} tensors lie in other files and are not in it"
        )


@app.command()
def decode(
    container: Annotated[Path, typer.Argument(help="A coded container (.acz).")],
    out: Annotated[
        Path | None, typer.Option(help="The ONNX file; by default beside the container.")
    ] = None,
) -> None:
    """Give the ONNX file back that a container was made from, bit for bit.

    Example: autocompress decode picked/model.acz --out model.onnx
    """
    from autocompress.export.coding import decode_file
    from autocompress.report.figures import byte_size

    target = out or container.with_suffix(".onnx")
    if out is None and target.exists():
        raise ConfigError(
            "There is a file of that name already; it is not overwritten.",
            given=target,
            advice="say where the model is to go with --out",
        )
    size = decode_file(container, target)
    make_console().print(f"model: {target} ({byte_size(size)})", soft_wrap=True, highlight=False)
