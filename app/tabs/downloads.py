"""A button that makes a file when it is pressed, and hands it out.

Gradio's DownloadButton hands out the file that it holds already. So a hidden one gets the new file,
and is pressed by the browser once it has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import gradio as gr
from gradio.components import Component

from app.notices import calm


def download_button(
    label: str, api_name: str, make: Callable[..., str], inputs: Sequence[Component]
) -> gr.Button:
    """A button in the current layout.

    Args:
        label: on the button.
        api_name: of the handler, also the id of the hidden part.
        make: from the inputs' values to the path of a new file.
        inputs: what `make` gets.
    """
    button = gr.Button(label, size="sm", min_width=110)
    wire_download(button, api_name, make, inputs)
    return button


def wire_download(
    button: gr.Button, api_name: str, make: Callable[..., str], inputs: Sequence[Component]
) -> None:
    """Makes a button of an earlier layout hand out a file; see `download_button`."""
    holder_id = f"download-{api_name}"
    holder = gr.DownloadButton("", elem_id=holder_id, visible="hidden")
    button.click(
        calm(make), list(inputs), holder, show_progress="hidden", api_name=api_name
    ).success(
        None,
        js=f"() => setTimeout(() => (document.querySelector('#{holder_id} a') ?? "
        f"document.querySelector('#{holder_id}')).click(), 150)",
    )
