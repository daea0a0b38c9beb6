"""The page: `build_app(services)` → gr.Blocks. Each tab is a file under tabs/."""

from __future__ import annotations

import gradio as gr

from app import views
from app.notices import CalmBlocks
from app.services import Services
from app.tabs import chat, data, runs, sweeps, train

_WAIT_S = 3600  # uploads and downloads are forgotten after an hour


def build_app(services: Services) -> gr.Blocks:
    """The whole page over a server's services."""
    with CalmBlocks(
        title="GaPO-Lite", analytics_enabled=False, delete_cache=(_WAIT_S, _WAIT_S)
    ) as demo:
        with gr.Row(elem_classes="page-top"):
            gr.HTML(views.HEADER, js_on_load=None)
            start = gr.Button("▶ Start", variant="primary", scale=0, min_width=110)
        with gr.Tabs() as tabs:
            with gr.Tab("Data", id="data") as data_tab:
                data_inputs = data.build(services)
            with gr.Tab("Train", id="train") as train_tab:
                trained = train.build(services, train_tab, tabs, start)
            with gr.Tab("Runs", id="runs") as runs_tab:
                runs.build(services, runs_tab, tabs, trained)
            with gr.Tab("Sweeps", id="sweeps") as sweeps_tab:
                sweeps.build(services, sweeps_tab, tabs, trained)
            with gr.Tab("Chat", id="chat") as chat_tab:
                chat.build(services, chat_tab)
        data.connect(services, demo, data_tab, data_inputs, trained)
    demo.queue(default_concurrency_limit=20)
    return demo
