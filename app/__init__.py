"""The page: a Gradio application over gapo_lite. `python -m app` opens it."""
