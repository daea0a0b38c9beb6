"""How the page looks: Gradio's base theme with the system's own fonts (nothing is fetched), quiet
greys and one accent, in light and dark."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from gapo_lite import plots

STATIC = Path(__file__).parent / "static"

_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> gr.themes.Base:
    """The theme; its colours are CSS variables, which the figures use too."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        spacing_size=gr.themes.sizes.spacing_sm,
        radius_size=gr.themes.sizes.radius_md,
        text_size=gr.themes.sizes.text_md,
        font=_SANS,
        font_mono=_MONO,
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_shadow="none",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_700",
        block_label_text_size="*text_sm",
        block_title_text_size="*text_sm",
        block_title_text_weight="500",
        block_info_text_size="12px",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        button_large_text_size="*text_md",
        button_large_text_weight="550",
        button_large_padding="6px 14px",
        button_small_text_weight="500",
        input_border_width="1px",
        input_background_fill="white",
        input_background_fill_dark="*neutral_950",
    )


def css() -> str:
    """The page's own rules, and those of the figures."""
    return _read("page.css") + plots.STYLE.read_text(encoding="utf-8")


def head() -> str:
    """Scripts of the page and of its figures, in line: nothing to fetch, nothing to wait for."""
    return f"<script>{_read('charts.js')}</script>\n<script>{_read('page.js')}</script>"


def _read(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")
